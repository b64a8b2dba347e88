"""entropy_bounded_commit_ in plain torch: the definition. Shapes: B rows, L positions. No step waits for the device."""

import torch
from torch import Tensor

from diffpo_kernels.validation import as_row_tensor


def entropy_bounded_commit_(
    tokens_BL: Tensor,
    proposal_BL: Tensor,
    proxy_BL: Tensor,
    entropy_BL: Tensor,
    gamma: float | Tensor,
    mask_id: int,
    start: int | Tensor,
    end: int | Tensor,
) -> Tensor:
    """See the contract in the package; the arguments are checked already."""
    rows, length = tokens_BL.shape
    device = tokens_BL.device
    if tokens_BL.numel() == 0:
        return torch.zeros_like(tokens_BL, dtype=torch.bool)
    position_L = torch.arange(length, device=device)
    start_B1 = as_row_tensor(start, rows, device, torch.int64)[:, None]
    end_B1 = as_row_tensor(end, rows, device, torch.int64)[:, None]
    gamma_B1 = as_row_tensor(gamma, rows, device, torch.float64)[:, None]

    active_BL = (tokens_BL == mask_id) & (position_L >= start_B1) & (position_L < end_B1)
    order_BL = _active_first_by_proxy(active_BL, proxy_BL)
    cost_BL = entropy_BL.double().nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=0).gather(1, order_BL)
    fits_BL = (_excess(cost_BL) <= gamma_B1) & active_BL.gather(1, order_BL)

    committed_BL = torch.zeros_like(active_BL).scatter_(1, order_BL, fits_BL)
    tokens_BL.copy_(torch.where(committed_BL, proposal_BL, tokens_BL))
    return committed_BL


def _active_first_by_proxy(active_BL: Tensor, proxy_BL: Tensor) -> Tensor:
    """Positions sorted by (inactive, proxy, position): two stable sorts, the less significant key first."""
    by_proxy_BL = proxy_BL.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(dim=1, stable=True)
    inactive_BL = (~active_BL).gather(1, by_proxy_BL).to(torch.int8)
    return by_proxy_BL.gather(1, inactive_BL.argsort(dim=1, stable=True))


def _excess(cost_BL: Tensor) -> Tensor:
    """sum - max of every prefix. It never falls along the prefix, so "longest prefix" is "all prefixes up to the first failure".

    Written as a running sum of min(cost_k, max of the costs before k): the same number without the cancellation of sum - max, and
    without inf - inf.
    """
    highest_BL = cost_BL.cummax(dim=1).values
    step_BL = torch.zeros_like(cost_BL)
    step_BL[:, 1:] = torch.minimum(cost_BL[:, 1:], highest_BL[:, :-1])
    excess_BL = step_BL.cumsum(dim=1)
    excess_BL[:, 1:].masked_fill_(highest_BL[:, 1:].isinf(), torch.inf)
    return excess_BL
