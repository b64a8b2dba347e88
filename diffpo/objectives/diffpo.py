"""DiFFPO (arXiv 2510.02212): two-times mean-field surrogate, importance correction, joint training of the threshold.

    J = E 1/G sum_i 1/|o_i| sum_k  w_k min( rho_k A_i, clip(rho_k, 1 - eps, 1 + eps) A_i )  -  beta KL(pi_theta || pi_ref)

    rho_k = pi_theta(o_k | c, z_tau(k)) / pi_old(o_k | c, z_tau(k))                       surrogate / surrogate
    w_k   = stopgrad min( C, pi_old(o_k | c, z_tau(k)) / pi_old(o_k | c, z_{s(k)-1}) )    surrogate / true likelihood, of each token in
                                                                                          the paper; pooled ones: importance.py

with z_tau(k) = z_0 if token k was committed by step tau, else z_tau, and tau uniform in {0, .., T - 1}. The learned threshold
gamma is token 0: rho_0 = pi_theta(gamma | c) / pi_old(gamma | c), w_0 = pi_old(gamma | c) / the probability at which it was drawn
(1 for a fresh rollout without exploration), an advantage of its own (in the paper the same A_i, ``threshold_advantage="mean"``), and no KL.
"""

from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffpo.config import Field, Fraction, Limit, model_validator
from diffpo.keyed_random import uniform
from diffpo.likelihood.latents import Latents, Scores
from diffpo.likelihood.mean_field import mean_field
from diffpo.objectives.advantage import Advantage, group_advantage
from diffpo.objectives.importance import POOLED, QUARTERS, ImportanceWeights, pooled_behaviour
from diffpo.objectives.objective import AlgorithmConfig, Batch, Loss, Objective, masked_prompts
from diffpo_kernels import surrogate_loss

# diagnostics of the gap between surrogate and true likelihood, whatever is made of it
_OF_EACH_TOKEN = ("weight_histogram", "bin/weight_histogram", "bin/surrogate_kl", "bin/ess_uncapped")
EXACT = 0  # m = 0: a boundary at every step, the true likelihood
_BOUNDARY, _PROMPT_MASK = 0, 1  # purposes in the random key


class DiffpoConfig(AlgorithmConfig):
    """DiFFPO; defaults tuned on the tiny models (benchmarks/notes/experiments.md)."""

    replaced: ClassVar[dict[str, str]] = AlgorithmConfig.replaced | {
        "importance_correction": 'it is now algorithm.importance_weights, "token" for true, "none" for false'
    }
    name: Literal["diffpo"] = "diffpo"
    train: tuple[Literal["model", "threshold"], ...] = Field(("model", "threshold"), min_length=1)
    """what is trained: the model, the threshold policy, or both; the rest is frozen"""
    m: int = Field(2, ge=0, le=2**12)
    """network evaluations of the m-times mean-field surrogate; 0 = every step, the exact likelihood"""
    threshold_advantage: Advantage = "std"
    """of the threshold, see advantage: "std" gives prompts whose right answers take long as much say as those that can be fast"""
    importance_weights: ImportanceWeights = "token"
    """surrogate / true likelihood, at most weight_cap: of each token, of each token over the mean of its quarter of the denoising steps, or
    of each rollout, the geometric mean of its tokens'. A threshold always has its own, except with none"""
    weight_cap: Limit = 2.0
    clip: Limit = 0.2
    normalisation: Literal["sequence", "token"] = "sequence"
    prompt_mask_probability: Fraction = 0.0

    @model_validator(mode="after")
    def _of_what_is_trained(self) -> "DiffpoConfig":
        for name in ("m", "kl_coefficient", "prompt_mask_probability"):
            default = type(self).model_fields[name].default
            if "model" not in self.train and getattr(self, name) != default and (name == "m" or getattr(self, name)):
                raise ValueError(f"{name}: is of the model, which is not trained: add model to algorithm.train")
        own = type(self).model_fields["threshold_advantage"].default
        if "threshold" not in self.train and self.threshold_advantage != own:
            raise ValueError("threshold_advantage: no threshold is trained: add threshold to algorithm.train")
        drawn = "model" in self.train and self.m not in (EXACT, 1)
        if self.fresh_latents and not drawn and not self.prompt_mask_probability:
            raise ValueError("fresh_latents: nothing about the latents is random: leave it out, or set m to 2 or more")
        if self.importance_weights in POOLED and "model" not in self.train:
            raise ValueError(
                f"importance_weights: {self.importance_weights} pools tokens of the model, which is not trained: leave it out, or add model "
                "to algorithm.train"
            )
        if self.importance_weights == "none" and self.weight_cap != type(self).model_fields["weight_cap"].default:
            raise ValueError(
                "weight_cap: there are no weights to cap: set importance_weights to token, quarter or sequence"
            )
        return self


def draw_boundaries(nfe_B: Tensor, rollout_B: Tensor, m: int, *key: int) -> list[int | Tensor]:
    """0 and m - 1 sorted steps, uniform in {0, .., T - 1}; every step if m is ``EXACT``. Keyed by ``key`` and the rollouts' own keys [B].

    Each row draws its own, because each has its own T = nfe; one tau for the whole batch would be noisier, and beyond the
    end of the short rows.
    """
    if m == EXACT:
        return list(range(int(nfe_B.max())))
    draws = torch.arange(m - 1, device=nfe_B.device)
    tau_BM = (uniform(*key, rollout_B[:, None], draws) * nfe_B[:, None]).long().sort(dim=1).values
    return [0, *tau_BM.unbind(dim=1)]


class Diffpo(Objective[DiffpoConfig]):
    """The model, its threshold, or both, by the same clipped and importance-corrected objective."""

    Config = DiffpoConfig

    @property
    def separable(self) -> bool:
        """Unless a weight is of many tokens, some of which are not scored yet."""
        return self.config.importance_weights not in POOLED

    def latents(self, batch: Batch, *key: int) -> Latents:
        m = self.config.m if "model" in self.config.train else 1  # a frozen model's tokens need no second pass
        trajectory = batch.trajectory
        boundaries = draw_boundaries(trajectory.nfe, trajectory.key, m, *key, _BOUNDARY)
        latents = mean_field(trajectory, boundaries)
        return masked_prompts(latents, batch, self.config.prompt_mask_probability, *key, _PROMPT_MASK)

    def signal(self, batch: Batch, old: Scores | None, reference: Scores | None) -> Tensor:
        """[B, 1 + L]: the threshold's own advantage, and that of the tokens; where no threshold is trained the latter alone, [B]."""
        if "threshold" not in self.config.train:
            return batch.advantage
        own = group_advantage(batch.reward, self.config.group_size, self.config.threshold_advantage)
        return first(own, batch.advantage[:, None].expand_as(batch.trajectory.tokens))

    def loss(self, batch: Batch, signal: Tensor, new: Scores, old: Scores, reference: Scores | None) -> Loss:
        config, trajectory = self.config, batch.trajectory
        drawn = trajectory.actions.get("gamma")
        unknown = torch.zeros_like(trajectory.gamma)
        new_gamma, old_gamma = (scores.actions.get("gamma", unknown) for scores in (new, old))
        quarter_BL = (trajectory.commit_step - 1) * QUARTERS // trajectory.nfe[:, None]
        # token 0 is the threshold: its own log-prob as reference, so no KL; it belongs to no denoising step
        old_tokens, drawn_at = old.tokens(), unknown if drawn is None else drawn.logprob
        loss_by = partial(
            surrogate_loss,
            logprob=first(new_gamma, new.tokens()),
            old=first(old_gamma, old_tokens),
            advantage=signal,
            mask=first(unknown.bool() if drawn is None else drawn.choice >= 0, trajectory.scored),
            reference=first(new_gamma, reference.tokens()) if reference else None,
            clip=config.clip,
            weight_cap=config.weight_cap,
            kl_coefficient=config.kl_coefficient if reference else 0.0,  # a frozen model has none
            normalisation=config.normalisation,
            importance_correction=config.importance_weights != "none",
            step_bin=first(torch.full_like(trajectory.nfe, -1), quarter_BL),
            bins=QUARTERS,
        )
        if config.importance_weights not in POOLED:
            return Loss(*loss_by(behaviour=first(drawn_at, trajectory.logprob)))
        pooled = pooled_behaviour(
            config.importance_weights, old_tokens, trajectory.logprob, trajectory.scored, quarter_BL
        )
        value, metrics = loss_by(behaviour=first(drawn_at, pooled))
        with torch.no_grad():
            of_each = loss_by(behaviour=first(drawn_at, trajectory.logprob)).diagnostics
        return Loss(value, metrics | {name: of_each[name] for name in _OF_EACH_TOKEN})


def first(gamma_value_B: Tensor, token_values_BL: Tensor) -> Tensor:
    """[B, 1 + L]: the threshold is one more token, in front of the completion's."""
    return torch.cat([gamma_value_B[:, None].to(token_values_BL.dtype), token_values_BL], dim=1)
