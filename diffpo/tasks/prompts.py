"""Problems as token ids: the compact line of a tiny model, or a chat with the assistant's turn already begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffpo.models.chat_template import ChatTemplateError, render_chats
from diffpo.models.special_tokens import encode_text

from .task import ChatTask, Task


def compact_prompts(tokenizer, task: ChatTask, problems: Sequence) -> list[Tensor]:
    """The compact prompt of every problem, int64 [P_i] each, by a tokenizer that knows the task's words.

    ValueError for a task or a problem without a compact form.
    """
    if not isinstance(task, Task):
        raise ValueError(f"task {task.name} has no compact format: use --format chat")
    return _each(lambda problem: torch.tensor(encode_text(tokenizer, task.prompt(problem))), problems)


def chat_prompts(tokenizer, task: ChatTask, problems: Sequence) -> list[Tensor]:
    """The chat of every problem in the tokenizer's template, then the tokens of the task's prefill, int64 [P_i] each.

    ValueError for a tokenizer without a chat template, or with one that cannot render a problem.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(
            "the model's tokenizer has no chat template: use --format compact, or a model that is tuned for chat"
        )
    try:
        turns = render_chats(tokenizer, [task.chat(problem) for problem in problems])
    except ChatTemplateError as error:
        raise ValueError(f"problem {error.index}: {error.reason}") from error
    prefill = encode_text(tokenizer, task.prefill, add_special_tokens=False)
    return _each(lambda turn: torch.tensor([*encode_text(tokenizer, turn, add_special_tokens=False), *prefill]), turns)


def check_no_mask(prompts: Sequence[Tensor], mask_id: int) -> None:
    """ValueError for the first prompt that holds the mask token, which only completions may hold."""
    for index, prompt in enumerate(prompts):
        if (prompt == mask_id).any():
            raise ValueError(
                f"problem {index} (row {index + 1}) contains the mask token (id {mask_id}), which only completions may hold"
            )


def read_instruction(path: str | Path) -> str:
    """The format instruction in a UTF-8 file, without a byte order mark and line ends after it.

    ValueError if there is no such file, or it is empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"instruction: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"instruction: {path} is not UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"instruction: {path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"instruction: {path} is empty")
    return text


def _each(function: Callable, items: Sequence) -> list:
    results = []
    for index, item in enumerate(items):
        try:
            results.append(function(item))
        except ValueError as error:
            raise ValueError(f"problem {index}: {error}") from error
    return results
