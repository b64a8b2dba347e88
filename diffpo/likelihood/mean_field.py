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
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo_kernels import linear_logprob


@dataclass(frozen=True)
class Scores:
    """logprob: fp32 [B, L], nats, 0 where nothing was committed; gamma_logprob: fp32 [B], log pi(gamma | c), 0 without one."""

    logprob: Tensor
    gamma_logprob: Tensor


def trajectory_logprobs(model: MaskedDiffusionLM, trajectory: Trajectory, boundaries: Sequence[int | Tensor]) -> Tensor:
    """Log-probs [B, L] (fp32, nats) of the committed tokens; boundaries [0] = mean field, range(T) = exact.

    Each boundary is an int or an int64 tensor [B]; the first is 0 and they increase within each row. Tokens are scored at
    the trajectory's temperature (at 1 for a greedy one) with the mask token excluded, as they were drawn. Rows that share a
    prompt share the evaluation of z_0, so m boundaries cost at most B (m - 1) + U denoiser calls. Differentiable.
    """
    return score(model, trajectory, boundaries).logprob


def score(model: MaskedDiffusionLM, trajectory: Trajectory, boundaries: Sequence[int | Tensor]) -> Scores:
    """As ``trajectory_logprobs``, with the log-probs of the learned thresholds, which come with the z_0 pass."""
    _check_boundaries(boundaries, len(trajectory))
    steps = trajectory.commit_step
    boundaries = [torch.as_tensor(tau, device=steps.device).expand(len(steps))[:, None] for tau in boundaries]
    ends = [*boundaries[1:], torch.full_like(boundaries[0], torch.iinfo(torch.int64).max)]
    precision = torch.promote_types(model.lm_head.weight.dtype, torch.float32)
    logprob_BL = torch.zeros(steps.shape, dtype=precision, device=steps.device)
    for j, (tau, end) in enumerate(zip(boundaries, ends, strict=True)):
        span_BL = (steps > tau) & (steps <= end)
        if j == 0:
            hidden_ULD, source_B = _shared_first_pass(model, trajectory)
            gamma_logprob = _gamma_logprob(model, trajectory, hidden_ULD, source_B)
        else:
            rows = span_BL.any(dim=1)
            if not rows.any():
                continue
            hidden_ULD = _completion_hidden(model, trajectory[rows], trajectory[rows].latent(tau[rows, 0]))
            source_B = rows.long().cumsum(dim=0) - 1
        row, position = span_BL.nonzero(as_tuple=True)
        logprob_N = linear_logprob(
            hidden_ULD[source_B[row], position],
            model.lm_head.weight,
            trajectory.tokens[row, position],
            temperature=trajectory.temperature or 1.0,
            banned_ids=[model.mask_id],
        )
        logprob_BL = logprob_BL.index_put((row, position), logprob_N)
    return Scores(logprob_BL, gamma_logprob)


def _shared_first_pass(model: MaskedDiffusionLM, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Hidden states [U, L, D] of the fully masked completion after each distinct prompt, and each rollout's row in them [B]."""
    key = trajectory.prompt_ids.masked_fill(~trajectory.prompt_mask, -1)
    key = torch.cat(
        [torch.zeros_like(trajectory.tokens[:, :1]), key], dim=1
    )  # one column even when all prompts are empty
    _, source_B = torch.unique(key, dim=0, return_inverse=True)
    first_U = torch.full((int(source_B.max()) + 1,), len(source_B), device=source_B.device)
    first_U.scatter_reduce_(0, source_B, torch.arange(len(source_B), device=source_B.device), "amin")
    distinct = trajectory[first_U]
    return _completion_hidden(model, distinct, distinct.latent(0)), source_B


def _completion_hidden(model: MaskedDiffusionLM, trajectory: Trajectory, latent_BL: Tensor) -> Tensor:
    sequence = torch.cat([trajectory.prompt_ids, latent_BL], dim=1)
    mask = None
    if not trajectory.prompt_mask.all():
        mask = torch.cat([trajectory.prompt_mask, torch.ones_like(latent_BL, dtype=torch.bool)], dim=1)
    return model(sequence, mask)[:, -latent_BL.shape[1] :]


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
            raise ValueError(f"boundaries must increase, got {boundaries}")
