"""Tasks: problems with prompts and rewards, found by name; some generate their problems, all read published ones."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from .countdown import Countdown, CountdownProblem
from .gsm8k import GSM8K, GSM8KProblem
from .math import Math500, MathProblem
from .medley import Medley, MedleyProblem
from .published import Protocol, PublishedTask
from .sudoku import Sudoku, SudokuProblem
from .task import CompactTask, Grade, Split, Task

_TASKS: dict[str, type[Task]] = {task.name: task for task in (Countdown, Sudoku, Medley, GSM8K, Math500)}

__all__ = [
    "GSM8K",
    "CompactTask",
    "Countdown",
    "CountdownProblem",
    "GSM8KProblem",
    "Grade",
    "Math500",
    "MathProblem",
    "Medley",
    "MedleyProblem",
    "Protocol",
    "PublishedTask",
    "Split",
    "Sudoku",
    "SudokuProblem",
    "Task",
    "get_task",
    "task_names",
]


def task_names() -> list[str]:
    """Names that `get_task` accepts, sorted."""
    return sorted(_TASKS)


def get_task(name: str, **options: Any) -> Task:
    """The task called `name`, constructed with `options`: format, protocol, data. ValueError if there is no such task or option."""
    if name not in _TASKS:
        nearest = difflib.get_close_matches(str(name), _TASKS, n=3) or sorted(_TASKS)
        raise ValueError(f"unknown task {name!r}: did you mean {' or '.join(map(repr, nearest))}?")
    task = _TASKS[name]
    known = inspect.signature(PublishedTask if issubclass(task, PublishedTask) else task).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: task {name} has no such setting: leave it out")
    return task(**options)
