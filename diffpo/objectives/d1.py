"""d1 / diffu-GRPO (arXiv 2504.12216): the mean-field likelihood, with randomly masked prompts, in a clipped token-level loss.

    rho_k = pi_theta(o_k | c', z_0) / pi_old(o_k | c', z_0)
    J     = E mean over the batch's tokens of  min( rho_k A_i, clip(rho_k, 1 - eps, 1 + eps) A_i )  -  beta KL(pi_theta || pi_ref)

c' is the prompt with each token masked independently with probability .15, drawn anew for each inner update and shared by a
group, theta, old and reference.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor

from diffpo.config import Field, Fraction, Limit, NonNegative
from diffpo.likelihood.latents import Latents, Scores
from diffpo.likelihood.mean_field import mean_field
from diffpo.objectives.objective import AlgorithmConfig, Batch, Loss, Objective, masked_prompts
from diffpo_kernels import surrogate_loss


class D1Config(AlgorithmConfig):
    """d1's published settings."""

    name: Literal["d1"] = "d1"
    train: tuple[Literal["model"]] = ("model",)
    clip: Limit = 0.5
    kl_coefficient: NonNegative = 0.04
    inner_updates: int = Field(12, gt=0, le=2**12)
    group_size: int = Field(6, ge=2, le=2**12)
    fresh_latents: bool = True
    prompt_mask_probability: Fraction = 0.15


class D1(Objective[D1Config]):
    """The model alone, by the mean-field likelihood."""

    Config = D1Config
    rollout: ClassVar[dict[str, Any]] = {"speed_exponent": 0.0}  # correctness alone
    separable = True

    def latents(self, batch: Batch, *key: int) -> Latents:
        return masked_prompts(mean_field(batch.trajectory, [0]), batch, self.config.prompt_mask_probability, *key)

    def loss(self, batch: Batch, signal: Tensor, new: Scores, old: Scores, reference: Scores | None) -> Loss:
        return Loss(*surrogate_loss(
            logprob=new.tokens(),
            old=old.tokens(),
            advantage=signal,
            mask=batch.trajectory.scored,
            reference=reference.tokens() if reference else None,
            clip=self.config.clip,
            kl_coefficient=self.config.kl_coefficient if reference else 0.0,
            normalisation="token",
            importance_correction=False,
        ))  # fmt: skip
