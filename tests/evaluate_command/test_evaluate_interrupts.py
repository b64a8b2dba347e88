"""Interrupting and resuming ``python -m diffpo.evaluate``: nothing that is decoded is lost, nothing is done twice."""

import errno
import json
import math
import os
import signal
import time

import pytest
import torch
from evaluate_runs import failing, items_in, summary_in, timeless

import diffpo
import diffpo.evaluation
from diffpo.decoding.generation import stream
from diffpo.evaluate import main
from diffpo.runs.item_log import ItemLog
from diffpo.tasks import GSM8K


def test_a_resumed_run_equals_one_that_was_not_interrupted(run, chat_flags, tmp_path, interrupted_after, monkeypatch):
    assert main([*chat_flags, "--name", "whole", "--runs", str(tmp_path)]) == 0
    with monkeypatch.context():
        interrupted_after(2)
        assert run(*chat_flags, "--batch-size", "1") == 0
    folder = tmp_path / "run"
    assert len(items_in(folder)) == 2
    assert (summary_in(folder)["done"], summary_in(folder)["problems"]) == (2, 5)
    kept = items_in(folder)
    with (folder / "items.jsonl").open("a") as file:
        file.write('{"index": 2, "comp')  # killed while it wrote
    calls = []

    def watched(model, prompts, *arguments, **options):
        calls.append(len(prompts))
        return stream(model, prompts, *arguments, **options)

    monkeypatch.setattr(diffpo.evaluation, "stream", watched)
    assert run(*chat_flags, "--resume", "--batch-size", "3") == 0
    assert calls == [3]
    assert items_in(folder)[:2] == kept
    assert timeless(items_in(folder)) == timeless(items_in(tmp_path / "whole"))
    names = ("accuracy", "nfe", "tokens", "tokens_per_forward", "mean_reward", "done")
    assert [summary_in(folder)[n] for n in names] == [summary_in(tmp_path / "whole")[n] for n in names]
    assert run(*chat_flags, "--resume") == 0  # nothing is left to do
    assert calls == [3]


def test_an_interrupt_while_rows_are_graded_waits_for_their_lines(run, chat_flags, tmp_path, monkeypatch):
    grade = GSM8K.grade_many

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return grade(*arguments)

    monkeypatch.setattr(GSM8K, "grade_many", interrupted)
    assert run(*chat_flags, "--batch-size", "2") == 0
    assert len(items_in(tmp_path / "run")) == 2
    assert summary_in(tmp_path / "run")["done"] == 2


def test_an_interrupt_of_the_network_grades_what_is_decoded(run, chat_flags, tmp_path, interrupted_after):
    """All five rows are of one chunk, three of them had finished."""
    interrupted_after(3)
    assert run(*chat_flags) == 0
    assert [item["index"] for item in items_in(tmp_path / "run")] == [0, 1, 2]
    assert all(item["reward"] is not None for item in items_in(tmp_path / "run"))


def test_an_interrupt_while_rows_are_graded_grades_those_of_the_same_step(run, chat_flags, tmp_path, monkeypatch):
    """All five end in the last step and are graded one by one."""
    grade, calls = GSM8K.grade_many, []

    def interrupted(*arguments):
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return grade(*arguments)

    monkeypatch.setattr(GSM8K, "grade_many", interrupted)
    monkeypatch.setattr(diffpo.evaluation, "GRADED_TOGETHER", 1)
    assert run(*chat_flags) == 0
    assert (len(calls), summary_in(tmp_path / "run")["done"]) == (5, 5)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4])])
def test_a_batch_is_on_disk_before_the_next_row_is_decoded(
    run, chat_flags, tmp_path, monkeypatch, batch_size, expected
):
    on_disk = []

    def watched(*arguments, **options):
        for row in stream(*arguments, **options):
            on_disk.append(len(items_in(tmp_path / "run")))
            yield row

    monkeypatch.setattr(diffpo.evaluation, "stream", watched)
    assert run(*chat_flags, "--batch-size", batch_size) == 0
    assert on_disk == expected


@pytest.mark.parametrize(
    "fault", [FloatingPointError("logits are NaN"), torch.OutOfMemoryError("a single row does not fit")]
)
def test_a_fault_stops_with_what_was_done(run, chat_flags, tmp_path, monkeypatch, capsys, fault):
    def broken(*arguments, **options):
        rows = stream(*arguments, **options)
        yield next(rows)
        raise fault

    monkeypatch.setattr(diffpo.evaluation, "stream", broken)
    assert run(*chat_flags) == 1
    assert f"1 of 5 problems: {fault}" in capsys.readouterr().err
    assert len(items_in(tmp_path / "run")) == 1
    assert summary_in(tmp_path / "run")["done"] == 1


@pytest.mark.parametrize(
    "row",
    [
        {"index": 9}, {"index": -1}, {"index": True}, {"index": "0"}, {"nfe": None}, {"tokens": "3"}, {"seconds": [1]},
        {"correct": "yes"}, {"reward": "1"}, {"reward": {}},
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_counted_is_refused(run, chat_flags, tmp_path, capsys, row):
    assert run(*chat_flags, "--limit", "1") == 0
    capsys.readouterr()
    (item,) = items_in(tmp_path / "run")
    (tmp_path / "run/items.jsonl").write_text(json.dumps(item | row) + "\n")
    assert "is no evaluated problem" in failing(run, capsys, *chat_flags, "--limit", "1", "--resume")


@pytest.mark.parametrize("reward", [None, math.nan, math.inf, 1e39])
def test_a_reward_that_is_no_number_is_null(run, chat_flags, tmp_path, monkeypatch, reward):
    monkeypatch.setattr(GSM8K, "grade", lambda self, problem, text: diffpo.Grade(reward, False))
    assert run(*chat_flags, "--limit", "2") == 0
    assert [item["reward"] for item in items_in(tmp_path / "run")] == [None, None]
    assert summary_in(tmp_path / "run")["mean_reward"] is None


@pytest.mark.parametrize(
    "grade", [diffpo.Grade("1", True), diffpo.Grade(torch.ones(2), True), diffpo.Grade(1.0, "x"), 1.0, None]
)
def test_a_grade_of_a_wrong_type_ends_the_run_in_one_line(run, chat_flags, tmp_path, monkeypatch, capsys, grade):
    with monkeypatch.context() as patch:
        patch.setattr(GSM8K, "grade", lambda self, problem, text: grade)
        assert run(*chat_flags, "--limit", "2") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "task gsm8k" in error
    assert run(*chat_flags, "--limit", "2", "--resume") == 0


def test_a_full_disk_while_rows_are_written(run, chat_flags, tmp_path, monkeypatch, capsys):
    write, full = ItemLog.write, OSError(errno.ENOSPC, "No space left on device")

    def limited(self, item):
        if len(self.items) == 2:
            raise full
        write(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(ItemLog, "write", limited)
        assert run(*chat_flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "after 2 of 5 problems" in error
    assert "No space left" in error
    assert len(items_in(tmp_path / "run")) == 2
    assert run(*chat_flags, "--resume") == 0
    assert summary_in(tmp_path / "run")["done"] == 5


@pytest.mark.parametrize("name", [".diffpo-run", "config.json", "summary.json"])
def test_a_full_disk_at_the_start_and_at_the_end(run, chat_flags, tmp_path, monkeypatch, capsys, name):
    rename = os.replace

    def full(source, target):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert run(*chat_flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left" in error
    begun = name == "summary.json"
    assert run(*chat_flags, *(["--resume"] if begun else [])) == 0
    assert summary_in(tmp_path / "run")["done"] == 5


def test_what_is_written_is_valid_json_whatever_the_numbers(run, tmp_path):
    assert run("--rule", "eb", "--gamma", "inf", "--limit", "1") == 0
    for path in (tmp_path / "run").rglob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=pytest.fail)
