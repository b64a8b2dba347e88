"""entropy_bounded_commit_: which masked positions a denoising step commits, written in place."""

import torch
from torch import Tensor

from diffpo_kernels import backends, validation
from diffpo_kernels.entropy_bounded_commit import reference


@torch.no_grad()
def entropy_bounded_commit_(
    tokens: Tensor,
    proposal: Tensor,
    proxy: Tensor,
    entropy: Tensor,
    gamma: float | Tensor,
    mask_id: int,
    start: int | Tensor,
    end: int | Tensor,
    backend: str | None = None,
) -> Tensor:
    """Commit the longest prefix of the masked positions, most certain first, whose entropies stay within gamma.

    In each row, sort the positions l with start <= l < end and tokens[l] == mask_id by proxy ascending (ties: the lowest position) and
    take the longest prefix U with

        sum_{l in U} entropy[l] - max_{l in U} entropy[l] <= gamma,        at least one position.

    The left side bounds the joint dependence that independent draws ignore, so gamma (nats) is the price paid for committing several
    tokens at once: 0 commits one token a step (more only where entropies are exactly 0), inf the whole window. Source: the
    Entropy-Bounded sampler, arXiv 2505.24857. A row without a masked position in its window commits nothing.

    `entropy` is simply the cost, so any prefix rule can be written as data: unit costs and gamma = k - 1 commit exactly the k best
    positions (a fixed schedule), and a confidence threshold is that rule with k = the number of positions above the threshold.

    A NaN cost counts as +inf and one below 0 as 0; a NaN proxy sorts last. A prefix of two or more that holds an infinite cost exceeds
    every finite gamma, so such a position is committed only alone, as the first, or when gamma is inf.

    Args:
        tokens: [B, L] int64, changed in place: proposal is written at the committed positions.
        proposal: [B, L] int64, read at committed positions only.
        proxy: [B, L] float, the order: lower is committed earlier (entropy, negative confidence, negative margin).
        entropy: [B, L] float, the costs, in nats for the published rule. Prefix sums are in float64.
        gamma: >= 0, inf allowed, one number or a float tensor [B].
        mask_id: the mask token's id.
        start, end: the active window, half-open: an int or an int64 tensor [B]. Parts outside [0, L) hold no positions.
        backend: None (fastest available) or "reference".

    Returns:
        committed [B, L] bool, True where a token was written.

    Raises:
        TypeError, ValueError: an argument is wrong. RuntimeError: the backend asked for cannot run here.
    """
    validation.check_tensor("tokens", tokens, ("B", "L"), (torch.int64,))
    shape, device = tuple(tokens.shape), tokens.device
    validation.check_tensor("proposal", proposal, shape, (torch.int64,), device)
    validation.check_tensor("proxy", proxy, shape, validation.ANY_FLOAT, device)
    validation.check_tensor("entropy", entropy, shape, validation.ANY_FLOAT, device)
    gamma = validation.check_row_values("gamma", gamma, shape[0], device, 0.0)
    validation.check_int("mask_id", mask_id)
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, Tensor):
            validation.check_tensor(name, value, shape[:1], (torch.int64,), device)
        else:
            validation.check_int(name, value)

    backends.select("entropy_bounded_commit_", device, backend)
    return reference.entropy_bounded_commit_(tokens, proposal, proxy, entropy, gamma, mask_id, start, end)
