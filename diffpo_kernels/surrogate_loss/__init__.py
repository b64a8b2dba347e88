"""surrogate_loss: the clipped, importance-corrected policy loss with its diagnostics."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffpo_kernels import backends, validation
from diffpo_kernels.surrogate_loss import reference


class SurrogateLoss(NamedTuple):
    """loss: differentiable scalar; diagnostics: detached scalar tensors by name; see `surrogate_loss`."""

    loss: Tensor
    diagnostics: dict[str, Tensor]


def surrogate_loss(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    behaviour: Tensor | None = None,
    reference: Tensor | None = None,
    clip: float = 0.2,
    weight_cap: float = 2.0,
    kl_coefficient: float = 0.0,
    normalisation: str = "sequence",
    backend: str | None = None,
) -> SurrogateLoss:
    """PPO-clip on token log-probabilities, corrected for the gap between the surrogate likelihood and the one really sampled from.

        rho = exp(logprob - old)
        w   = stopgrad(min(weight_cap, exp(old - behaviour)))          1 without behaviour
        J   = norm( w min(rho A, clip(rho, 1 - clip, 1 + clip) A) )
        KL  = norm( exp(reference - logprob) - (reference - logprob) - 1 )   the k3 estimator of KL(pi_theta || pi_ref)
        loss = -J + kl_coefficient KL

    norm is over the tokens selected by mask. "sequence": the mean over all B rows of each row's mean over its tokens (a row without
    tokens counts as zero); "token": the sum over all tokens divided by their number. Without any token the loss is 0.
    Values outside the mask never matter, not even NaN or inf, neither in the loss nor in its gradient.
    Log-ratios are clamped to [-60, 60] inside exp, only to keep it finite. Source: PPO, and DiFFPO for w.

    Args:
        logprob: [B, L] float, log pi_theta; the only argument that is differentiated.
        old: [B, L], the log-probabilities at the start of the update, by the same estimator as logprob.
        advantage: [B].
        mask: [B, L] bool, True at the tokens that count.
        behaviour: [B, L], log-probabilities of the distribution the tokens were really drawn from, or None.
        reference: [B, L], log pi_ref, or None; needed when kl_coefficient > 0.
        clip: eps >= 0, inf for none. weight_cap: > 0, inf for none. kl_coefficient: beta >= 0.
        normalisation: "sequence" or "token".
        backend: None (fastest available) or "reference".

    Returns:
        SurrogateLoss(loss, diagnostics): loss float32 (float64 for float64 logprob). diagnostics, over masked tokens: ratio_mean,
        ratio_max, clip_fraction (tokens whose gradient the clip cut), weight_mean, weight_max, weight_cap_fraction,
        ess = (sum w)^2 / (n sum w^2), kl (normalised like the loss; 0 without reference). All 0 without any token.

    Raises:
        TypeError, ValueError: an argument is wrong. RuntimeError: the backend asked for cannot run here.
    """
    validation.check_tensor("logprob", logprob, ("B", "L"), validation.ANY_FLOAT)
    shape, device = tuple(logprob.shape), logprob.device
    for name, value in (("old", old), ("behaviour", behaviour), ("reference", reference)):
        if name == "old" or value is not None:
            validation.check_tensor(name, value, shape, validation.ANY_FLOAT, device)
    validation.check_tensor("advantage", advantage, shape[:1], validation.ANY_FLOAT, device)
    validation.check_tensor("mask", mask, shape, (torch.bool,), device)
    clip = validation.check_number("clip", clip, 0.0)
    weight_cap = validation.check_number("weight_cap", weight_cap, 0.0, above=True)
    kl_coefficient = validation.check_number("kl_coefficient", kl_coefficient, 0.0, finite=True)
    if kl_coefficient > 0 and reference is None:
        raise ValueError(
            f"reference must be a tensor [B, L] when kl_coefficient > 0 (given {kl_coefficient:g}), got None"
        )
    if normalisation not in ("sequence", "token"):
        raise ValueError(f"normalisation must be 'sequence' or 'token', got {normalisation!r}")

    backends.select("surrogate_loss", device, backend)
    return SurrogateLoss(
        *_plain_torch(
            logprob, old, advantage, mask, behaviour, reference, clip, weight_cap, kl_coefficient, normalisation
        )
    )


_plain_torch = reference.surrogate_loss  # `reference` is also an argument's name, so the function is bound here
