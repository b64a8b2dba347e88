"""TraceRL (arXiv 2509.06949): the rollout's own trace, its denoising steps merged s at a time, and a mean over the merged steps.

    latent j of rollout i: z_{s j}; it scores the tokens O_ij committed in the steps s j + 1 .. s (j + 1)
    rho_k = pi_theta(o_k | c, z_{s j}) / pi_old(o_k | c, z_{s j})
    J     = mean over latents of [ mean over O_ij of  min( rho_k A_i, clip(rho_k, 1 - eps, 1 + eps) A_i )
                                   - beta  sum over O_ij of  k3(pi_theta || pi_old) ]

This is the m-times mean field with a boundary every s steps, as d2 has it too. As coded by its authors: the KL is to the policy that rolled
out, and a token counts for as much as its latent is short.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffpo.config import Field, Limit, Rows
from diffpo.likelihood.latents import Latents, Scores
from diffpo.likelihood.mean_field import mean_field
from diffpo.objectives.objective import AlgorithmConfig, Batch, Loss, Objective


class TraceRLConfig(AlgorithmConfig):
    """TraceRL's published settings for LLaDA."""

    random_latents: ClassVar[bool] = False
    name: Literal["tracerl"] = "tracerl"
    train: tuple[Literal["model"]] = ("model",)
    merged_steps: int = Field(8, gt=0, le=2**12)
    """denoising steps scored from one latent"""
    clip: Limit = 0.2
    prompts_per_update: Rows = 32


class TraceRL(Objective[TraceRLConfig]):
    """The merged trace."""

    Config = TraceRLConfig
    rollout: ClassVar[dict[str, Any]] = {"speed_exponent": 0.0, "temperature": 0.8}
    separable = True
    anchored = False

    def latents(self, batch: Batch, *key: int) -> Latents:
        return mean_field(batch.trajectory, range(0, int(batch.trajectory.nfe.max()), self.config.merged_steps))

    def loss(self, batch: Batch, signal: Tensor, new: Scores, old: Scores, reference: Scores | None) -> Loss:
        (latent, position), eps = new.scored.unbind(dim=1), self.config.clip
        row = new.latents.row[latent]
        scored = batch.trajectory.scored[row, position]
        count = torch.zeros(len(new.latents), device=row.device).index_add(0, latent, scored.float())
        difference = torch.where(scored, new.value - old.value, 0.0)
        ratio, advantage = difference.exp(), signal[row]
        clipped = torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
        kl = ((-difference).exp() + difference - 1) * scored
        latents = (count > 0).sum().clamp(min=1)
        surrogate = (clipped * scored / count[latent].clamp(min=1)).sum() / latents
        kl = kl.sum() / latents
        metrics = {"ratio_mean": ratio[scored].mean(), "ratio_max": ratio[scored].max(), "kl": kl}
        return Loss(self.config.kl_coefficient * kl - surrogate, {k: v.detach() for k, v in metrics.items()})
