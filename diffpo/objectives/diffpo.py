"""DiFFPO (arXiv 2510.02212): two-times mean-field surrogate, importance correction, joint training of the threshold.

    J = E 1/G sum_i 1/|o_i| sum_k  w_k min( rho_k A_i, clip(rho_k, 1 - eps, 1 + eps) A_i )  -  beta KL(pi_theta || pi_ref)

    rho_k = pi_theta(o_k | c, z_tau(k)) / pi_old(o_k | c, z_tau(k))                       surrogate / surrogate
    w_k   = stopgrad min( C, pi_old(o_k | c, z_tau(k)) / pi_old(o_k | c, z_{s(k)-1}) )    surrogate / true likelihood

with z_tau(k) = z_0 if token k was committed by step tau, else z_tau, and tau uniform in {0, .., T - 1}. The learned threshold
gamma is token 0: rho_0 = pi_theta(gamma | c) / pi_old(gamma | c), w_0 = 1, the same advantage A_i, and no KL.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffpo.decoding.trajectory import Trajectory
from diffpo.keyed_random import uniform
from diffpo.objectives.objective import Objective, View, threshold_first
from diffpo_kernels import surrogate_loss

if TYPE_CHECKING:
    from diffpo.config import AlgorithmConfig

QUARTERS = 4  # of a rollout's denoising steps, by which diagnostics are reported
EXACT = 0  # m = 0: a boundary at every step, the true likelihood
_BOUNDARY, _PROMPT_MASK = 0, 1  # purposes in the random key


def draw_boundaries(nfe_B: Tensor, m: int, *key: int) -> list[int | Tensor]:
    """0 and m - 1 sorted steps, uniform in {0, .., T - 1}; every step if m is ``EXACT``.

    Each row draws its own, because each has its own T = nfe; one tau for the whole batch would be noisier, and beyond the
    end of the short rows.
    """
    if m == EXACT:
        return list(range(int(nfe_B.max())))
    rows, draws = torch.arange(len(nfe_B), device=nfe_B.device), torch.arange(m - 1, device=nfe_B.device)
    tau_BM = (uniform(*key, rows[:, None], draws) * nfe_B[:, None]).long().sort(dim=1).values
    return [0, *tau_BM.unbind(dim=1)]


def mask_prompts(trajectory: Trajectory, config: "AlgorithmConfig", *key: int) -> Trajectory:
    """Each prompt token masked with probability ``prompt_mask_probability``, alike for the members of a group."""
    if config.prompt_mask_probability == 0:
        return trajectory
    group = torch.arange(len(trajectory), device=trajectory.tokens.device)[:, None] // config.group_size
    position = torch.arange(trajectory.prompt_ids.shape[1], device=group.device)
    masked = (uniform(*key, group, position) < config.prompt_mask_probability) & trajectory.prompt_mask
    return replace(trajectory, prompt_ids=trajectory.prompt_ids.masked_fill(masked, trajectory.mask_id))


class Diffpo(Objective):
    """The model, its threshold, or both, by the same clipped and importance-corrected objective."""

    def view(self, trajectory: Trajectory, *key: int) -> View:
        m = 1 if self.config.mode == "sampler" else self.config.m  # a frozen model's tokens need no second pass
        boundaries = draw_boundaries(trajectory.nfe, m, *key, _BOUNDARY)
        return View(mask_prompts(trajectory, self.config, *key, _PROMPT_MASK), boundaries)

    def loss(self, trajectory, advantage, new, old, reference):
        config = self.config
        # token 0 is the threshold: drawn from pi_old(gamma | c) itself, so its weight is 1; its own log-prob as reference: no KL;
        # it belongs to no denoising step
        quarter_BL = (trajectory.commit_step - 1) * QUARTERS // trajectory.nfe[:, None]
        no_quarter_B = torch.full_like(trajectory.nfe, -1)
        return surrogate_loss(
            logprob=threshold_first(new.gamma_logprob, new.logprob),
            old=threshold_first(old.gamma_logprob, old.logprob),
            advantage=advantage,
            mask=threshold_first(trajectory.gamma_bin >= 0, trajectory.scored),
            behaviour=threshold_first(old.gamma_logprob, trajectory.logprob),
            reference=threshold_first(new.gamma_logprob, reference.logprob) if reference else None,
            clip=config.clip,
            weight_cap=config.weight_cap,
            kl_coefficient=config.kl_coefficient if reference else 0.0,  # a frozen model has none
            normalisation=config.normalisation,
            importance_correction=config.importance_correction,
            step_bin=threshold_first(no_quarter_B, quarter_BL),
            bins=QUARTERS,
        )
