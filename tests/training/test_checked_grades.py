"""Rewards of any type: a number is taken, none is dropped and counted, anything else ends the run in one line that names the task."""

import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from diffpo.tasks import Grade, Sudoku
from diffpo.training.grading import TaskError, graded


class Said(Sudoku):
    def __init__(self, grade):
        super().__init__()
        self.said = grade

    def grade(self, problem, text):
        return self.said


def said(reward, correct=True) -> Grade:
    return graded(Said(Grade(reward, correct)), None, "")


@pytest.mark.parametrize(
    "reward",
    [1, 1.0, True, np.float32(1), np.float16(1), np.int64(1), np.bool_(True), np.array(1.0), Fraction(1),
     torch.tensor(1.0), torch.tensor(1), torch.tensor(True), torch.tensor(1.0, requires_grad=True), torch.tensor(1.0).bfloat16()],
)  # fmt: skip
def test_numbers_of_every_kind(reward):
    assert said(reward) == Grade(1.0, True)
    assert type(said(reward).reward) is float


@pytest.mark.parametrize(
    "reward", [None, math.nan, math.inf, -math.inf, 1e39, -1e300, 10**400, np.float32("nan"), torch.tensor(math.inf)]
)
def test_what_is_no_finite_number_is_none(reward):
    assert said(reward) == Grade(None, True)


@pytest.mark.parametrize(
    "reward", ["1.0", "", b"1", [1.0], (1.0,), {}, 1j, torch.tensor([1.0, 2.0]), np.array([1.0]), torch.tensor(1j), Decimal(1), object()]
)  # fmt: skip
def test_a_wrong_type_names_the_task(reward):
    with pytest.raises(TaskError, match="task sudoku: a reward must be a number or None, got"):
        said(reward)


@pytest.mark.parametrize("correct", [True, False, None, np.bool_(True), torch.tensor(False)])
def test_verdicts(correct):
    assert said(0.5, correct).correct is (None if correct is None else bool(correct))


@pytest.mark.parametrize("correct", ["yes", 1.0, [], torch.tensor([True, True])])
def test_a_verdict_of_a_wrong_type_names_the_task(correct):
    with pytest.raises(TaskError, match="task sudoku: correct must be True, False or None"):
        said(0.5, correct)


@pytest.mark.parametrize("grade", [0.5, None, (0.5, True), {"reward": 1.0}])
def test_something_else_than_a_grade_names_the_task(grade):
    with pytest.raises(TaskError, match=r"task sudoku: grade must return a diffpo\.Grade"):
        graded(Said(grade), None, "")


def test_a_task_that_raises_has_not_decided(monkeypatch):
    task = Sudoku()
    monkeypatch.setattr(task, "grade", lambda problem, text: 1 / 0)
    with pytest.warns(UserWarning, match="task sudoku raised ZeroDivisionError"):
        assert graded(task, None, "") == Grade(None, None)


@pytest.mark.parametrize("reward", [None, math.nan, math.inf])
def test_a_run_without_any_reward_goes_on(train, monkeypatch, metrics_of, tmp_path, reward):
    monkeypatch.setattr(Sudoku, "grade", lambda self, problem, text: Grade(reward, None))
    assert train("--updates", "2") == 0
    lines = metrics_of(tmp_path / "run")
    assert [line["dropped_rewards"] for line in lines] == [16, 16]
    assert [line["reward"] for line in lines] == [None, None]
    for name in ("metrics.jsonl", "summary.json", "base.json", "config.json"):
        for line in (tmp_path / "run" / name).read_text().split("\n}\n"):
            assert "NaN" not in line
            assert "Infinity" not in line


def test_some_rewards_of_a_wrong_type_end_the_run_in_one_line(train, monkeypatch, tmp_path, capsys):
    grade, calls = Sudoku.grade, 0

    def late(self, problem, text):
        nonlocal calls
        calls += 1
        return grade(self, problem, text) if calls < 50 else Grade("0.5", False)

    with monkeypatch.context() as patch:
        patch.setattr(Sudoku, "grade", late)
        assert train() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "task sudoku: a reward must be a number or None, got str '0.5'" in error
    assert train("--resume") == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["heldout"] == 8
