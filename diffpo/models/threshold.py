"""pi(gamma | c) of DiFFPO (arXiv 2510.02212): a categorical over threshold bins, read from the hidden states of the fully masked first pass."""

import math

import torch
from torch import Tensor, nn

from diffpo.models.layout import FirstPass
from diffpo.models.model_config import Reads
from diffpo.models.modules import Linear
from diffpo.models.sharding import call


class ThresholdPolicy(nn.Module):
    """A linear head on the mean hidden state of the masked completion and that of the prompt; it starts uniform (zero weights).

    The hidden states are those of z_0, the first denoising pass, which decoding evaluates anyway: the threshold costs no NFE. What a
    masked completion's states hold is what predicts its tokens one by one; how those depend on each other may stand in the prompt alone.
    reads: "both", or "completion" for the first of the two alone.
    """

    gammas: Tensor

    def __init__(self, hidden_size: int, gammas: tuple[float, ...], reads: Reads = "both"):
        super().__init__()
        self.reads = reads
        if not gammas or any(math.isnan(gamma) or gamma < 0 for gamma in gammas):
            raise ValueError(f"threshold_gammas must be non-negative numbers (nats), got {gammas}")
        self.register_buffer("gammas", torch.tensor(gammas, dtype=torch.float32), persistent=False)
        self.linear = Linear(hidden_size * (2 if reads == "both" else 1), len(gammas))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, first: FirstPass) -> Tensor:
        """Log-probabilities fp32 [B, bins], nats, from the hidden states of z_0."""
        features_BF = first.completion.mean(dim=1)
        if self.reads == "both":
            real_BQ1 = first.real[..., None]
            wide = torch.promote_types(first.prompt.dtype, torch.float32)  # fp16 does not hold the sum of a long prompt
            sum_BD = torch.where(real_BQ1, first.prompt, 0).sum(dim=1, dtype=wide)
            mean_BD = sum_BD / real_BQ1.sum(dim=1).clamp(min=1)
            features_BF = torch.cat([features_BF, mean_BD.to(features_BF.dtype)], dim=1)
        features_BF = features_BF.to(torch.promote_types(features_BF.dtype, self.linear.weight.dtype))
        return call(self.linear, features_BF).float().log_softmax(dim=-1)
