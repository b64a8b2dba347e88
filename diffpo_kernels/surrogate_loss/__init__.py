"""surrogate_loss: the clipped, importance-corrected policy loss with its diagnostics."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffpo_kernels import backends, validation
from diffpo_kernels.surrogate_loss import fused, reference
from diffpo_kernels.surrogate_loss.diagnostics import MAX_BINS, WEIGHT_EDGES

__all__ = ["WEIGHT_EDGES", "SurrogateLoss", "surrogate_loss"]


class SurrogateLoss(NamedTuple):
    """loss: differentiable scalar; diagnostics: detached tensors by name; see `surrogate_loss`."""

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
    importance_correction: bool = True,
    step_bin: Tensor | None = None,
    bins: int | None = None,
    backend: str | None = None,
) -> SurrogateLoss:
    """PPO-clip on token log-probabilities, corrected for the gap between the surrogate likelihood and the one really sampled from.

        rho = exp(logprob - old)
        w   = stopgrad(min(weight_cap, exp(old - behaviour)))          1 without behaviour or importance_correction
        J   = norm( w min(rho A, clip(rho, 1 - clip, 1 + clip) A) )
        KL  = norm( exp(reference - logprob) - (reference - logprob) - 1 )   the k3 estimator of KL(pi_theta || pi_ref)
        loss = -J + kl_coefficient KL

    norm is over the tokens selected by mask. "sequence": the mean over all B rows of each row's mean over its tokens (a row without
    tokens counts as zero); "token": the sum over all tokens divided by their number. Without any token the loss is 0.
    Values outside the mask never matter, not even NaN or inf, neither in the loss nor in its gradient.
    Log-ratios are clamped to [-60, 60] inside exp, only to keep each factor finite; their product may still overflow float32 where
    weight_cap is inf. Source: PPO, and DiFFPO for w.

    Args:
        logprob: [B, L] float, log pi_theta, nats; the only argument that is differentiated.
        old: [B, L], the log-probabilities at the start of the update, by the same estimator as logprob.
        advantage: [B], or [B, L] where tokens of a row differ.
        mask: [B, L] bool, True at the tokens that count.
        behaviour: [B, L], log-probabilities of the distribution the tokens were really drawn from, or None.
        reference: [B, L], log pi_ref, or None; needed when kl_coefficient > 0.
        clip: eps >= 0, inf for none. weight_cap: > 0, inf for none. kl_coefficient: beta >= 0.
        normalisation: "sequence" or "token".
        importance_correction: False sets w to 1; behaviour then only serves weight_histogram, also by bin,
            bin/surrogate_kl and bin/ess_uncapped.
        step_bin: int64 [B, L], the bin (of denoising steps) each token is reported in, 0 .. bins - 1, or -1 for none; or None.
        bins: number of bins, 1 to 128; given exactly when step_bin is.
        backend: None (fastest available), "reference", "native" or "triton". Only "reference" can be differentiated twice. "triton"
            has no float64; for it None means "reference".

    Returns:
        SurrogateLoss(loss, diagnostics), both float32 (float64 for float64 logprob). diagnostics, over masked tokens: ratio_mean,
        ratio_max, clip_fraction (tokens whose gradient the clip cut), weight_mean, weight_max, weight_cap_fraction (w at its cap),
        ess = (sum w)^2 / (n sum w^2), kl (normalised like the loss; 0 without reference); weight_histogram [11], the tokens by
        their uncapped weight exp(old - behaviour), between the powers of two in WEIGHT_EDGES. With step_bin also, [bins] each and
        over the masked tokens of a bin: bin/tokens, bin/weight_mean, bin/ess, bin/weight_cap_fraction, bin/surrogate_kl = mean
        of behaviour - old, the estimate of KL(true || surrogate) in nats per token, bin/ess_uncapped, the ess of the uncapped
        weight whether or not it is used, and bin/weight_histogram [bins, 11]. Elsewhere w is the weight that is used: capped, and 1 without importance_correction.
        All 0 without any token (an ess of 0 says just that, or that every w underflowed: else it is at least 1 / n). A token whose
        log-ratio is NaN makes the means and maxima it enters NaN and is left out of the histogram.

    Raises:
        TypeError, ValueError: an argument is wrong. RuntimeError: the backend asked for cannot run here.
    """
    validation.check_tensor("logprob", logprob, ("B", "L"), validation.ANY_FLOAT)
    shape, device = tuple(logprob.shape), logprob.device
    for name, value in (("old", old), ("behaviour", behaviour), ("reference", reference)):
        if name == "old" or value is not None:
            validation.check_tensor(name, value, shape, validation.ANY_FLOAT, device)
    per_token = isinstance(advantage, Tensor) and advantage.dim() == 2
    validation.check_tensor("advantage", advantage, shape if per_token else shape[:1], validation.ANY_FLOAT, device)
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
    _check_bins(step_bin, bins, mask)

    chosen = backends.select("surrogate_loss", device, backend)
    if chosen == "triton" and logprob.dtype == torch.float64:
        if backend is not None:
            raise TypeError("logprob must not have dtype torch.float64 for backend 'triton'; 'reference' takes it")
        chosen = "reference"
    tensors = (logprob, old, advantage, mask, behaviour, reference, step_bin)
    settings = (bins or 0, clip, weight_cap, kl_coefficient, bool(importance_correction), normalisation)
    if chosen == "reference":
        return SurrogateLoss(*_plain_torch(*tensors, *settings))
    return SurrogateLoss(*fused.surrogate_loss(*tensors, *settings, chosen))


_plain_torch = reference.surrogate_loss  # `reference` is also an argument's name, so the function is bound here


def _check_bins(step_bin: Tensor | None, bins: int | None, mask: Tensor) -> None:
    if step_bin is None and bins is None:
        return
    if step_bin is None or bins is None:
        given, missing = ("bins", "step_bin") if step_bin is None else ("step_bin", "bins")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    validation.check_int("bins", bins)
    if not 1 <= bins <= MAX_BINS:
        raise ValueError(f"bins must lie in [1, {MAX_BINS}], got {bins}")
    validation.check_tensor("step_bin", step_bin, tuple(mask.shape), (torch.int64,), mask.device)
    if validation.values_are_cheap(step_bin) and step_bin.numel() > 0:
        low, high = (bound.item() for bound in torch.aminmax(torch.where(mask, step_bin, -1)))
        if low < -1 or high >= bins:
            raise ValueError(f"step_bin must lie in [-1, {bins}) inside the mask, got values from {low} to {high}")
