"""Tasks: problems with prompts and rewards, found by name; some generate their problems, all read published ones."""

from __future__ import annotations

import difflib
from typing import Any

from .countdown import Countdown, CountdownProblem
from .gsm8k import GSM8K, GSM8KProblem
from .math import Math500, MathProblem
from .sudoku import Sudoku, SudokuProblem
from .task import ChatTask, Grade, Protocol, Split, Task

_TASKS: dict[str, type[Task]] = {task.name: task for task in (Countdown, Sudoku)}
_CHAT_TASKS: dict[str, type[ChatTask]] = _TASKS | {task.name: task for task in (GSM8K, Math500)}

__all__ = [
    "GSM8K",
    "ChatTask",
    "Countdown",
    "CountdownProblem",
    "GSM8KProblem",
    "Grade",
    "Math500",
    "MathProblem",
    "Protocol",
    "Split",
    "Sudoku",
    "SudokuProblem",
    "Task",
    "chat_task_names",
    "get_chat_task",
    "get_task",
    "task_names",
]


def task_names() -> list[str]:
    """Names that `get_task` accepts, sorted."""
    return sorted(_TASKS)


def chat_task_names() -> list[str]:
    """Names that `get_chat_task` accepts, sorted."""
    return sorted(_CHAT_TASKS)


def get_task(name: str, **options: Any) -> Task:
    """The task called `name` that generates its problems, constructed with `options`. ValueError if there is no such task."""
    return _named(name, _TASKS)(**options)


def get_chat_task(name: str, protocol: Protocol = "strict") -> ChatTask:
    """The task called `name`, whether it generates its problems or reads them. ValueError if there is no such task or protocol."""
    return _named(name, _CHAT_TASKS)(protocol=protocol)


def _named(name: str, tasks: dict[str, Any]) -> Any:
    if name not in tasks:
        nearest = difflib.get_close_matches(str(name), tasks, n=3) or sorted(tasks)
        raise ValueError(f"unknown task {name!r}: did you mean {' or '.join(map(repr, nearest))}?")
    return tasks[name]
