"""What a text is worth: `diffpo.grade`, and the checked grades that evaluation and training use as well.

A task may be anybody's code, and a run must not end in the middle because of it.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

from . import get_task
from .data import whole_numbers
from .published import Protocol, PublishedTask
from .task import Grade, Task

_LARGEST = torch.finfo(torch.float32).max  # rollouts keep rewards in fp32
_MACHINE_FAULTS = (OSError, MemoryError, torch.OutOfMemoryError)  # say nothing about the text
_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</s>")  # what a careless decoding leaves in a text
_task = functools.cache(get_task)  # a task may own worker processes


class TaskError(RuntimeError):
    """A task gave something else than a grade, which no run can go on with."""


def grade(task: str | Task, row: Any, text: str, protocol: Protocol = "strict") -> Grade:
    """Grade a text that answers one row of published data, or a problem of a task that has no such data.

    task: name ("gsm8k", "math500", "countdown", "sudoku"), then text is of a chat; or a task, whose own format and protocol hold. row: as
    published, or the problem; text: the assistant's turn from its beginning. protocol: "strict", what is mathematically right, or "d1", what d1's own scripts say.
    With the tasks of diffpo it never raises and never hangs for any text; one that is no str is undecided, Grade(None, None). A task
    of your own is held to what `graded` says. ValueError for an unknown task or protocol, or a row that is not the task's.
    """
    if not isinstance(task, str | Task):
        raise ValueError(f"task must be a name or a task, got {type(task).__name__}")
    task = _task(task, format="chat", protocol=protocol) if isinstance(task, str) else task
    problem, strict = row, True
    if isinstance(task, PublishedTask):
        problem, strict = task.problem_from_row(_checked_row(task, row)), task.protocol == "strict"
    if not isinstance(text, str):
        return Grade(None, None)
    if strict:
        text = _SPECIAL.sub("", text)
    return graded(task, problem, text)


def graded(task: Task, problem: Any, text: str) -> Grade:
    """``task.grade``, ``checked``. A task that raises has not decided: None, None and a warning. Faults of the machine (OSError,
    MemoryError, torch.OutOfMemoryError) are raised."""
    try:
        grade = task.grade(problem, text)
    except _MACHINE_FAULTS:
        raise
    except Exception as error:
        warnings.warn(
            f"task {task.name} raised {type(error).__name__} on a text, which has no reward: {error}", stacklevel=2
        )
        return Grade(None, None)
    return checked(task, grade)


def graded_together(task: Task, problems: Sequence, texts: Sequence[str]) -> list[Grade]:
    """``task.grade_many``, each ``checked``; one by one where the task raises on some text of them, as ``graded`` says."""
    try:
        grades = task.grade_many(problems, texts)
    except _MACHINE_FAULTS:
        raise
    except Exception:
        return [graded(task, problem, text) for problem, text in zip(problems, texts, strict=True)]
    if len(grades) != len(texts):
        raise TaskError(
            f"task {task.name}: grade_many must return a grade for each of {len(texts)} texts, got {len(grades)}"
        )
    return [checked(task, grade) for grade in grades]


def checked(task: Task, grade: Any) -> Grade:
    """A task's grade as plain values. reward: a finite fp32 number, or None where there is none (None, NaN, infinite, beyond fp32).

    TaskError for anything of a wrong type.
    """
    if not isinstance(grade, Grade):
        raise TaskError(f"task {task.name}: grade must return a diffpo.Grade, got {_shown(grade)}")
    return Grade(_reward(task, grade.reward), _verdict(task, grade.correct))


def _reward(task: Task, value: Any) -> float | None:
    if value is None:
        return None
    value = _scalar(value)
    if not isinstance(value, Real):
        raise TaskError(f"task {task.name}: a reward must be a number or None, got {_shown(value)}")
    # false for NaN; compared as it is, because an integer can be beyond every float
    return float(value) if value <= _LARGEST and not value < -_LARGEST else None


def _verdict(task: Task, value: Any) -> bool | None:
    value = _scalar(value)
    if value is None or isinstance(value, bool):
        return value
    raise TaskError(f"task {task.name}: correct must be True, False or None, got {_shown(value)}")


def _scalar(value: Any) -> Any:
    """The Python value of a tensor or array without dimensions and of a numpy number; anything else as it is."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    return value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"


def _checked_row(task: PublishedTask, row: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"row must be an object with columns, got {type(row).__name__}")
    missing = [column for column in task.columns if row.get(column) is None]
    if missing:
        raise ValueError(
            f"row has no {', '.join(missing)}: task {task.name} needs the columns {', '.join(task.columns)}"
        )
    return whole_numbers(row)
