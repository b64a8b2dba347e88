"""`diffpo.grade`: what a text is worth, by the same code that evaluation and training use."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from . import get_chat_task
from .task import ChatTask, Grade, Protocol

_task = functools.cache(get_chat_task)  # a task may own worker processes


def grade(task: str | ChatTask, row: Mapping[str, Any], text: str, protocol: Protocol = "strict") -> Grade:
    """Grade a text that answers one row of published data.

    task: name ("gsm8k", "math500", "countdown", "sudoku") or a task, whose own protocol then holds; row: as published; text: the
    assistant's turn with the prefill. protocol: "strict", what is mathematically right, or "d1", what d1's own scripts say.
    Never raises and never hangs for any text; one that is no str is undecided, Grade(None, None). ValueError for an unknown task or
    protocol, or a row that is not the task's.
    """
    if not isinstance(task, str | ChatTask):
        raise ValueError(f"task must be a name or a task, got {type(task).__name__}")
    task = _task(task, protocol) if isinstance(task, str) else task
    problem = task.problem_from_row(_checked(task, row))
    return task.grade(problem, text) if isinstance(text, str) else Grade(None, None)


def _checked(task: ChatTask, row: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"row must be an object with columns, got {type(row).__name__}")
    missing = [column for column in task.columns if row.get(column) is None]
    if missing:
        raise ValueError(
            f"row has no {', '.join(missing)}: task {task.name} needs the columns {', '.join(task.columns)}"
        )
    return row
