"""Rewards of any type: a number is taken, none is dropped and counted, anything else ends the run in one line that names the task."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import diffpo
from diffpo.tasks import Grade, Sudoku
from diffpo.tasks.grading import TaskError, graded, graded_together


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


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), FileNotFoundError("gcc"), MemoryError(), torch.OutOfMemoryError("CUDA")]
)  # fmt: skip
def test_a_fault_of_the_machine_says_nothing_about_the_text(monkeypatch, fault):
    def grade(problem, text):
        raise fault

    task = Sudoku()
    monkeypatch.setattr(task, "grade", grade)
    with pytest.raises(type(fault)):
        graded(task, None, "")
    with pytest.raises(type(fault)):
        graded_together(task, [None], [""])
    monkeypatch.setattr(task, "grade_many", lambda problems, texts: grade(problems, texts))
    with pytest.raises(type(fault)):
        graded_together(task, [None], [""])


# `diffpo.grade` has the same checks

ROW = {"Puzzle": "0302201030204030", "Solution": "1342241331244231"}


@pytest.mark.parametrize("reward", [1, np.float16(1), torch.tensor(1.0), Fraction(1)])
def test_grade_gives_plain_values(reward):
    grade = diffpo.grade(Said(Grade(reward, np.bool_(True))), ROW, "")
    assert grade == Grade(1.0, True)
    assert (type(grade.reward), type(grade.correct)) == (float, bool)


@pytest.mark.parametrize("reward", [math.nan, -math.inf, 10**400])
def test_grade_has_no_reward_that_is_not_finite(reward):
    assert diffpo.grade(Said(Grade(reward, False)), ROW, "") == Grade(None, False)


@pytest.mark.parametrize("said", ["right", None, Grade("1", True), Grade(1.0, "yes")])
def test_grade_names_the_task_that_gives_no_grade(said):
    with pytest.raises(TaskError, match="task sudoku: "):
        diffpo.grade(Said(said), ROW, "")


def test_grade_of_a_task_that_raises_is_undecided(monkeypatch):
    task = Sudoku()
    monkeypatch.setattr(task, "grade", lambda problem, text: {}["reward"])
    with pytest.warns(UserWarning, match="task sudoku raised KeyError"):
        assert diffpo.grade(task, ROW, "") == Grade(None, None)
    assert diffpo.grade(task, ROW, None) == Grade(None, None)
