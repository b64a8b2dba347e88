"""The m-times mean-field family: surrogate likelihoods of a trajectory from m network evaluations.

With boundaries 0 = tau_0 < tau_1 < ... < tau_{m-1}, token k, committed at step s(k), is scored from z_{tau_j} for the latest
tau_j < s(k):

    m = 1          log pi(o_k | c, z_0)                       mean field (d1)
    m = 2          from z_0 if s(k) <= tau, else from z_tau    two-times mean field (DiFFPO, arXiv 2510.02212)
    every s steps  from z_{s j}                               merged trace (TraceRL, d2)
    all T steps    log pi(o_k | c, z_{s(k)-1})                the true likelihood

Shapes: B rollouts, L completion positions, P latents.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffpo.decoding.options import check_model
from diffpo.likelihood.latents import Latents
from diffpo.likelihood.score import score
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.trajectory import Trajectory


def trajectory_logprobs(
    model: MaskedDiffusionLM,
    trajectory: Trajectory,
    boundaries: Sequence[int | Tensor],
    tokens_at_once: int | None = None,
) -> Tensor:
    """Log-probs [B, L] (fp32, nats) of the committed tokens; boundaries [0] = mean field, range(T) = exact.

    Each boundary is an int or an int64 tensor [B]; the first is 0 and they never decrease within a row. Tokens are scored at
    the trajectory's temperature (at 1 for a greedy one) with the mask token excluded, as they were drawn. Equal latents are
    evaluated once: rows that share a prompt share z_0, so m boundaries cost at most B (m - 1) + U denoiser calls for U distinct prompts.
    tokens_at_once: as in `score`. Differentiable.
    """
    check_model(model)
    if not isinstance(trajectory, Trajectory):
        inside = ": give its .trajectory" if hasattr(trajectory, "trajectory") else ""
        raise ValueError(f"trajectory must be a Trajectory, got {type(trajectory).__name__}{inside}")
    return score(model, trajectory, mean_field(trajectory, boundaries), tokens_at_once).tokens()


def mean_field(trajectory: Trajectory, boundaries: Sequence[int | Tensor]) -> Latents:
    """The latents z_{tau_j}, each of which scores the tokens committed after it and by the next; a latent that scores none is left out.

    boundaries: as in `trajectory_logprobs`; ValueError if they are not so.
    """
    steps, rollouts = trajectory.commit_step, len(trajectory)
    _check_boundaries(boundaries, rollouts)
    device = steps.device
    taus = [torch.as_tensor(tau, device=device).expand(rollouts)[:, None] for tau in boundaries]
    ends = [*taus[1:], torch.full_like(taus[0], torch.iinfo(torch.int64).max)]
    row, masked, span = [], [], []
    for tau, end in zip(taus, ends, strict=True):
        span_BL = (steps > tau) & (steps <= end)
        kept = span_BL.any(dim=1).nonzero()[:, 0]
        row.append(kept)
        span.append(span_BL[kept])
        masked.append((steps[kept] == 0) | (steps[kept] > tau[kept]))
    return Latents(torch.cat(row), torch.cat(masked), torch.cat(span).float())


def _check_boundaries(boundaries: Sequence[int | Tensor], rows: int) -> None:
    if isinstance(boundaries, str) or not hasattr(boundaries, "__getitem__"):
        raise ValueError(f"boundaries must be a list of steps, such as [0, 3], got {boundaries!r}")
    for tau in boundaries:
        integral = tau.dtype in (torch.int64, torch.int32) if isinstance(tau, Tensor) else hasattr(tau, "__index__")
        if isinstance(tau, bool) or not integral:
            raise ValueError(f"each of boundaries must be an int or an int64 tensor [{rows}], got {tau!r}")
        if isinstance(tau, Tensor) and tau.shape not in ((), (rows,)):
            raise ValueError(f"each of boundaries must be an int or a tensor [{rows}], got shape {list(tau.shape)}")
    if len(boundaries) == 0 or bool((torch.as_tensor(boundaries[0]) != 0).any()):
        raise ValueError(f"boundaries must start with 0, got {boundaries}")
    for previous, following in pairwise(boundaries):
        if bool((torch.as_tensor(following) < torch.as_tensor(previous)).any()):
            raise ValueError(f"boundaries must not decrease, got {boundaries}")
