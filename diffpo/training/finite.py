"""What is not finite is never saved."""

from collections.abc import Mapping

import torch

from diffpo.models.sharding import whole


class NotFiniteError(FloatingPointError):
    """A weight or a value of the optimizer is NaN or infinite."""


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """NotFiniteError, with its name, for a tensor that holds NaN or an infinity; in every process that shares it."""
    for name, tensor in tensors.items():
        if not whole(torch.isfinite(tensor).all()):
            raise NotFiniteError(f"{name} is not finite, so it is not saved")
