"""surrogate_loss in plain torch: the definition. Shapes: B rows, L positions."""

import torch
from torch import Tensor

_LARGEST_EXPONENT = 60.0  # exp stays finite in float32 with room for a product; no meaningful ratio is near


def surrogate_loss(
    logprob_BL: Tensor,
    old_BL: Tensor,
    advantage_B: Tensor,
    mask_BL: Tensor,
    behaviour_BL: Tensor | None,
    reference_BL: Tensor | None,
    clip: float,
    weight_cap: float,
    kl_coefficient: float,
    normalisation: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See the contract in the package; the arguments are checked already."""
    precise = torch.promote_types(logprob_BL.dtype, torch.float32)

    def inside_mask(values_BL: Tensor) -> Tensor:
        # Before any arithmetic: a NaN that meets a zero gradient later would still be NaN.
        return torch.where(mask_BL, values_BL.to(precise), 0.0)

    logprob_BL, old_BL = inside_mask(logprob_BL), inside_mask(old_BL.detach())
    advantage_BL = inside_mask(advantage_B.detach()[:, None])
    ratio_BL = _bounded_exp(logprob_BL - old_BL)
    weight_BL = torch.ones_like(old_BL)
    if behaviour_BL is not None:
        weight_BL = _bounded_exp(old_BL - inside_mask(behaviour_BL.detach())).clamp(max=weight_cap)

    # min(rho A, clip(rho) A) is rho A except where rho left the interval on the side that A rewards: there it is constant.
    too_high_BL = (advantage_BL > 0) & (ratio_BL > 1 + clip)
    too_low_BL = (advantage_BL < 0) & (ratio_BL < 1 - clip)
    clipped_BL = torch.where(too_high_BL, 1 + clip, torch.where(too_low_BL, 1 - clip, ratio_BL))
    loss = -_normalise(weight_BL * clipped_BL * advantage_BL, mask_BL, normalisation)

    kl = torch.zeros_like(loss)
    if reference_BL is not None:
        gap_BL = inside_mask(reference_BL.detach()) - logprob_BL
        kl = _normalise(_bounded_exp(gap_BL) - gap_BL - 1, mask_BL, normalisation)
        if kl_coefficient > 0:
            loss = loss + kl_coefficient * kl

    with torch.no_grad():
        diagnostics = _diagnostics(ratio_BL, weight_BL, too_high_BL | too_low_BL, mask_BL, weight_cap)
    return loss, diagnostics | {"kl": kl.detach()}


def _bounded_exp(exponent_BL: Tensor) -> Tensor:
    return exponent_BL.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp()


def _normalise(values_BL: Tensor, mask_BL: Tensor, normalisation: str) -> Tensor:
    """Mean over rows of the mean over a row's tokens ("sequence"), or the mean over all tokens ("token"); 0 where there is nothing."""
    values_BL = torch.where(mask_BL, values_BL, 0.0)
    if normalisation == "token":
        return values_BL.sum() / mask_BL.sum().clamp(min=1)
    return (values_BL.sum(dim=1) / mask_BL.sum(dim=1).clamp(min=1)).sum() / max(len(values_BL), 1)


def _diagnostics(
    ratio_BL: Tensor, weight_BL: Tensor, cut_BL: Tensor, mask_BL: Tensor, weight_cap: float
) -> dict[str, Tensor]:
    ratio_BL, weight_BL = torch.where(mask_BL, ratio_BL, 0.0), torch.where(mask_BL, weight_BL, 0.0)
    count = mask_BL.sum().clamp(min=1)
    squares = weight_BL.square().sum()
    return {
        "ratio_mean": ratio_BL.sum() / count,
        "ratio_max": _max_or_zero(ratio_BL),
        "clip_fraction": (cut_BL & mask_BL).sum() / count,
        "weight_mean": weight_BL.sum() / count,
        "weight_max": _max_or_zero(weight_BL),
        "weight_cap_fraction": (mask_BL & (weight_BL >= weight_cap)).sum() / count,
        "ess": weight_BL.sum().square() / (count * squares).clamp(min=torch.finfo(squares.dtype).tiny),
    }


def _max_or_zero(values_BL: Tensor) -> Tensor:
    return values_BL.max() if values_BL.numel() else values_BL.new_zeros(())
