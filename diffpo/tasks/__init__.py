"""Tasks: generated problems with prompts, solutions and rewards, found by name."""

from __future__ import annotations

import difflib
from typing import Any

from .countdown import Countdown, CountdownProblem
from .countdown4 import Countdown4
from .sudoku import Sudoku, SudokuProblem
from .task import Split, Task

_TASKS: dict[str, type[Task]] = {task.name: task for task in (Countdown, Countdown4, Sudoku)}

__all__ = [
    "Countdown",
    "Countdown4",
    "CountdownProblem",
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
    """The task called `name`, constructed with `options`. ValueError if there is no such task."""
    if name not in _TASKS:
        nearest = difflib.get_close_matches(str(name), _TASKS, n=3) or task_names()
        raise ValueError(f"unknown task {name!r}: did you mean {' or '.join(map(repr, nearest))}?")
    return _TASKS[name](**options)
