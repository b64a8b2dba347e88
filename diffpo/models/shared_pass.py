"""One network evaluation for equal inputs: the members of a group share z_0, and often the first latents after it."""

import torch
from torch import Tensor

from diffpo.models.transformer import MaskedDiffusionLM


def completion_hidden(
    model: MaskedDiffusionLM, prompt_ids: Tensor, prompt_mask: Tensor, completion_BL: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states [U, L, D] of the completion for the U distinct rows of B, and each row's place among them, int64 [B].

    prompt_ids, prompt_mask: [B, P], padded anywhere; completion_BL: int64 [B, L]. Differentiable.
    """
    first_U, source_B = distinct_rows(torch.cat([prompt_ids.masked_fill(~prompt_mask, -1), completion_BL], dim=1))
    sequence, real_UP = torch.cat([prompt_ids, completion_BL], dim=1)[first_U], prompt_mask[first_U]
    if real_UP.all():  # nothing is padding: the fastest attention kernel applies
        hidden = model(sequence)
    elif (real_UP[:, 1:] >= real_UP[:, :-1]).all():
        hidden = model(sequence, padding=(~real_UP).sum(dim=1))
    else:
        hidden = model(sequence, torch.cat([real_UP, torch.ones_like(completion_BL[first_U], dtype=torch.bool)], dim=1))
    return hidden[:, -completion_BL.shape[1] :], source_B


def distinct_rows(rows_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Index [U] of the first of each distinct row, and each row's place among them [B]."""
    _, source_B = torch.unique(rows_BL, dim=0, return_inverse=True)
    first_U = torch.full((int(source_B.max()) + 1,), len(rows_BL), device=rows_BL.device)
    first_U.scatter_reduce_(0, source_B, torch.arange(len(rows_BL), device=rows_BL.device), "amin")
    return first_U, source_B
