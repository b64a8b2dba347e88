"""Which network inputs are equal and need one evaluation: the members of a group share z_0."""

import torch
from torch import Tensor


def distinct_rows(rows_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Index [U] of the first of each distinct row, and each row's place among them [B]."""
    _, source_B = torch.unique(rows_BL, dim=0, return_inverse=True)
    first_U = torch.full((int(source_B.max()) + 1,), len(rows_BL), device=rows_BL.device)
    first_U.scatter_reduce_(0, source_B, torch.arange(len(rows_BL), device=rows_BL.device), "amin")
    return first_U, source_B
