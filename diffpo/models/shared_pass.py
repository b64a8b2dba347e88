"""Completions through the network, and which inputs are equal and need one evaluation: the members of a group share z_0."""

import torch
from torch import Tensor

from diffpo.models.transformer import MaskedDiffusionLM


def completion_hidden(model: MaskedDiffusionLM, prompt_ids: Tensor, real: Tensor, completion: Tensor) -> Tensor:
    """Hidden states [u, L, D] of completions [u, L] behind prompts [u, Q], whose padding may stand anywhere."""
    padding = int((~real).long().cumprod(dim=1).sum(dim=1).min()) if len(real) else 0  # on the left of all of them
    prompt_ids, real = prompt_ids[:, padding:], real[:, padding:]
    sequence = torch.cat([prompt_ids, completion], dim=1)
    if real.all():  # nothing is padding: the fastest attention kernel applies
        hidden = model(sequence)
    elif (real[:, 1:] >= real[:, :-1]).all():
        hidden = model(sequence, padding=(~real).sum(dim=1))
    else:
        hidden = model(sequence, torch.cat([real, torch.ones_like(completion, dtype=torch.bool)], dim=1))
    return hidden[:, prompt_ids.shape[1] :]


def distinct_rows(rows_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Index [U] of the first of each distinct row, and each row's place among them [B]."""
    _, source_B = torch.unique(rows_BL, dim=0, return_inverse=True)
    first_U = torch.full((int(source_B.max()) + 1,), len(rows_BL), device=rows_BL.device)
    first_U.scatter_reduce_(0, source_B, torch.arange(len(rows_BL), device=rows_BL.device), "amin")
    return first_U, source_B
