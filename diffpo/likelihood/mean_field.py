"""The m-times mean-field family: surrogate likelihoods of a trajectory from m network evaluations.

With boundaries 0 = tau_0 < tau_1 < ... < tau_{m-1}, token k, committed at step s(k), is scored from z_{tau_j} for the latest
tau_j < s(k):

    m = 1          log pi(o_k | c, z_0)                       mean field (d1)
    m = 2          from z_0 if s(k) <= tau, else from z_tau    two-times mean field (DiFFPO, arXiv 2510.02212)
    all T steps    log pi(o_k | c, z_{s(k)-1})                the true likelihood

Shapes: B rollouts, L completion positions, P prompt positions, U distinct prompts, N tokens to score, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffpo.decoding.trajectory import Trajectory
from diffpo.models.shared_pass import completion_hidden
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo_kernels import linear_logprob


@dataclass(frozen=True)
class Scores:
    """logprob: fp32 [B, L], nats, 0 where nothing was committed; gamma_logprob: fp32 [B], log pi(gamma | c), 0 without one."""

    logprob: Tensor
    gamma_logprob: Tensor

    def detach(self) -> "Scores":
        return Scores(self.logprob.detach(), self.gamma_logprob.detach())


def trajectory_logprobs(model: MaskedDiffusionLM, trajectory: Trajectory, boundaries: Sequence[int | Tensor]) -> Tensor:
    """Log-probs [B, L] (fp32, nats) of the committed tokens; boundaries [0] = mean field, range(T) = exact.

    Each boundary is an int or an int64 tensor [B]; the first is 0 and they never decrease within a row. Tokens are scored at
    the trajectory's temperature (at 1 for a greedy one) with the mask token excluded, as they were drawn. Equal latents are
    evaluated once: rows that share a prompt share z_0, so m boundaries cost at most B (m - 1) + U denoiser calls.
    Differentiable.
    """
    return score(model, trajectory, boundaries).logprob


def score(model: MaskedDiffusionLM, trajectory: Trajectory, boundaries: Sequence[int | Tensor]) -> Scores:
    """As ``trajectory_logprobs``, with the log-probs of the learned thresholds, which come with the z_0 pass."""
    _check_boundaries(boundaries, len(trajectory))
    if trajectory.cfg_scale != 0:
        raise ValueError(
            f"the trajectory was decoded with cfg_scale {trajectory.cfg_scale}: guided draws have no model likelihood"
        )
    steps = trajectory.commit_step
    boundaries = [torch.as_tensor(tau, device=steps.device).expand(len(steps))[:, None] for tau in boundaries]
    ends = [*boundaries[1:], torch.full_like(boundaries[0], torch.iinfo(torch.int64).max)]
    positions = torch.arange(steps.shape[1], device=steps.device)
    hidden, hidden_rows = [], 0  # [U L, D] of each latent, together [hidden_rows, D]
    hidden_row_BL = torch.zeros_like(steps)  # where each token is scored from
    gamma_logprob = None
    for tau, end in zip(boundaries, ends, strict=True):
        span_BL = (steps > tau) & (steps <= end)
        rows = span_BL.any(dim=1) if hidden else torch.ones_like(trajectory.nfe, dtype=torch.bool)
        if not rows.any():
            continue
        part = trajectory[rows]
        hidden_ULD, source_R = completion_hidden(model, part.prompt_ids, part.prompt_mask, part.latent(tau[rows, 0]))
        if not hidden:  # z_0, the pass from which the threshold was read
            gamma_logprob = _gamma_logprob(model, trajectory, hidden_ULD, source_R)
        source_B = torch.zeros_like(trajectory.nfe).masked_scatter_(rows, source_R)
        row_BL = hidden_rows + source_B[:, None] * len(positions) + positions
        hidden_row_BL = torch.where(span_BL, row_BL, hidden_row_BL)
        hidden.append(hidden_ULD.flatten(0, 1))
        hidden_rows += len(hidden[-1])
    # one call, so that what it keeps for the backward pass is bounded once and not once per boundary
    logprob_N = linear_logprob(
        hidden,
        model.lm_head.weight,
        trajectory.tokens[trajectory.committed],
        temperature=trajectory.temperature or 1.0,
        banned_ids=[model.mask_id],
        rows=hidden_row_BL[trajectory.committed],
    )
    logprob_BL = logprob_N.new_zeros(steps.shape).masked_scatter(trajectory.committed, logprob_N)
    return Scores(logprob_BL, gamma_logprob)


def _gamma_logprob(model, trajectory: Trajectory, hidden_ULD: Tensor, source_B: Tensor) -> Tensor:
    chosen = trajectory.gamma_bin >= 0
    if model.threshold is None or not chosen.any():
        return torch.zeros_like(trajectory.gamma_logprob)
    logprob_BG = model.threshold(hidden_ULD)[source_B]
    return torch.where(chosen, logprob_BG.gather(1, trajectory.gamma_bin.clamp(min=0)[:, None])[:, 0], 0.0)


def _check_boundaries(boundaries: Sequence[int | Tensor], rows: int) -> None:
    for tau in boundaries:
        if isinstance(tau, Tensor) and tau.shape not in ((), (rows,)):
            raise ValueError(f"each of boundaries must be an int or a tensor [{rows}], got shape {list(tau.shape)}")
    if len(boundaries) == 0 or bool((torch.as_tensor(boundaries[0]) != 0).any()):
        raise ValueError(f"boundaries must start with 0, got {boundaries}")
    for previous, following in pairwise(boundaries):
        if bool((torch.as_tensor(following) < torch.as_tensor(previous)).any()):
            raise ValueError(f"boundaries must not decrease, got {boundaries}")
