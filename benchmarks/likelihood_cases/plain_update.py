"""The update as published code writes it, for the same objective: two full passes for each sample, full logits, log_softmax and gather.

Nothing is shared: the pass over z_0 is made for each member of a group, logits are formed at every position of the sequence, prompt
included, and the log-probs of one token are picked out of a whole log_softmax. Old scores are two passes more, without a gradient.
Sources: the GRPO trainers of d1 (arXiv 2504.12216) and TRL, which differ in the estimator alone.

Shapes: B rollouts, L completion positions, S = prompt + L, V vocabulary.
"""

import torch
from torch import Tensor

from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.trajectory import Trajectory

CLIP, WEIGHT_CAP, QUARTERS = 0.2, 2.0, 4


def logprobs(model: MaskedDiffusionLM, trajectory: Trajectory, tau_B: Tensor) -> Tensor:
    """[B, L]: two-times mean field, tokens committed by step tau from z_0 and the others from z_tau."""
    first_BL, second_BL = (
        one_pass(model, trajectory, trajectory.latent(tau)) for tau in (torch.zeros_like(tau_B), tau_B)
    )
    return torch.where(trajectory.commit_step <= tau_B[:, None], first_BL, second_BL)


def one_pass(model: MaskedDiffusionLM, trajectory: Trajectory, latent_BL: Tensor) -> Tensor:
    real_BS = torch.cat([trajectory.prompt_mask, torch.ones_like(latent_BL, dtype=torch.bool)], dim=1)
    attention_mask = None if real_BS.all() else real_BS
    logits_BSV = model.logits(torch.cat([trajectory.prompt_ids, latent_BL], dim=1), attention_mask)
    logits_BLV = logits_BSV[:, -latent_BL.shape[1] :]
    logits_BLV[..., model.mask_id] = -torch.inf
    return logits_BLV.log_softmax(dim=-1).gather(2, trajectory.tokens[..., None])[..., 0]


def accumulate(
    model: MaskedDiffusionLM,
    trajectory: Trajectory,
    tau_B: Tensor,
    advantage_B: Tensor,
    old_BL: Tensor | None,
    samples: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of DiFFPO's loss to the model's, ``samples`` rollouts at a time; loss and diagnostics.

    old_BL: None: scored here first.
    """
    if old_BL is None:
        with torch.no_grad():
            old_BL = torch.cat(
                [logprobs(model, trajectory[rows], tau_B[rows]) for rows in parts(len(trajectory), samples)]
            )
    total, new = torch.zeros(()), []
    weight_BL = (old_BL - trajectory.logprob).exp().clamp(max=WEIGHT_CAP)
    for rows in parts(len(trajectory), samples):
        new_bL = logprobs(model, trajectory[rows], tau_B[rows])
        ratio_bL, advantage_b1 = (new_bL - old_BL[rows]).exp(), advantage_B[rows, None]
        gain_bL = torch.minimum(ratio_bL * advantage_b1, ratio_bL.clamp(1 - CLIP, 1 + CLIP) * advantage_b1)
        scored_bL = trajectory.scored[rows]
        of_rollout_b = (weight_BL[rows] * gain_bL * scored_bL).sum(dim=1) / scored_bL.sum(dim=1)
        loss = -of_rollout_b.sum() / len(trajectory)
        loss.backward()
        total += loss.detach()
        new.append(new_bL.detach())
    return total, diagnostics(trajectory, torch.cat(new), old_BL, weight_BL, advantage_B)


def parts(rollouts: int, samples: int) -> list[slice]:
    return [slice(start, start + samples) for start in range(0, rollouts, samples)]


def diagnostics(
    trajectory: Trajectory, new_BL: Tensor, old_BL: Tensor, weight_BL: Tensor, advantage_B: Tensor
) -> dict[str, Tensor]:
    """Of the scored tokens; surrogate_kl by quarter of a rollout's denoising steps."""
    scored = trajectory.scored
    ratio, weight, gap = (new_BL - old_BL).exp()[scored], weight_BL[scored], (trajectory.logprob - old_BL)[scored]
    upwards = (advantage_B > 0)[:, None].expand_as(scored)[scored]
    quarter = ((trajectory.commit_step - 1) * QUARTERS // trajectory.nfe[:, None])[scored]
    return {
        "ratio_mean": ratio.mean(),
        "clip_fraction": torch.where(upwards, ratio > 1 + CLIP, ratio < 1 - CLIP).float().mean(),
        "weight_mean": weight.mean(),
        "ess": weight.sum() ** 2 / (len(weight) * weight.square().sum()),
        "bin/surrogate_kl": torch.stack([gap[quarter == q].mean() for q in range(QUARTERS)]),
    }
