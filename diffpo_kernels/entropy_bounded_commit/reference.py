"""entropy_bounded_commit_ in plain torch: the definition. Shapes: B rows, L positions. No step waits for the device."""

import torch
from torch import Tensor

from diffpo_kernels.validation import as_row_tensor


@torch.no_grad()
def entropy_bounded_commit_(
    tokens_BL: Tensor,
    proposal_BL: Tensor,
    proxy_BL: Tensor,
    entropy_BL: Tensor,
    gamma: float | Tensor,
    mask_id: int,
    start: int | Tensor,
    end: int | Tensor,
    rule: str,
    proposal_logprob_BL: Tensor | None,
    logprob_BL: Tensor | None,
    commit_step_BL: Tensor | None,
    nfe_B: Tensor | None,
    advance: bool,
    max_window: int,
    _backend: str,
) -> Tensor:
    """See the contract in the package; the arguments are checked already."""
    rows, length = tokens_BL.shape
    device = tokens_BL.device
    position_L = torch.arange(length, device=device)
    start_B1 = as_row_tensor(start, rows, device, torch.int64)[:, None]
    end_B1 = as_row_tensor(end, rows, device, torch.int64)[:, None]
    gamma_B1 = as_row_tensor(gamma, rows, device, torch.float64)[:, None]
    first_B1 = start_B1.clamp(min=0)
    window_BL = (position_L >= first_B1) & (position_L < end_B1)

    active_BL = (tokens_BL == mask_id) & window_BL & (position_L - first_B1 < max_window)
    order_BL = _active_first_by_proxy(active_BL, proxy_BL)
    cost_BL = entropy_BL.double().nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=0).gather(1, order_BL)
    highest_BL = cost_BL.cummax(dim=1).values if length > 0 else cost_BL
    price_BL = _excess(cost_BL, highest_BL) if rule == "joint" else _ranked(cost_BL)
    accepted_BL = price_BL.masked_fill(highest_BL.isinf(), torch.inf) <= gamma_B1
    accepted_BL[:, :1] = True
    prefix_BL = accepted_BL.long().cumprod(dim=1).bool() & active_BL.gather(1, order_BL)

    # not scattered: where torch's deterministic algorithms are asked for, that copies to the device, which waits
    committed_BL = prefix_BL.gather(1, order_BL.argsort(dim=1))
    _write(tokens_BL, committed_BL, proposal_BL)
    if nfe_B is not None:
        nfe_B += active_BL.any(dim=1)
        if commit_step_BL is not None:
            _write(commit_step_BL, committed_BL, nfe_B[:, None])
    if logprob_BL is not None and proposal_logprob_BL is not None:
        _write(logprob_BL, committed_BL, proposal_logprob_BL)
    if advance and isinstance(start, Tensor) and isinstance(end, Tensor):
        left_B = (window_BL & (tokens_BL == mask_id)).any(dim=1)
        left_B |= (end_B1.clamp(max=length) - first_B1 > max_window)[:, 0]  # a broken promise
        next_start_B, next_end_B = end.clamp(max=length), (2 * end - start).clamp(max=length)
        _write(start, ~left_B, next_start_B)
        _write(end, ~left_B, next_end_B)
    return committed_BL


def _write(target: Tensor, where: Tensor, value: Tensor) -> None:
    target.copy_(torch.where(where, value, target))


def _active_first_by_proxy(active_BL: Tensor, proxy_BL: Tensor) -> Tensor:
    """Positions sorted by (inactive, proxy, position): two stable sorts, the less significant key first."""
    by_proxy_BL = proxy_BL.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(dim=1, stable=True)
    inactive_BL = (~active_BL).gather(1, by_proxy_BL).to(torch.int8)
    return by_proxy_BL.gather(1, inactive_BL.argsort(dim=1, stable=True))


def _excess(cost_BL: Tensor, highest_BL: Tensor) -> Tensor:
    """sum - max of every prefix: a running sum of min(cost_k, max of the costs before k), so that nothing cancels."""
    step_BL = torch.zeros_like(cost_BL)
    step_BL[:, 1:] = torch.minimum(cost_BL[:, 1:], highest_BL[:, :-1])
    return step_BL.cumsum(dim=1)


def _ranked(cost_BL: Tensor) -> Tensor:
    """(n + 1) cost_n, n = 1, 2, ..."""
    return cost_BL * torch.arange(2, cost_BL.shape[1] + 2, device=cost_BL.device)
