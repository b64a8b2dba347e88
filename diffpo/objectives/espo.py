"""ESPO (arXiv 2512.03759): the evidence lower bound of the whole completion as its log-likelihood, and one ratio a sequence.

    E_i   = random-mask estimate of the bound of log p(o_i | c), with complements    (likelihood/random_masks.py)
    rho_i = exp( (E_i - E_i_old) / L )
    J     = mean_i  min( rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i )  -  beta mean_i (E_i - E_i_ref)^2 / (2 L)

L is the whole completion, padding behind the first EOS included. As coded by its authors, but for one thing: they stratify the numbers of
masked tokens over the batch, here each rollout draws its own.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffpo.config import Field, Limit
from diffpo.likelihood.latents import Latents, Scores
from diffpo.likelihood.random_masks import random_masks
from diffpo.objectives.objective import AlgorithmConfig, Batch, Loss, Objective


class EspoConfig(AlgorithmConfig):
    """ESPO's published settings."""

    name: Literal["espo"] = "espo"
    train: tuple[Literal["model"]] = ("model",)
    pairs: int = Field(2, gt=0, le=2**12)
    """random masks a rollout, each scored with its complement"""
    clip: Limit = 0.2


class Espo(Objective[EspoConfig]):
    """Sequence-level policy optimisation with the evidence lower bound."""

    Config = EspoConfig
    rollout: ClassVar[dict[str, Any]] = {"speed_exponent": 0.0}

    def latents(self, batch: Batch, *key: int) -> Latents:
        return random_masks(batch.trajectory, self.config.pairs, *key)

    def loss(self, batch: Batch, signal: Tensor, new: Scores, old: Scores, reference: Scores | None) -> Loss:
        L, eps = batch.trajectory.tokens.shape[1], self.config.clip
        bound = new.sequence()
        ratio = ((bound - old.sequence()) / L).exp()
        surrogate = torch.minimum(ratio * signal, ratio.clamp(1 - eps, 1 + eps) * signal).mean()
        kl = ((bound - reference.sequence()).square() / (2 * L)).mean() if reference else torch.zeros_like(surrogate)
        metrics = {"ratio_mean": ratio.mean(), "ratio_max": ratio.max(), "kl": kl, "elbo": bound.mean()}
        return Loss(self.config.kl_coefficient * kl - surrogate, {k: v.detach() for k, v in metrics.items()})
