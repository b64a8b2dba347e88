"""`diffpo.grade`: what a text is worth, by the same code that evaluation and training use."""

from __future__ import annotations

import functools
from typing import Any

from . import get_chat_task
from .task import ChatTask, Grade, Protocol

_task = functools.cache(get_chat_task)  # a task may own worker processes


def grade(task: str | ChatTask, row: dict[str, Any], text: str, protocol: Protocol = "strict") -> Grade:
    """Grade a text that answers one row of published data.

    task: name ("gsm8k", "math500", "countdown", "sudoku") or a task, whose own protocol then holds; row: as published; text: the
    assistant's turn with the prefill. Never raises and never hangs for any text; ValueError for an unknown task or a row that is
    not the task's.
    """
    task = _task(task, protocol) if isinstance(task, str) else task
    return task.grade(task.problem_from_row(row), text)
