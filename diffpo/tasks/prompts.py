"""Problems as a model is asked them, and their token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from diffpo.models.chat_template import ChatTemplateError, render_chats
from diffpo.models.special_tokens import encode_text
from diffpo.models.transformer import MaskedDiffusionLM

from .published import PublishedTask
from .task import CompactTask, Format, Task, is_compact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TaskT = TypeVar("TaskT", bound=Task)
Given = TypeVar("Given")
Result = TypeVar("Result")


def suited(task: TaskT, model: MaskedDiffusionLM, format: Format | Literal["auto"] = "auto") -> TaskT:
    """The task as this model can be asked. auto: as chat if its tokenizer has a chat template or the task has no compact form.

    ValueError unless the tokenizer knows every word of a compact task, and has a template for a published one that is asked as chat.
    """
    has_template = model.tokenizer is not None and model.tokenizer.chat_template is not None
    if isinstance(task, PublishedTask):
        natural: Format = "chat" if has_template or "compact" not in task.formats else "compact"
        task = task.asked(natural if format == "auto" else format)
        if task.format == "chat" and not has_template:
            raise ValueError(
                "the model's tokenizer has no chat template: use --format compact, or a model that is tuned for chat"
            )
    if is_compact(task):
        check_vocabulary(model, task)
    return task


def check_vocabulary(model: MaskedDiffusionLM, task: CompactTask) -> None:
    """ValueError unless the model's tokenizer knows every word of the task's compact format."""
    known = model.tokenizer.get_vocab() if model.tokenizer is not None else {}
    missing = [word for word in task.vocabulary if word not in known]
    if missing:
        raise ValueError(
            f"task: the model's tokenizer does not know words of task {task.name}: {' '.join(missing[:8])}; give a model that was "
            f"pretrained on it (python -m diffpo.pretrain --task {task.name} makes one), or another task"
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase | None, task: Task, problems: Sequence) -> list[Tensor]:
    """The prompt of every problem, int64 [P_i] each: a text by the tokenizer, a chat by its template, up to where the answer goes on.

    ValueError for a problem that cannot be asked, or a tokenizer that cannot read it.
    """
    prompts = _each(task.prompt, problems)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [prompt for prompt in prompts if isinstance(prompt, list)]
    if len(prompts) not in (len(texts), len(chats)):
        raise ValueError(f"task {task.name}: its prompts must all be texts or all be chats, lists of messages")
    if chats:
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template: use a model that is tuned for chat")
        try:
            texts = render_chats(tokenizer, chats)
        except ChatTemplateError as error:
            raise ValueError(f"problem {error.index}: {error.reason}") from error
    return _each(lambda text: torch.tensor(encode_text(tokenizer, text, add_special_tokens=not chats)), texts)


def check_context(prompts: Sequence[Tensor], gen_length: int, model: MaskedDiffusionLM) -> None:
    """ValueError if a prompt and its completion are longer than the model's context."""
    context = model.config.max_position_embeddings
    too_long = [i for i, prompt in enumerate(prompts) if len(prompt) + gen_length > context]
    if too_long:
        raise ValueError(
            f"{len(too_long)} prompts are too long, first: problem {too_long[0]} has {len(prompts[too_long[0]])} tokens, with "
            f"gen_length {gen_length} more than the model's context of {context}: choose a smaller --gen-length"
        )


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


def _each(function: Callable[[Given], Result], items: Sequence[Given]) -> list[Result]:
    results = []
    for index, item in enumerate(items):
        try:
            results.append(function(item))
        except ValueError as error:
            raise ValueError(f"problem {index}: {error}") from error
    return results
