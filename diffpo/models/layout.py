"""How prompts and completions lie in one network input: its tokens, what they see, and where the completions' states are.

Shapes: u inputs, Q prompt positions, L completion positions, S positions of the input, D hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Texts(NamedTuple):
    """u completions behind their prompts. prompt_ids: int64 [u, Q]; real: bool [u, Q], False where a prompt is padding, which may stand
    anywhere; completion: int64 [u, L]."""

    prompt_ids: Tensor
    real: Tensor
    completion: Tensor


class FirstPass(NamedTuple):
    """Hidden states of whole inputs, from which a threshold is read where all of the completion is masked. completion: [u, L, D]; prompt:
    [u, Q, D]; real: bool [u, Q], False where a prompt is padding."""

    completion: Tensor
    prompt: Tensor
    real: Tensor


class Arrangement(NamedTuple):
    """Network inputs. tokens: int64 [u, S]; attention: what each token sees and its position, as `MaskedDiffusionLM.forward` takes it;
    real: bool [u, Q], of the prompts in front of the completions."""

    tokens: Tensor
    attention: dict[str, Any]
    real: Tensor

    def states(self, hidden_uSD: Tensor) -> Tensor:
        """The completions' hidden states [u, L, D]."""
        return hidden_uSD[:, self.real.shape[1] :]

    def first_pass(self, hidden_uSD: Tensor) -> FirstPass:
        """All of the hidden states."""
        return FirstPass(self.states(hidden_uSD), hidden_uSD[:, : self.real.shape[1]], self.real)


class Full:
    """Prompt and completion side by side, and each token sees all others: a commit changes every state, so no pass can keep any exactly."""

    def width(self, prompt: int, completion: int) -> int:
        """Tokens of an input with so many prompt and completion positions."""
        return prompt + completion

    def identity(self, texts: Texts) -> Tensor:
        """int64 [u, S]: inputs whose rows here are equal are one, and need one evaluation."""
        return torch.cat([texts.prompt_ids.masked_fill(~texts.real, -1), texts.completion], dim=1)

    def arrange(self, texts: Texts) -> Arrangement:
        prompt_ids, real, completion = texts
        padding = int((~real).long().cumprod(dim=1).sum(dim=1).min()) if len(real) else 0  # on the left of all of them
        prompt_ids, real = prompt_ids[:, padding:], real[:, padding:]
        if real.all():  # nothing is padding: the fastest attention kernel applies
            attention = {}
        elif (real[:, 1:] >= real[:, :-1]).all():
            attention = {"padding": (~real).sum(dim=1)}
        else:
            attention = {"attention_mask": torch.cat([real, torch.ones_like(completion, dtype=torch.bool)], dim=1)}
        return Arrangement(torch.cat([prompt_ids, completion], dim=1), attention, real)
