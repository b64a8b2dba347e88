"""What is not finite is never saved."""

import torch
from torch import nn

from diffpo.models.sharding import whole


class NotFiniteError(FloatingPointError):
    """A weight or a value of the optimizer is NaN or infinite."""


def check_finite(model: nn.Module, others: dict[str, torch.Tensor] | None = None) -> None:
    """NotFiniteError, with its name, for a tensor of the model or of ``others`` that holds NaN or an infinity; in every process that
    shares it."""
    for name, tensor in [*model.named_parameters(), *(others or {}).items()]:
        if not whole(torch.isfinite(tensor).all()):
            raise NotFiniteError(f"{name} is not finite, so it is not saved")
