"""linear_logprob in plain torch: the definition. Shapes: N rows, D hidden size, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpo_kernels.validation import as_row_tensor


def linear_logprob(
    hidden: Sequence[Tensor],
    head_VD: Tensor,
    target_N: Tensor,
    temperature: float | Tensor,
    bias_V: Tensor | None,
    banned: tuple[int, ...],
    return_entropy: bool,
    rows_N: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """See the contract in the package; the arguments are checked already."""
    precise = torch.promote_types(head_VD.dtype, torch.float32)
    with torch.autocast(head_VD.device.type, enabled=False):
        hidden_ND = hidden[0] if rows_N is None else torch.cat(list(hidden))[rows_N]
        logits_NV = (hidden_ND @ head_VD.T).to(precise)
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(precise)
    temperature_N = as_row_tensor(temperature, hidden_ND.shape[0], hidden_ND.device, precise)
    logits_NV = logits_NV / temperature_N[:, None]
    if banned:
        logits_NV = logits_NV.index_fill(1, torch.tensor(banned, device=logits_NV.device), -torch.inf)

    log_p_NV = logits_NV.log_softmax(dim=1)
    logprob_N = log_p_NV.gather(1, target_N[:, None])[:, 0]
    if not return_entropy:
        return logprob_N, None
    # 0 * -inf is NaN in the value and in the gradient, so impossible tokens are zeroed before the product.
    finite_log_p_NV = log_p_NV.masked_fill(log_p_NV == -torch.inf, 0.0)
    return logprob_N, -(log_p_NV.exp() * finite_log_p_NV).sum(dim=1)
