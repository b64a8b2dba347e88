"""The guard in a run: what it says and when, and that no run fails, or learns anything else, because of it."""

import json
import signal

import pytest

import diffpo
import diffpo.training.guard
from diffpo.decoding.rules import EntropyBounded, PromptThreshold
from diffpo.evaluation import evaluate, fixed_problems
from diffpo.tasks import Grade, Sudoku, get_task
from diffpo.tasks.task import NoSplitError
from diffpo.training.trainer import Trainer

WATCHED = ("--guard.every", "1", "--guard.problems", "100", "--heldout", "100", "--no-sweep")
SHORT = ("--updates", "1", "--heldout", "4", "--algorithm.prompts-per-update", "1")


@pytest.fixture
def ruin(monkeypatch):
    """ruin({update: kind}): after these updates all problems are solved but those of the kind; before the first, all."""

    def patch(updates: dict[int, str]) -> None:
        done, step, grade = [0], Trainer.step, Sudoku.grade

        def counted(self):
            metrics = step(self)
            done[0] = self.update
            return metrics

        def graded(self, problem, text):
            kind = updates.get(max((update for update in updates if update <= done[0]), default=0))
            return Grade(grade(self, problem, text).reward, self.kind(problem) != kind)

        monkeypatch.setattr(Trainer, "step", counted)
        monkeypatch.setattr(Sudoku, "grade", graded)

    return patch


def summary_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_lost_kind_is_said_once_and_at_once_and_in_the_report(train, ruin, metrics_of, tmp_path, capsys):
    ruin({2: "8 clues"})
    assert train(*WATCHED, "--rollout.threshold-gammas", "0.5", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert len(warnings) == 2
    assert warnings[0].startswith("WARNING after update 2, 8 clues: 0% of ")
    assert lines.index(warnings[0]) < next(i for i, line in enumerate(lines) if "trained model on" in line)
    assert " nats, the base model solves 100%. Try --rollout.speed-exponent 0.25" in warnings[0]
    assert lines[-1] == warnings[1]
    assert warnings[1].startswith("WARNING at the end, 8 clues: 0% of ")
    assert "LOST" in next(line for line in lines if "8 clues" in line and "│" in line)
    metrics = metrics_of(tmp_path / "run")
    assert [line["watched/8 clues"] for line in metrics] == [1, 0, 0, 0]
    assert [line["watched/4 clues"] for line in metrics] == [1, 1, 1, 1]
    assert all(0.7 < line["watched/sudoku"] < 0.9 for line in metrics[1:])
    summary = summary_of(tmp_path / "run")
    (lost,) = summary["lost"]
    assert (lost["kind"], lost["base"], lost["now"]) == ("8 clues", 1.0, 0.0)
    assert summary["kinds"]["8 clues"]["base_careful"] == 1
    assert summary["kinds"]["8 clues"]["careful"] == summary["kinds"]["8 clues"]["accuracy"] == 0
    assert lost["problems"] == summary["kinds"]["8 clues"]["problems"]


def test_a_kind_that_recovers_is_told_again_when_it_is_lost_again(train, ruin, tmp_path, capsys):
    ruin({1: "8 clues", 2: "", 3: "8 clues", 4: ""})
    assert train(*WATCHED) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines if "WARNING" in line] == [
        "WARNING after update 1",
        "WARNING after update 3",
    ]
    assert summary_of(tmp_path / "run")["lost"] == []


def test_what_is_lost_between_checks_is_in_the_report(train, ruin, tmp_path, capsys):
    ruin({4: "6 clues"})
    assert train(*WATCHED, "--guard.every", "3") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("WARNING at the end, 6 clues")
    assert [lost["kind"] for lost in summary_of(tmp_path / "run")["lost"]] == ["6 clues"]


@pytest.mark.parametrize("every", ["0", "5"])
def test_without_checks_the_report_still_says_what_is_lost(train, ruin, metrics_of, tmp_path, capsys, every):
    ruin({1: "8 clues"})
    assert train(*WATCHED, "--guard.every", every) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("WARNING at the end, 8 clues")
    assert output.count("WARNING") == 1
    assert not [name for line in metrics_of(tmp_path / "run") for name in line if name.startswith("watched")]


def test_a_run_that_loses_nothing_warns_of_nothing(whole_run, metrics_of):
    assert summary_of(whole_run(*WATCHED))["lost"] == []


def test_watching_changes_nothing_but_the_log(whole_run, metrics_of, assert_same_weights):
    watched, alone = whole_run(*WATCHED), whole_run(*WATCHED, "--guard.every", "0")
    lines = [{k: v for k, v in line.items() if "watched" not in k} for line in metrics_of(watched)]
    assert lines == metrics_of(alone)
    assert_same_weights(watched / "model", alone / "model")


def test_the_careful_bound_is_in_the_summary(whole_run):
    run = whole_run(*WATCHED, "--rollout.threshold-gammas", "4", "0.5")
    summary, task = summary_of(run), get_task("sudoku")
    problems = fixed_problems(task, 100)
    rule = EntropyBounded(0.5, "confidence")
    again = evaluate(diffpo.load(run / "model"), task, problems, rule)
    assert summary["careful"]["rule"] == repr(rule)
    assert summary["careful"]["trained"] == {"accuracy": again.accuracy, "nfe": again.nfe}
    assert set(summary["careful"]["base"]) == {"accuracy", "nfe"}
    assert set(summary["kinds"]) == {"sudoku", *(f"{clues} clues" for clues in range(4, 9))}
    assert sum(summary["kinds"][f"{clues} clues"]["problems"] for clues in range(4, 9)) == 100
    own = evaluate(diffpo.load(run / "model"), task, problems, PromptThreshold())
    for kind in own.kinds:
        of = summary["kinds"][kind]
        assert of["careful"] == again.kinds[kind]["accuracy"]
        assert {name: of[name] for name in ("accuracy", "nfe", "gamma")} == {
            name: own.kinds[kind][name] for name in ("accuracy", "nfe", "gamma")
        }


def test_at_the_end_careful_is_what_the_base_solves_most_by(train, tmp_path):
    """A smallest bin of 50 nats commits everything at once: what was lost would not show against it."""
    flags = ("--model", "tiny-sudoku", "--updates", "1", "--heldout", "60", "--rollout.threshold-gammas", "50", "60")
    assert train(*flags) == 0
    summary = summary_of(tmp_path / "run")
    base = {e["rule"]: e["accuracy"] for e in summary["sweep"]["base"]}
    smallest, single = base["EntropyBounded(gamma=50, order=confidence)"], base["FixedSchedule(steps=16)"]
    assert single > smallest
    assert summary["careful"]["rule"] == "FixedSchedule(steps=16)"
    assert summary["careful"]["base"]["accuracy"] == single


def test_without_a_threshold_the_runs_rule_is_the_careful_one(whole_run):
    summary = summary_of(whole_run(*WATCHED, "--algorithm.train", "model", "--rollout.gamma", "0.7"))
    assert summary["careful"]["rule"] == "EntropyBounded(gamma=0.7, order=confidence)"
    assert summary["careful"]["trained"] == {name: summary["trained"][name] for name in ("accuracy", "nfe")}
    assert [point["rule"].partition("(")[0] for point in summary["sweep"]["base"]] == [
        "FixedSchedule",
        "EntropyBounded",
    ]


# A run that goes on


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(k): Ctrl-C arrives during update k, once."""

    def arm(update: int) -> None:
        step = Trainer.step

        def interrupted(self):
            metrics = step(self)
            if self.update == update:
                monkeypatch.setattr(Trainer, "step", step)
                signal.raise_signal(signal.SIGINT)
            return metrics

        monkeypatch.setattr(Trainer, "step", interrupted)

    return arm


@pytest.mark.parametrize("kept", [True, False], ids=["base kept", "base lost"])
def test_a_resumed_run_goes_on_with_what_was_lost(
    train, ruin, stop_after, metrics_of, tmp_path, capsys, monkeypatch, kept
):
    ruin({2: "8 clues"})
    stop_after(3)
    assert train(*WATCHED, "--guard.every", "2") == 0
    assert capsys.readouterr().out.count("WARNING after update 2, 8 clues") == 1
    ruin({2: "8 clues"})  # counts from the beginning again
    run, asked = tmp_path / "run", []
    base = json.loads((run / "base.json").read_text())
    if not kept:
        (run / "base.json").unlink()
    monkeypatch.setattr(
        diffpo.training.guard,
        "evaluate",
        lambda model, task, problems, rule, *more: (
            asked.append(repr(rule)) or evaluate(model, task, problems, rule, *more[:2])
        ),
    )
    assert train(*WATCHED, "--guard.every", "2", "--resume") == 0
    output = capsys.readouterr().out
    assert "WARNING after update" not in output  # told before
    assert output.splitlines()[-1].startswith("WARNING at the end, 8 clues")
    assert [rule.partition("(")[0] for rule in asked] == ["EntropyBounded"] * (not kept) + ["PromptThreshold"]
    again = json.loads((run / "base.json").read_text())
    timed = {"tokens_per_second", "decoding_seconds"}
    before, after = ({k: v for k, v in each["watched"].items() if k not in timed} for each in (base, again))
    assert before == after
    ruin({2: "8 clues"})
    assert train(*WATCHED, "--guard.every", "2", "--name", "whole") == 0
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    timeless = [
        {name: summary_of(folder)[name] for name in ("lost", "kinds", "careful")}
        for folder in (run, tmp_path / "whole")
    ]
    assert timeless[0] == timeless[1]


# Tasks that cannot be watched


def raising(error):
    def problems(self, split, count, seed, of=Sudoku.problems):
        if split == "validation":
            raise error
        return of(self, split, count, seed)

    return problems


@pytest.mark.parametrize(
    "error", [NoSplitError("task sudoku has no validation split"), KeyError("validation"), OSError("no network")],
    ids=["no split", "key error", "no network"],
)  # fmt: skip
def test_a_task_without_validation_problems_is_trained_all_the_same(
    train, monkeypatch, metrics_of, tmp_path, capsys, error
):
    monkeypatch.setattr(Sudoku, "problems", raising(error))
    assert train(*WATCHED) == 0
    output = capsys.readouterr().out
    assert output.count("no kind of problem is watched while training: ") == 1
    assert str(error) in output
    assert not [name for line in metrics_of(tmp_path / "run") for name in line if name.startswith("watched")]
    assert summary_of(tmp_path / "run")["careful"]["trained"]["nfe"] > 0


def test_validation_problems_that_do_not_fit_are_not_asked(train, monkeypatch, tmp_path, capsys):
    """Too long for a part, and then for the context; one that the task cannot ask, at last."""
    prompt, watched = Sudoku.prompt, set(get_task("sudoku").problems("validation", 100, 0))
    for more, message in ((" 1", "tokens_at_once must be at least 33"), (" 1" * 300, "too long"), (None, "TypeError")):
        monkeypatch.setattr(
            Sudoku, "prompt", lambda self, p, more=more: prompt(self, p) + (more if p in watched else "")
        )
        assert train(*WATCHED, *SHORT, "--update.tokens-at-once", "32", "--overwrite") == 0
        output = capsys.readouterr().out
        assert output.count("no kind of problem is watched while training: ") == 1
        assert message in output


def test_wrong_grades_of_validation_problems_end_the_watching_alone(train, monkeypatch, metrics_of, tmp_path, capsys):
    grade, watched = Sudoku.grade, set(get_task("sudoku").problems("validation", 100, 0))
    done = [0]
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: done.__setitem__(0, self.update + 1) or step(self))
    monkeypatch.setattr(
        Sudoku, "grade", lambda self, p, text: "right" if p in watched and done[0] >= 2 else grade(self, p, text)
    )
    assert train(*WATCHED) == 0
    assert capsys.readouterr().out.count("no kind of problem is watched while training: ") == 1
    assert ["watched/sudoku" in line for line in metrics_of(tmp_path / "run")] == [True, False, False, False]


KINDS = {
    "a number": lambda self, problem: problem.puzzle.count("0"),
    "brackets": lambda self, problem: f"[/red] [{problem.puzzle.count('0')}]",
    "raising": lambda self, problem: [][0],
    "one": lambda self, problem: "the only one",
}


@pytest.mark.filterwarnings("ignore:task sudoku raised IndexError on the kind")
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_any_sort(train, monkeypatch, metrics_of, tmp_path, capsys, name):
    monkeypatch.setattr(Sudoku, "kind", KINDS[name])
    monkeypatch.setattr(Sudoku, "grade", lambda self, problem, text: Grade(0.5, True))
    assert train(*WATCHED, *SHORT, "--heldout", "50") == 0
    (line,) = metrics_of(tmp_path / "run")
    several = {"a number": "watched/8", "brackets": "watched/[/red] [8]"}
    assert line["watched/sudoku"] == 1
    assert line.get(several.get(name, "watched/sudoku")) == 1
    kinds = summary_of(tmp_path / "run")["kinds"]
    assert len(kinds) == (6 if name in several else 1)
    if name == "brackets":
        assert "[/red] [8]" in capsys.readouterr().out


def test_the_parts_of_an_update_bound_what_is_watched(train, monkeypatch):
    """Also where its prompts are longer than the held-out ones."""
    rows, prompt = [], Sudoku.prompt
    watched = set(get_task("sudoku").problems("validation", 6, 0))
    monkeypatch.setattr(Sudoku, "prompt", lambda self, p: prompt(self, p) + (" 1" * 8 if p in watched else ""))

    def noted(model, task, problems, rule, lengths, batch, world):
        rows.append(batch)
        return evaluate(model, task, problems, rule, lengths, batch)

    monkeypatch.setattr(diffpo.training.guard, "evaluate", noted)
    assert train(*WATCHED, *SHORT, "--guard.problems", "6", "--update.tokens-at-once", "100") == 0
    assert rows == [2, 2]  # 24 tokens of prompt, 16 of completion


def test_a_lost_kind_is_written_as_it_is_called(train, ruin, monkeypatch, capsys):
    monkeypatch.setattr(Sudoku, "kind", KINDS["brackets"])
    ruin({1: "[/red] [8]"})
    assert train(*WATCHED, *SHORT, "--heldout", "100") == 0
    output = capsys.readouterr().out
    assert "WARNING after update 1, [/red] [8]: 0% of" in output
    assert "WARNING at the end, [/red] [8]: 0% of" in output
