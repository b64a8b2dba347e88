"""The two passes over a chunk of logits in C++, for CPU tensors; see chunked.py and csrc/linear_logprob.h."""

import torch
from torch import Tensor

from diffpo_kernels import backends
from diffpo_kernels.linear_logprob.rows import Rows

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum class Dtype in csrc/row_statistics.h
_ROW_GROUP = 64  # kRowGroup in csrc/linear_logprob.h


def statistics(logits_RV: Tensor, rows: Rows, bias_V: Tensor | None) -> None:
    """Write logprob, entropy, max and log_sum of `rows`."""
    backends.compiled_extension().linear_logprob_statistics_cpu(
        *_chunk(logits_RV, 0, rows, bias_V), torch.get_num_threads()
    )


def gradient_(
    logits_RC: Tensor,
    first_column: int,
    rows: Rows,
    by_logprob_R: Tensor,
    by_entropy_R: Tensor | None,
    bias_C: Tensor | None,
    sum_rows: bool,
) -> Tensor | None:
    """Replace the logits by their gradient; with sum_rows, return sums over groups of rows [G, C] in float32."""
    R, C = logits_RC.shape
    sums_GC = logits_RC.new_empty(-(-R // _ROW_GROUP), C, dtype=torch.float32) if sum_rows else None
    backends.compiled_extension().linear_logprob_gradient_cpu(
        *_chunk(logits_RC, first_column, rows, bias_C),
        by_logprob_R.data_ptr(),
        0 if by_entropy_R is None else by_entropy_R.data_ptr(),
        0 if sums_GC is None else sums_GC.data_ptr(),
        torch.get_num_threads(),
    )
    return sums_GC


def _chunk(logits_RC: Tensor, first_column: int, rows: Rows, bias_C: Tensor | None) -> tuple[object, ...]:
    addresses = [values_R.data_ptr() for values_R in (rows.temperature, rows.target, *rows[2:])]
    return (
        logits_RC.data_ptr(),
        _DTYPE_CODE[logits_RC.dtype],
        *logits_RC.shape,
        first_column,
        0 if bias_C is None else bias_C.data_ptr(),
        addresses,
    )
