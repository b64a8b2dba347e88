"""pi(gamma | c): a categorical over threshold bins, read from the hidden states of the fully masked first pass."""

import math

import torch
from torch import Tensor, nn

from diffpo.models.sharding import call


class ThresholdPolicy(nn.Module):
    """A linear head on the mean hidden state of the masked completion; it starts uniform (zero weights).

    The hidden states are those of z_0, the first denoising pass, which decoding evaluates anyway: the threshold costs no NFE.
    """

    gammas: Tensor

    def __init__(self, hidden_size: int, gammas: tuple[float, ...]):
        super().__init__()
        if not gammas or any(math.isnan(gamma) or gamma < 0 for gamma in gammas):
            raise ValueError(f"threshold_gammas must be non-negative numbers (nats), got {gammas}")
        self.register_buffer("gammas", torch.tensor(gammas, dtype=torch.float32), persistent=False)
        self.linear = nn.Linear(hidden_size, len(gammas))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, completion_hidden_BLD: Tensor) -> Tensor:
        """Log-probabilities [B, bins] from the z_0 hidden states [B, L, D] of the completion's positions."""
        return call(self.linear, completion_hidden_BLD.mean(dim=1)).float().log_softmax(dim=-1)
