"""linear_logprob: log-probabilities of target tokens straight from hidden states and the LM head."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from diffpo_kernels import backends, validation
from diffpo_kernels.linear_logprob import fused, reference

# On a GPU the logits of 4096 rows at V = 152064 in 16 bits (1.16 GiB) fit into one chunk, which is what makes 6 NDV of 8.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 5 << 28}


@overload
def linear_logprob(
    hidden: Tensor | Sequence[Tensor],
    head: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    banned_ids: Sequence[int] | None = None,
    return_entropy: Literal[False] = False,
    *,
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor | Sequence[Tensor],
    head: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    banned_ids: Sequence[int] | None = None,
    *,
    return_entropy: Literal[True],
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprob(
    hidden: Tensor | Sequence[Tensor],
    head: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    banned_ids: Sequence[int] | None = None,
    return_entropy: bool = False,
    *,
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor | Sequence[Tensor],
    head: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    banned_ids: Sequence[int] | None = None,
    return_entropy: bool = False,
    *,
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of one target token per row under the (tempered) distribution of the LM head.

        z = (hidden[rows] @ head^T + bias) / T, banned columns excluded
        logprob_n = log softmax(z_n)[target_n],        entropy_n = -sum_v p_nv log p_nv,  p = softmax(z), in nats

    Both results are differentiable, once, with respect to hidden, head and bias. The matrix product is formed in the dtype of `hidden`,
    as the network itself forms its logits. torch.autocast changes that only where the dtypes of hidden and head differ (a float32 head
    behind a network that it runs in bfloat16): both are then cast to its dtype, as in torch.nn.functional.linear, and the gradients
    back to their own. The softmax is in float32 (float64 for float64 inputs). The
    logits are never stored whole (chunked.py says what that costs), but for backend "reference". A row whose hidden state holds a NaN
    has NaN results and leaves the other rows alone; the gradient of the head, a sum over rows, it makes NaN.

    Args:
        hidden: [M, D] float, or a sequence of such tensors, which stand for their concatenation.
        head: [V, D], dtype of hidden, but under torch.autocast.
        target: [N] int64 in [0, V) (checked on the CPU). A banned target has logprob -inf. N = 0 gives empty results.
        temperature: T > 0, one number or a float tensor [N]. Not differentiated.
        bias: [V] float or None.
        banned_ids: token ids excluded from the distribution (the mask token).
        return_entropy: also return the entropy.
        rows: [N] int64 in [0, M) (checked on the CPU): the row of hidden from which each target is scored, repeats allowed, instead of
            a gathered copy of the caller's. They are gathered here, into temporary copies: [chunk, D] forward, [N, D] backward and
            for chunk_bytes=0. None: row n from row n; needed where hidden is a sequence of several.
        chunk_bytes: how much memory a chunk of logits may take (at least one row is formed). None: 32 MiB on the CPU, 1.25 GiB on a
            GPU. 0: no logits at all, in backend "triton", without gradients. The reference ignores it.
        backend: None (fastest available), "reference", "native" or "triton". float64 runs in the reference alone.

    Returns:
        logprob [N] float32 (float64 for float64 inputs), or (logprob, entropy).

    Raises:
        TypeError, ValueError: an argument is wrong. RuntimeError: the backend asked for cannot run here.
    """
    hidden, head = _as_autocast(hidden, head)
    sources = _check_hidden(hidden)
    device, dtype, width = sources[0].device, sources[0].dtype, sources[0].shape[1]
    available = sum(source.shape[0] for source in sources)
    validation.check_tensor("head", head, ("V", width), (dtype,), device)
    vocabulary = head.shape[0]
    if vocabulary == 0:
        raise ValueError(f"head must have V >= 1, got shape {list(head.shape)}")
    if rows is not None:
        validation.check_tensor("rows", rows, ("N",), (torch.int64,), device)
        validation.check_index_range("rows", rows, available)
    elif len(sources) > 1:
        raise ValueError(
            f"rows must be a tensor [N] where hidden is a sequence of several, here {len(sources)}, got None"
        )
    count = available if rows is None else rows.shape[0]
    validation.check_tensor("target", target, (count,), (torch.int64,), device)
    validation.check_index_range("target", target, vocabulary)
    temperature = validation.check_row_values("temperature", temperature, count, device, 0.0, above=True, finite=True)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach()
    if bias is not None:
        validation.check_tensor("bias", bias, (vocabulary,), validation.ANY_FLOAT, device)
    banned = validation.check_token_ids("banned_ids", banned_ids, vocabulary)

    chosen = _select(backend, device, dtype)
    chunk_bytes = _check_chunk_bytes(chunk_bytes, device, chosen, (*sources, head, bias))
    arguments = (sources, head, target, temperature, bias, banned, return_entropy, rows)
    if chosen == "reference":
        logprob, entropy = reference.linear_logprob(*arguments)
    else:
        logprob, entropy = fused.linear_logprob(*arguments, chunk_bytes, chosen)
    return logprob if entropy is None or not return_entropy else (logprob, entropy)


def _as_autocast(hidden: Tensor | Sequence[Tensor], head: Tensor) -> tuple[Tensor | Sequence[Tensor], Tensor]:
    if isinstance(hidden, Sequence):
        *sources, head = validation.as_autocast(*hidden, head)
        return sources, head
    hidden, head = validation.as_autocast(hidden, head)
    return hidden, head


def _check_hidden(hidden: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that stand for their concatenation."""
    if not isinstance(hidden, Sequence):
        validation.check_tensor("hidden", hidden, ("N", "D"), validation.ANY_FLOAT)
        return (hidden,)
    if not hidden:
        raise ValueError("hidden must be a tensor or a sequence of at least one, got an empty one")
    sources = tuple(hidden)
    first = sources[0]
    validation.check_tensor("hidden[0]", first, ("N", "D"), validation.ANY_FLOAT)
    for i, source in enumerate(sources[1:], start=1):
        validation.check_tensor(f"hidden[{i}]", source, ("N", first.shape[1]), (first.dtype,), first.device)
    return sources


def _select(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    if dtype != torch.float64:
        return backends.select("linear_logprob", device, backend)
    if backend not in (None, "reference"):
        allowed = ", ".join(map(str, validation.HALF_OR_FLOAT))
        raise TypeError(f"hidden must have dtype {allowed} for backend {backend!r}, got {dtype}")
    return "reference"


def _check_chunk_bytes(given: int | None, device: torch.device, backend: str, inputs: tuple[Tensor | None, ...]) -> int:
    if given is None:
        return _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"])
    validation.check_int("chunk_bytes", given)
    if given < 0:
        raise ValueError(f"chunk_bytes must be None or at least 0, got {given}")
    if given == 0 and backend != "triton":
        raise ValueError(
            f"chunk_bytes must be above 0 for backend {backend!r}: only 'triton' can do without logits, got 0"
        )
    if given == 0 and fused.wants_gradient(*inputs):
        raise ValueError(
            "chunk_bytes must be above 0 where a gradient is wanted (hidden, head or bias requires it), got 0"
        )
    return given
