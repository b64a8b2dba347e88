"""linear_logprob: log-probabilities of target tokens straight from hidden states and the LM head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpo_kernels import backends, validation
from diffpo_kernels.linear_logprob import reference


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    banned_ids: Sequence[int] | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of one target token per row under the (tempered) distribution of the LM head.

        z = (hidden @ head^T + bias) / T, banned columns excluded
        logprob_n = log softmax(z_n)[target_n],        entropy_n = -sum_v p_nv log p_nv,  p = softmax(z), in nats

    Both results are differentiable with respect to hidden, head and bias. The matrix product is formed in the dtype of `hidden`, as the
    network itself forms its logits; the softmax is in float32 (float64 for float64 inputs).

    Args:
        hidden: [N, D] float. N = 0 gives empty results.
        head: [V, D], dtype of hidden.
        target: [N] int64 in [0, V) (checked on the CPU). A banned target has logprob -inf.
        temperature: T > 0, one number or a float tensor [N]. Not differentiated.
        bias: [V] float or None.
        banned_ids: token ids excluded from the distribution (the mask token).
        return_entropy: also return the entropy.
        backend: None (fastest available) or "reference".

    Returns:
        logprob [N] float32 (float64 for float64 inputs), or (logprob, entropy).

    Raises:
        TypeError, ValueError: an argument is wrong. RuntimeError: the backend asked for cannot run here.
    """
    validation.check_tensor("hidden", hidden, ("N", "D"), validation.ANY_FLOAT)
    rows, width = hidden.shape
    validation.check_tensor("head", head, ("V", width), (hidden.dtype,), hidden.device)
    vocabulary = head.shape[0]
    if vocabulary == 0:
        raise ValueError(f"head must have V >= 1, got shape {list(head.shape)}")
    validation.check_tensor("target", target, (rows,), (torch.int64,), hidden.device)
    validation.check_index_range("target", target, vocabulary)
    temperature = validation.check_row_values(
        "temperature", temperature, rows, hidden.device, 0.0, above=True, finite=True
    )
    if bias is not None:
        validation.check_tensor("bias", bias, (vocabulary,), validation.ANY_FLOAT, hidden.device)
    banned = validation.check_token_ids("banned_ids", banned_ids, vocabulary)

    backends.select("linear_logprob", hidden.device, backend)
    logprob, entropy = reference.linear_logprob(hidden, head, target, temperature, bias, banned, return_entropy)
    return (logprob, entropy) if return_entropy else logprob
