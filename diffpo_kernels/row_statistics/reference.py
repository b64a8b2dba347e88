"""row_statistics in plain torch: the definition. Shapes: N rows, V vocabulary."""

import torch
from torch import Tensor

from diffpo_kernels.validation import as_row_tensor


def row_statistics(
    logits_NV: Tensor, temperature: float | Tensor, uniform_N: Tensor | None, banned: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """See the contract in the package; the arguments are checked already."""
    x_NV = logits_NV.float()
    if banned:
        x_NV = x_NV.index_fill(1, torch.tensor(banned, device=x_NV.device), -torch.inf)

    token_N = x_NV.argmax(dim=1)
    max_N = x_NV.gather(1, token_N[:, None])[:, 0]
    valid_N = (
        max_N.isfinite()
    )  # argmax treats NaN as the largest value; -inf here means that the row has no finite entry
    shifted_NV = torch.where(valid_N[:, None], x_NV - max_N[:, None], 0.0)  # <= 0, and harmless in invalid rows

    weight_NV = shifted_NV.exp()
    others_NV = weight_NV.scatter(1, token_N[:, None], 0.0)
    odds_N = others_NV.sum(dim=1)  # without the largest, which is 1 and would swallow small ones
    total_N = 1 + odds_N
    log_total_N = odds_N.log1p()
    entropy_N = log_total_N - torch.where(weight_NV > 0, shifted_NV * weight_NV, 0.0).sum(dim=1) / total_N
    logprob_N, confidence_N = -log_total_N, 1 / total_N

    if uniform_N is not None:
        temperature_N = as_row_tensor(temperature, len(x_NV), x_NV.device, torch.float64)
        drawn_N, drawn_logprob_N = _draw(shifted_NV, temperature_N, uniform_N)
        token_N = torch.where(temperature_N > 0, drawn_N, token_N)
        confidence_N = weight_NV.gather(1, token_N[:, None])[:, 0] / total_N
        logprob_N = torch.where(temperature_N > 0, drawn_logprob_N, logprob_N)

    def or_nan(values_N: Tensor) -> Tensor:
        return torch.where(valid_N, values_N, torch.nan)

    return (
        torch.where(valid_N, token_N, -1),
        or_nan(logprob_N),
        or_nan(entropy_N.clamp(min=0)),  # rounding must not make a certain row's entropy negative
        or_nan(confidence_N),
        or_nan(1 / total_N),
        or_nan(others_NV.amax(dim=1) / total_N),
        or_nan(odds_N),
        or_nan(max_N + log_total_N),
        valid_N,
    )


def _draw(shifted_NV: Tensor, temperature_N: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draw in float64; rows with T = 0 get a draw at T = 1 that the caller throws away."""
    safe_temperature_N1 = torch.where(temperature_N > 0, temperature_N, 1.0)[:, None]
    scaled_NV = shifted_NV.double() / safe_temperature_N1
    cumulative_NV = scaled_NV.exp().cumsum(dim=1)
    total_N1 = cumulative_NV[:, -1:].contiguous()
    # Strictly below the total, so that the search ends at the last token with a positive probability even if u * total rounds up.
    threshold_N1 = torch.minimum(uniform_N.double()[:, None] * total_N1, total_N1.nextafter(torch.zeros_like(total_N1)))
    token_N1 = torch.searchsorted(cumulative_NV, threshold_N1, right=True)
    logprob_N1 = scaled_NV.gather(1, token_N1) - total_N1.log()
    return token_N1[:, 0], logprob_N1[:, 0].float()
