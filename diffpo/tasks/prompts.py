"""Problems as token ids: the compact line of a tiny model, or a chat with the assistant's turn already begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .task import ChatTask, Task


def compact_prompts(tokenizer, task: ChatTask, problems: Sequence) -> list[Tensor]:
    """The compact prompt of every problem, int64 [P_i] each, by a tokenizer that knows the task's words.

    ValueError for a task or a problem without a compact form.
    """
    if not isinstance(task, Task):
        raise ValueError(f"task {task.name} has no compact format: use --format chat")
    return [torch.tensor(ids) for ids in tokenizer([task.prompt(problem) for problem in problems])["input_ids"]]


def chat_prompts(tokenizer, task: ChatTask, problems: Sequence) -> list[Tensor]:
    """The chat of every problem in the tokenizer's template, then the tokens of the task's prefill, int64 [P_i] each.

    ValueError for a tokenizer without a chat template.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(
            "the model's tokenizer has no chat template: use --format compact, or a model that is tuned for chat"
        )
    chats = [task.chat(problem) for problem in problems]
    turns = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    prefill = tokenizer(task.prefill, add_special_tokens=False)["input_ids"]
    return [torch.tensor([*turn, *prefill]) for turn in turns]


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
