"""Prompts as token ids: strings, chats or ids in, a row of ids for each out."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from diffpo.chats import as_messages
from diffpo.models.chat_template import ChatTemplateError, render_chats
from diffpo.models.special_tokens import encode_text
from diffpo.models.transformer import MaskedDiffusionLM

Given = TypeVar("Given")
Result = TypeVar("Result")
Prompts = Sequence[str | list[dict[str, str]]] | Sequence[Tensor] | Tensor  # all strings, all chats, or all token ids


class PromptError(ValueError):
    """What is wrong with one prompt: its ``index`` in the list and the ``reason``."""

    def __init__(self, index: int, reason: object):
        super().__init__(f"prompts[{index}]: {reason}")
        self.index, self.reason = index, str(reason)


class IdsError(ValueError):
    """The ``reason`` why a model cannot take token ids."""

    def __init__(self, reason: str):
        super().__init__(f"ids: {reason}")
        self.reason = reason


def encode_prompts(model: MaskedDiffusionLM, prompts: Prompts) -> list[Tensor]:
    """The token ids of each prompt, int64 [P_i] on the CPU."""
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() < 2):
        raise ValueError("prompts must be a list; wrap a single prompt in one: [prompt]")
    if not isinstance(prompts, Sequence | Tensor):
        raise ValueError(f"prompts must be a list, got {type(prompts).__name__}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one")
    return _each(as_ids, _token_ids(model, prompts))


def as_ids(value: object) -> Tensor:
    """Token ids, int64 1-d on the CPU. ValueError for anything else."""
    if isinstance(value, str | bytes):
        raise ValueError(
            f"must be token ids, got the text {value[:40]!r}: encode it, as model.tokenizer(text).input_ids"
        )
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"must be a 1-d integer tensor or a list of token ids, got {type(value).__name__}: {error}"
        ) from None
    if ids.dtype == torch.bool:
        raise ValueError("must be token ids, got a mask of bools: ids[mask] are those that it keeps")
    if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex())):
        raise ValueError(f"must be a 1-d integer tensor (token ids), got {ids.dtype} {list(ids.shape)}")
    return ids.long().cpu()


def _token_ids(model: MaskedDiffusionLM, prompts: Prompts) -> Sequence[Tensor | list[int]]:
    if len({type(prompt) for prompt in prompts}) > 1 or not isinstance(prompts[0], str | list | Tensor):
        raise ValueError("prompts must all be strings, all be chats or all be token-id tensors")
    tensors = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
    if tensors:
        return tensors
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give prompts as token-id tensors")
    strings = [prompt for prompt in prompts if isinstance(prompt, str)]
    if strings:
        return _each(lambda text: encode_text(model.tokenizer, text), strings)
    chats = _each(_as_chat, prompts)
    if model.tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template: give prompts as strings")
    try:
        texts = render_chats(model.tokenizer, chats)
    except ChatTemplateError as error:
        raise PromptError(error.index, error.reason) from error
    return _each(lambda text: encode_text(model.tokenizer, text, add_special_tokens=False), texts)


def _as_chat(prompt: object) -> list[dict[str, str]]:
    if isinstance(prompt, list) and any(isinstance(item, int | float) for item in prompt):
        raise ValueError("a list of numbers is no chat: give token ids as a tensor, torch.tensor(ids)")
    return as_messages(prompt)


def _each(function: Callable[[Given], Result], prompts: Iterable[Given]) -> list[Result]:
    results = []
    for index, prompt in enumerate(prompts):
        try:
            results.append(function(prompt))
        except ValueError as error:
            raise PromptError(index, error) from error
    return results
