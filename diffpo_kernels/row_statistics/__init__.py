"""row_statistics: everything a denoising step asks of one row of logits, in one pass over memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpo_kernels import backends, validation
from diffpo_kernels.row_statistics import compiled, reference


class RowStatistics(NamedTuple):
    """One entry per row, all of shape [N]; see `row_statistics`."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    confidence: Tensor
    top1: Tensor
    top2: Tensor
    odds: Tensor
    lse: Tensor
    valid: Tensor


@torch.no_grad()
def row_statistics(
    logits: Tensor,
    temperature: float | Tensor = 0.0,
    uniform: Tensor | None = None,
    banned_ids: Sequence[int] | None = None,
    backend: str | None = None,
) -> RowStatistics:
    """Pick one token per row of logits and describe the distribution it came from.

    With x the row without the banned ids, p = softmax(x) and q = softmax(x / T), natural logarithms throughout:

        token    T = 0: argmax x, the lowest index on ties
                 T > 0: the exact inverse-CDF draw: the first index i with q_0 + ... + q_i > uniform
        logprob  T = 0: log p[token].  T > 0: log q[token].
                 (At T = 0 the drawn distribution is a point mass whose log-probability is always 0 and says nothing, so the untempered
                 one is used.)
        entropy  -sum p log p in nats; a term with p = 0 counts 0
        confidence  p[token]; at T = 0 it is top1
        top1     max p
        top2     the second largest p (equal to top1 on a tie; 0 if there is no second token)
        odds     (1 - top1) / top1, the odds against the most probable token
        lse      log sum exp x
        valid    False if x holds a NaN or +inf, or no finite value

    entropy, top1, top2, odds and lse never depend on T. Everything but lse comes from differences to the largest logit, so its digits do not
    depend on how large the logits are. Near certainty a probability rounds to 1 in float32; logprob at T = 0, entropy and odds go to 0
    there and keep their digits, because the sum of the other tokens' exponentials is formed without the largest. An invalid row has token -1 and NaN in every float field; it does not touch other rows.
    A token of probability zero or a banned one is never drawn. NaN or inf in a banned column is not seen.

    Args:
        logits: [N, V] float32, bfloat16 or float16; rows may be strided. V >= 1; N = 0 gives empty results. -inf is probability zero.
        temperature: T >= 0, one number or a float tensor [N]. A positive T below 2^-126 counts as 2^-126,
            one above 2^126 as 2^126.
        uniform: [N] float32 or float64 in [0, 1), one number per row; rows with T = 0 ignore theirs. Needed where T > 0; with a
            temperature tensor on a device other than the CPU it is always needed, so that the host does not have to look.
        banned_ids: token ids excluded from everything (the mask token).
        backend: None (fastest available), "reference", "native", "triton" or "cuda".

    Returns:
        RowStatistics: token int64, valid bool, the rest float32, all [N] on the device of `logits`. Not differentiable.

    Raises:
        TypeError, ValueError: an argument is wrong. RuntimeError: the backend asked for cannot run here.
    """
    validation.check_tensor("logits", logits, ("N", "V"), validation.HALF_OR_FLOAT)
    rows, vocabulary = logits.shape
    if vocabulary == 0:
        raise ValueError(f"logits must have V >= 1, got shape {list(logits.shape)}")
    temperature = validation.check_row_values("temperature", temperature, rows, logits.device, 0.0, finite=True)
    _check_uniform(uniform, temperature, rows, logits.device)
    banned = validation.check_token_ids("banned_ids", banned_ids, vocabulary)

    chosen = backends.select("row_statistics", logits.device, backend)
    if chosen == "reference":
        return RowStatistics(*reference.row_statistics(logits, temperature, uniform, banned))
    return RowStatistics(*compiled.row_statistics(logits, temperature, uniform, banned, chosen))


def _check_uniform(uniform: Tensor | None, temperature: float | Tensor, rows: int, device: torch.device) -> None:
    if uniform is None:
        if not isinstance(temperature, Tensor):
            needed = temperature > 0
        else:
            needed = not validation.values_are_cheap(temperature) or bool((temperature > 0).any())
        if needed:
            raise ValueError("uniform must be a tensor [N] of numbers in [0, 1) where temperature > 0, got None")
        return
    validation.check_tensor("uniform", uniform, (rows,), (torch.float32, torch.float64), device)
    if validation.values_are_cheap(uniform) and rows > 0:
        low, high = (bound.item() for bound in torch.aminmax(uniform))  # NaN if there is one
        if not (low >= 0 and high < 1):
            raise ValueError(f"uniform must lie in [0, 1), got values from {low} to {high}")
