"""Prompts as token ids: strings, chats or ids in, left-padded tensors out. What is wrong with a prompt is found here."""

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


def encode_prompts(model: MaskedDiffusionLM, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Left-padded prompt ids int64 [B, P] and their mask bool [B, P], on the model's device."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list; wrap a single prompt in one: [prompt]")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one")
    rows = [torch.as_tensor(row, dtype=torch.int64) for row in _token_ids(model, prompts)]
    P = max(len(row) for row in rows)
    pad_id = model.config.pad_token_id if model.config.pad_token_id is not None else 0
    prompt_ids = torch.full((len(rows), P), pad_id)
    prompt_mask = torch.zeros(len(rows), P, dtype=torch.bool)
    for i, row in enumerate(rows):
        prompt_ids[i, P - len(row) :], prompt_mask[i, P - len(row) :] = row, True
    return prompt_ids.to(model.device), prompt_mask.to(model.device)


def _token_ids(model: MaskedDiffusionLM, prompts: Prompts) -> Sequence[Tensor | list[int]]:
    if len({type(prompt) for prompt in prompts}) > 1 or not isinstance(prompts[0], str | list | Tensor):
        raise ValueError("prompts must all be strings, all be chats or all be token-id tensors")
    tensors = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
    if tensors:
        if any(row.dim() != 1 or row.is_floating_point() for row in tensors):
            raise ValueError("token-id prompts must be 1-d integer tensors, or one integer tensor [B, P]")
        return tensors
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give prompts as token-id tensors")
    strings = [prompt for prompt in prompts if isinstance(prompt, str)]
    if strings:
        return _each(lambda text: encode_text(model.tokenizer, text), strings)
    if model.tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template: give prompts as strings")
    try:
        texts = render_chats(model.tokenizer, _each(as_messages, prompts))
    except ChatTemplateError as error:
        raise PromptError(error.index, error.reason) from error
    return _each(lambda text: encode_text(model.tokenizer, text, add_special_tokens=False), texts)


def _each(function: Callable[[Given], Result], prompts: Iterable[Given]) -> list[Result]:
    results = []
    for index, prompt in enumerate(prompts):
        try:
            results.append(function(prompt))
        except ValueError as error:
            raise PromptError(index, error) from error
    return results


def check_prompts(model: MaskedDiffusionLM, prompt_ids: Tensor, prompt_mask: Tensor, gen_length: int) -> None:
    """PromptError for an id outside the vocabulary, a mask token, or a prompt that leaves no room for the completion."""
    vocab_size, context, P = model.config.vocab_size, model.config.max_position_embeddings, prompt_ids.shape[1]
    outside = (prompt_ids < 0) | (prompt_ids >= vocab_size)
    if (index := _first(outside & prompt_mask)) is not None:
        raise PromptError(index, f"it holds a token id outside the vocabulary of {vocab_size} tokens")
    if (index := _first((prompt_ids == model.mask_id) & prompt_mask)) is not None:
        raise PromptError(index, f"it contains the mask token (id {model.mask_id}), which only completions may hold")
    if P + gen_length > context:
        index = int(prompt_mask.sum(dim=1).argmax())
        raise PromptError(
            index,
            f"the longest prompt ({P} tokens) and gen_length {gen_length} exceed the model's context of {context}",
        )


def _first(wrong: Tensor) -> int | None:
    """The first row of ``wrong`` [B, P] that holds a True."""
    rows = wrong.any(dim=1).nonzero()
    return int(rows[0, 0]) if len(rows) else None
