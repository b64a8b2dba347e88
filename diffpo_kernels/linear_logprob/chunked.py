"""linear_logprob without the matrix of logits: a chunk of it at a time, in one buffer. The algorithm of every backend but the reference.

The matrix products are torch's; between them a backend makes two passes over a chunk (native_passes.py, triton_passes.py):

    statistics   reads the logits of some rows; log p = (x - max) / T - log_sum, x the logit with its bias
    gradient_    replaces them by the gradient of the loss with respect to them, in place

Banned columns are filled with -inf before the first and with 0 after the second.

Forward walks over the rows, because a row's sum needs all of its columns. Backward, which has the sums, walks over the columns: each
block then adds to the gradient of hidden, which is small enough for float32, and finishes its own rows of the gradient of the head,
which is not (accumulating that one over chunks of rows would take V D float32). What forward keeps decides the cost:

    "logits"            they fit into one chunk and become the gradient there: 6 NDV floating-point operations in all
    "hidden_gradient"   nothing but hidden is trained, and on the log-probabilities alone: forward already forms the gradient of
                        hidden for an upstream gradient of 1, and backward scales its rows: 4 NDV
    "nothing"           no gradient is wanted (2 NDV), or backward forms the logits again (8 NDV)

Under torch.compile the logits that backward overwrites may be copied first (functionalisation): two chunks of memory, not one.

Shapes: N scored rows, M rows of all hidden tensors, D hidden size, V vocabulary; R rows and C columns of a chunk.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from diffpo_kernels.linear_logprob.rows import Rows

GRADIENT_OF_HIDDEN, LOGITS, NOTHING = "hidden_gradient", "logits", "nothing"  # what forward keeps


def forward(
    hidden: Sequence[Tensor],
    head_VD: Tensor,
    target_N: Tensor,
    temperature_N: Tensor,
    bias_V: Tensor | None,
    banned: Sequence[int],
    rows_N: Tensor | None,
    chunk_bytes: int,
    keep: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """Return logprob, entropy, max and log_sum [N], float32, and what backward reuses (empty for NOTHING)."""
    passes = _passes(backend)
    N, (V, D) = target_N.shape[0], head_VD.shape
    every = Rows(target_N, temperature_N, *(torch.empty_like(temperature_N) for _ in range(4)))
    if chunk_bytes == 0:
        bias_V = torch.zeros_like(head_VD[:, 0]) if bias_V is None and banned else bias_V
        passes.statistics_from_hidden(gather(hidden, rows_N), head_VD, every, _with_banned(bias_V, banned, -torch.inf))
        return *every[2:], head_VD.new_empty(0)

    size = N if keep == LOGITS else max(1, min(N, chunk_bytes // (V * head_VD.element_size())))
    buffer_RV = head_VD.new_empty(size, V)
    kept_ND = head_VD.new_empty(N, D, dtype=product_dtype(head_VD)) if keep == GRADIENT_OF_HIDDEN else None
    bias_V = _with_banned(bias_V, banned, 0.0)
    for begin in range(0, N, max(1, size)):
        end = min(N, begin + size)
        logits_RV, part = buffer_RV[: end - begin], every.part(begin, end)
        torch.mm(gather(hidden, rows_N, begin, end), head_VD.T, out=logits_RV)
        _fill_columns(logits_RV, banned, 0, -torch.inf)
        passes.statistics(logits_RV, part, bias_V)
        if kept_ND is not None:
            passes.gradient_(logits_RV, 0, part, torch.ones_like(part.temperature), None, bias_V, False)
            _fill_columns(logits_RV, banned, 0, 0.0)
            kept_ND[begin:end] = _product(logits_RV, head_VD)
    kept = {GRADIENT_OF_HIDDEN: kept_ND, LOGITS: buffer_RV[:N], NOTHING: None}[keep]
    return *every[2:], head_VD.new_empty(0) if kept is None else kept


def backward(
    by_logprob_N: Tensor,
    by_entropy_N: Tensor | None,
    kept: Tensor | None,
    every: Rows,
    hidden: Sequence[Tensor],
    head_VD: Tensor,
    bias_V: Tensor | None,
    banned: Sequence[int],
    rows_N: Tensor | None,
    needs: Sequence[bool],
    chunk_bytes: int,
    keep: str,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of the concatenation of hidden [M, D], of head and of bias, each None unless `needs` says so.

    kept: what forward kept, overwritten where that is logits; None for NOTHING.
    """
    if kept is not None and keep == GRADIENT_OF_HIDDEN:
        return _to_sources(kept * by_logprob_N[:, None], hidden, rows_N), None, None

    passes = _passes(backend)
    N, V = len(by_logprob_N), head_VD.shape[0]
    needs_hidden, needs_head, needs_bias = needs
    hidden_ND = gather(hidden, rows_N)
    d_head_VD = torch.empty_like(head_VD, memory_format=torch.contiguous_format) if needs_head else None
    d_bias_V = torch.empty_like(bias_V) if needs_bias and bias_V is not None else None
    bias_V = _with_banned(bias_V, banned, 0.0)

    size = V if kept is not None else _columns_per_chunk(N, V, head_VD.element_size(), chunk_bytes)
    buffer = kept.view(-1) if kept is not None else head_VD.new_empty(N * size)
    d_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if needs_hidden and size < V else None
    for begin in range(0, V, size):
        end = min(V, begin + size)
        logits_NC, head_CD = buffer[: N * (end - begin)].view(N, end - begin), head_VD[begin:end]
        if kept is None:
            torch.mm(hidden_ND, head_CD.T, out=logits_NC)
        bias_C = None if bias_V is None else bias_V[begin:end]
        d_bias_GC = passes.gradient_(logits_NC, begin, every, by_logprob_N, by_entropy_N, bias_C, needs_bias)
        _fill_columns(logits_NC, banned, begin, 0.0)
        if d_hidden_ND is not None:
            _add_product_(d_hidden_ND, logits_NC, head_CD)
        elif needs_hidden:
            d_hidden_ND = torch.mm(logits_NC, head_CD)  # the only product
        if d_head_VD is not None:
            torch.mm(logits_NC.T, hidden_ND, out=d_head_VD[begin:end])
        if d_bias_V is not None:
            _fill_columns(d_bias_GC, banned, begin, 0.0)
            d_bias_V[begin:end] = d_bias_GC.sum(0)
    d_hidden = None if d_hidden_ND is None else _to_sources(d_hidden_ND, hidden, rows_N)
    return d_hidden, d_head_VD, d_bias_V


def gather(hidden: Sequence[Tensor], rows_N: Tensor | None, begin: int = 0, end: int | None = None) -> Tensor:
    """Rows begin to end of what is scored, [R, D]; a view where no index is given."""
    if rows_N is None:
        return hidden[0] if begin == 0 and end in (None, len(hidden[0])) else hidden[0][begin:end]
    rows_R = rows_N[begin:end]
    if len(hidden) == 1:
        return hidden[0].index_select(0, rows_R)
    # NaN stays where an index is out of range, which on a GPU nobody checks.
    gathered_RD = hidden[0].new_full((len(rows_R), hidden[0].shape[1]), torch.nan)
    first = 0
    for source_MD in hidden:  # without looking at the index, so that the host need not wait for a device
        if len(source_MD) > 0:
            inside_R = (rows_R >= first) & (rows_R < first + len(source_MD))
            taken_RD = source_MD.index_select(0, (rows_R - first).clamp(0, len(source_MD) - 1))
            torch.where(inside_R[:, None], taken_RD, gathered_RD, out=gathered_RD)
        first += len(source_MD)
    return gathered_RD


def _to_sources(gradient_ND: Tensor, hidden: Sequence[Tensor], rows_N: Tensor | None) -> Tensor:
    """The inverse of `gather`: [M, D] in the dtype of hidden; a row taken several times gets the sum, in a fixed order."""
    if rows_N is None:
        return gradient_ND.to(hidden[0].dtype)
    total_MD = gradient_ND.new_zeros(sum(map(len, hidden)), gradient_ND.shape[1], dtype=torch.float32)
    if total_MD.is_cuda:
        total_MD.index_put_((rows_N,), gradient_ND.float(), accumulate=True)  # sorts; index_add_ would use atomics
    else:
        total_MD.index_add_(0, rows_N, gradient_ND.float())
    return total_MD.to(hidden[0].dtype)


def _fill_columns(matrix_RC: Tensor, banned: Sequence[int], first_column: int, value: float) -> None:
    for token in banned:  # one by one: copying the ids to a device would make the host wait
        if first_column <= token < first_column + matrix_RC.shape[1]:
            matrix_RC.select(1, token - first_column).fill_(value)


def _with_banned(bias_V: Tensor | None, banned: Sequence[int], value: float) -> Tensor | None:
    """The bias in float32, contiguous, with `value` at the banned tokens."""
    if bias_V is None:
        return None
    bias_V = bias_V.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _fill_columns(bias_V[None], banned, 0, value)
    return bias_V


def product_dtype(operand: Tensor) -> torch.dtype:
    """What a product of matrices in 16 bits is returned in: torch can leave it in float32 on CUDA alone."""
    return torch.float32 if operand.is_cuda else operand.dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    wanted = product_dtype(a)
    return torch.mm(a, b) if a.dtype == wanted else torch.mm(a, b, out_dtype=wanted)


def _add_product_(total: Tensor, a_NC: Tensor, b_CD: Tensor) -> None:
    """total += a @ b, in float32 throughout: partial products rounded to 16 bits would double the error of the sum."""
    if a_NC.dtype == torch.float32:
        total.addmm_(a_NC, b_CD)
    elif a_NC.is_cuda:
        total.add_(_product(a_NC, b_CD))
    else:
        for a, b in zip(a_NC.split(1024, dim=1), b_CD.split(1024), strict=True):  # so that the wide copies stay small
            total.addmm_(a.float(), b.float())


def _columns_per_chunk(rows: int, vocabulary: int, entry_size: int, chunk_bytes: int) -> int:
    columns = max(1, min(vocabulary, chunk_bytes // max(1, rows * entry_size)))
    return (
        columns if columns == vocabulary else columns // 128 * 128 or columns
    )  # blocks aligned as matrix products like them


def _passes(backend: str) -> ModuleType:
    if backend == "triton":
        from diffpo_kernels.linear_logprob import triton_passes  # importing this package does not import triton

        return triton_passes
    from diffpo_kernels.linear_logprob import native_passes

    return native_passes
