"""samples.jsonl: valid whatever happens, each answer once, the same with and without a stop."""

import json

import pytest

from diffpo.tasks.sudoku import Sudoku
from diffpo.tasks.task import Grade
from diffpo.training.samples import read_samples


def samples_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


EVERY = ("--samples.every", "2", "--samples.count", "3")


@pytest.fixture
def run(finished_run):
    """The folder of a run with samples of the updates 0, 2 and 4."""
    return finished_run(*EVERY)


def test_a_sample_says_what_was_asked_answered_and_earned(run):
    rows = samples_of(run)
    assert [(row["update"], row["index"]) for row in rows] == [(u, i) for u in (0, 2, 4) for i in range(3)]
    for row in rows:
        assert isinstance(row["prompt"], str)
        assert row["correct"] in (True, False)
        assert 0 <= row["reward"] <= max(row["task_reward"], 0)
        assert 1 <= row["nfe"] <= 16
        assert row["gamma"] in (2.0, 3.0, 4.0, 6.0)
        assert len(row["pieces"]) == len(row["commit_step"]) == len(row["special"]) == row["length"]
        assert max(row["commit_step"]) <= row["nfe"]
        text = "".join(piece for piece, special in zip(row["pieces"], row["special"], strict=True) if not special)
        assert text.split() == row["completion"].split()


def test_the_same_prompts_are_asked_again(run):
    rows = samples_of(run)
    for index in range(3):
        assert len({row["prompt"] for row in rows if row["index"] == index}) == 1
    assert len({row["prompt"] for row in rows}) == 3


def test_an_undecided_answer_and_a_dropped_reward_are_null(train, tmp_path, monkeypatch):
    monkeypatch.setattr(Sudoku, "grade_many", lambda self, problems, texts: [Grade(None, None)] * len(texts))
    assert train("--samples.every", "100", "--updates", "1") == 0
    for row in samples_of(tmp_path / "run"):
        assert (row["correct"], row["reward"], row["task_reward"]) == (None, None, None)


def test_every_0_draws_none(train, tmp_path):
    assert train("--samples.every", "0", "--updates", "1") == 0
    assert not (tmp_path / "run/samples.jsonl").exists()


def test_without_a_period_that_fits_the_beginning_and_the_end_are_there(train, tmp_path):
    assert train("--samples.every", "100", "--updates", "3", "--samples.count", "99") == 0
    updates = [row["update"] for row in samples_of(tmp_path / "run")]
    assert updates == [0] * 4 + [3] * 4  # as many as an update asks for


def test_a_resumed_run_writes_what_the_whole_one_does(train, run, tmp_path):
    whole = samples_of(run)
    assert train(*EVERY, "--overwrite", "--updates", "3") == 0
    assert {row["update"] for row in samples_of(run)} == {0, 2, 3}
    assert train(*EVERY, "--resume", "--allow-config-change") == 0
    assert [row for row in samples_of(run) if row["update"] in (0, 2)] == whole[:6]
    assert [(row["update"], row["index"]) for row in samples_of(run)][-6:] == [(u, i) for u in (3, 4) for i in range(3)]


def test_what_is_after_the_checkpoint_is_dropped_and_a_missing_answer_made_up_for(train, run):
    whole = (run / "samples.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    after = json.loads(lines[-1]) | {"update": 9, "index": 0}
    for kept in ([*lines[:-2], lines[-2][:40]], [*lines, json.dumps(after).encode() + b"\n"], []):
        (run / "samples.jsonl").write_bytes(b"".join(kept))
        assert train(*EVERY, "--resume") == 0
        rows = samples_of(run)
        if kept:
            assert (run / "samples.jsonl").read_bytes() == whole
        else:  # the base model as it came, and the trained one
            assert [row["update"] for row in rows] == [0, 0, 0, 4, 4, 4]
            assert rows == [row for row in map(json.loads, lines) if row["update"] != 2]


def test_samples_change_no_weight(train, run, tmp_path, whole_run, assert_same_weights):
    assert_same_weights(run / "model", whole_run() / "model")


@pytest.mark.parametrize(
    "line", ["[]", '{"update": 1}', '{"update": true, "index": 0}', '{"update": 0, "index": 0}\n' * 2, "{", "\0"]
)
def test_a_file_that_holds_something_else_is_refused(train, run, capsys, line):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "samples.jsonl"}
    (run / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit) as stopped:
        train(*EVERY, "--resume")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "samples.jsonl" in error
    assert error.count("\n") == 1
    assert all(path.read_bytes() == content for path, content in before.items())


def test_rows_in_another_order_are_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"update": 2, "index": 0}\n{"update": 1, "index": 0}\n')
    with pytest.raises(ValueError, match="line 2 is no sample"):
        read_samples(tmp_path)


def test_a_task_that_cannot_be_sampled_ends_no_run(train, tmp_path, monkeypatch, capsys, metrics_of):
    problems = Sudoku.problems

    def not_three(self, split, count, seed):
        if count == 3:
            raise RuntimeError("three are too many")
        return problems(self, split, count, seed)

    monkeypatch.setattr(Sudoku, "problems", not_three)
    assert train(*EVERY) == 0
    assert "no samples are written any more: RuntimeError: three are too many" in capsys.readouterr().out
    assert samples_of(tmp_path / "run") == []
    assert len(metrics_of(tmp_path / "run")) == 4
