"""surrogate_loss in plain torch: the definition. Shapes: B rows, L positions."""

import math

import torch
from torch import Tensor

from diffpo_kernels.surrogate_loss.diagnostics import BY_BIN, HISTOGRAM_BY_BIN, HISTOGRAM_SIZE

LARGEST_EXPONENT = 60.0  # exp stays finite in float32; no meaningful ratio is near


def surrogate_loss(
    logprob_BL: Tensor,
    old_BL: Tensor,
    advantage: Tensor,
    mask_BL: Tensor,
    behaviour_BL: Tensor | None,
    reference_BL: Tensor | None,
    step_bin_BL: Tensor | None,
    bins: int,
    clip: float,
    weight_cap: float,
    kl_coefficient: float,
    importance_correction: bool,
    normalisation: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See the contract in the package; the arguments are checked already."""
    precise = torch.promote_types(logprob_BL.dtype, torch.float32)

    def inside_mask(values_BL: Tensor) -> Tensor:
        # Before any arithmetic: a NaN that meets a zero gradient later would still be NaN.
        return torch.where(mask_BL, values_BL.to(precise), 0.0)

    logprob_BL, old_BL = inside_mask(logprob_BL), inside_mask(old_BL.detach())
    advantage_BL = inside_mask(advantage.detach() if advantage.dim() == 2 else advantage.detach()[:, None])
    ratio_BL = _bounded_exp(logprob_BL - old_BL)
    log_weight_BL = torch.zeros_like(old_BL) if behaviour_BL is None else old_BL - inside_mask(behaviour_BL.detach())
    uncapped_BL = _bounded_exp(log_weight_BL)
    weight_BL = torch.ones_like(old_BL)
    capped_BL = torch.zeros_like(mask_BL)
    if behaviour_BL is not None and importance_correction:
        weight_BL = uncapped_BL.clamp(max=weight_cap)
        capped_BL = mask_BL & (weight_BL >= weight_cap)

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
        cut_BL = mask_BL & (too_high_BL | too_low_BL)
        diagnostics = {
            "ratio_mean": _mean(ratio_BL, mask_BL),
            "ratio_max": _max_or_zero(torch.where(mask_BL, ratio_BL, 0.0)),
            "clip_fraction": _mean(cut_BL, mask_BL),
            "weight_mean": _mean(weight_BL, mask_BL),
            "weight_max": _max_or_zero(torch.where(mask_BL, weight_BL, 0.0)),
            "weight_cap_fraction": _mean(capped_BL, mask_BL),
            "ess": _effective_sample_size(weight_BL, mask_BL),
            "kl": kl,
            "weight_histogram": _histogram(log_weight_BL, mask_BL),
        }
        if step_bin_BL is not None:
            chosen = [mask_BL & (step_bin_BL == b) for b in range(bins)]
            values = (
                [chosen_BL.sum() for chosen_BL in chosen],
                [_mean(weight_BL, chosen_BL) for chosen_BL in chosen],
                [_effective_sample_size(weight_BL, chosen_BL) for chosen_BL in chosen],
                [_mean(capped_BL, chosen_BL) for chosen_BL in chosen],
                [_mean(-log_weight_BL, chosen_BL) for chosen_BL in chosen],
                [_effective_sample_size(uncapped_BL, chosen_BL) for chosen_BL in chosen],
            )
            diagnostics[HISTOGRAM_BY_BIN] = torch.stack([_histogram(log_weight_BL, chosen_BL) for chosen_BL in chosen])
            diagnostics |= {name: torch.stack(list(of_bins)) for name, of_bins in zip(BY_BIN, values, strict=True)}
    return loss, {name: value.detach().to(precise) for name, value in diagnostics.items()}


def _bounded_exp(exponent_BL: Tensor) -> Tensor:
    return exponent_BL.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()


def _normalise(values_BL: Tensor, mask_BL: Tensor, normalisation: str) -> Tensor:
    """Mean over rows of the mean over a row's tokens ("sequence"), or the mean over all tokens ("token"); 0 where there is nothing."""
    values_BL = torch.where(mask_BL, values_BL, 0.0)
    if normalisation == "token":
        return values_BL.sum() / mask_BL.sum().clamp(min=1)
    return (values_BL.sum(dim=1) / mask_BL.sum(dim=1).clamp(min=1)).sum() / max(len(values_BL), 1)


def _mean(values_BL: Tensor, chosen_BL: Tensor) -> Tensor:
    """Over the chosen tokens; 0 without any."""
    return torch.where(chosen_BL, values_BL.double(), 0.0).sum() / chosen_BL.sum().clamp(min=1)


def _effective_sample_size(weight_BL: Tensor, chosen_BL: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) over the chosen tokens, in float64, where no square overflows; 0 without any."""
    weight_BL = torch.where(chosen_BL, weight_BL.double(), 0.0)
    squares = weight_BL.square().sum()
    return weight_BL.sum().square() / (chosen_BL.sum() * squares).clamp(min=torch.finfo(torch.float64).tiny)


def _max_or_zero(values_BL: Tensor) -> Tensor:
    return values_BL.max() if values_BL.numel() else values_BL.new_zeros(())


def _histogram(log_weight_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Counts by octave: bin i holds the weights whose log2 rounds to i - HISTOGRAM_SIZE // 2, the outermost bins all beyond."""
    octave_BL = (log_weight_BL * (1 / math.log(2)) + 0.5).floor().clamp(-(HISTOGRAM_SIZE // 2), HISTOGRAM_SIZE // 2)
    octaves = range(-(HISTOGRAM_SIZE // 2), HISTOGRAM_SIZE // 2 + 1)
    return torch.stack([(mask_BL & (octave_BL == octave)).sum() for octave in octaves])
