"""Launches the kernels of triton_kernels.py over a chunk of logits; see chunked.py. An absent bias is any tensor: it is not read."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from diffpo_kernels.linear_logprob import triton_kernels as kernels
from diffpo_kernels.linear_logprob.rows import Rows

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def statistics(logits_RV: Tensor, rows: Rows, bias_V: Tensor | None) -> None:
    """Write logprob, entropy, max and log_sum of `rows`."""
    R, V = logits_RV.shape
    block = _block(V, kernels.STATISTICS_BLOCK)
    parts = triton.cdiv(V, block)
    partials, target_logit_R = _parts(rows, parts)
    with _on(logits_RV.device):
        kernels.part_of_row[(R * parts,)](
            logits_RV,
            logits_RV if bias_V is None else bias_V,
            rows.temperature,
            rows.target,
            partials,
            target_logit_R,
            V,
            parts,
            HAS_BIAS=bias_V is not None,
            BLOCK=block,
        )
        _merge(partials, target_logit_R, rows)


def statistics_from_hidden(hidden_ND: Tensor, head_VD: Tensor, rows: Rows, bias_V: Tensor | None) -> None:
    """As `statistics`, with the logits formed block by block in registers."""
    (N, D), V = hidden_ND.shape, head_VD.shape[0]
    if N == 0:
        return
    hidden_ND, head_VD = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden_ND, head_VD))
    block_n, block_c, block_d, blocks, warps, stages = kernels.FROM_HIDDEN[head_VD.element_size()]
    parts = triton.cdiv(V, block_c * blocks)
    partials, target_logit_N = _parts(rows, parts)
    with _on(head_VD.device):
        kernels.part_of_rows_from_hidden[(triton.cdiv(N, block_n) * parts,)](
            hidden_ND,
            head_VD,
            head_VD if bias_V is None else bias_V,
            rows.temperature,
            rows.target,
            partials,
            target_logit_N,
            N,
            V,
            parts,
            hidden_ND.stride(0),
            head_VD.stride(0),
            D=D,
            HAS_BIAS=bias_V is not None,
            EMULATED=_INTERPRETED,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            BLOCK_D=block_d,
            BLOCKS=blocks,
            num_warps=warps,
            num_stages=stages,
        )
        _merge(partials, target_logit_N, rows)


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
    block = kernels.GRADIENT_BLOCK[sum_rows]  # whatever the last chunk's width: one kernel
    in_group = kernels.SUMMED_ROWS if sum_rows else 1
    groups = triton.cdiv(R, in_group)
    sums_GC = logits_RC.new_empty(groups, C, dtype=torch.float32) if sum_rows else None
    if R > 0:
        with _on(logits_RC.device):
            kernels.gradient_in_place[(groups * triton.cdiv(C, block),)](
                logits_RC,
                logits_RC if bias_C is None else bias_C,
                *(rows.temperature, rows.target, rows.logprob, rows.entropy, rows.max, rows.log_sum),
                by_logprob_R,
                by_logprob_R if by_entropy_R is None else by_entropy_R,
                logits_RC if sums_GC is None else sums_GC,
                R,
                C,
                first_column,
                HAS_BIAS=bias_C is not None,
                HAS_ENTROPY=by_entropy_R is not None,
                SUM_ROWS=sum_rows,
                ROWS=in_group,
                BLOCK=block,
            )
    return sums_GC


def _merge(partials: Tensor, target_logit_R: Tensor, rows: Rows) -> None:
    R, _, parts = partials.shape
    kernels.merge_parts[(R,)](
        partials,
        target_logit_R,
        rows.temperature,
        *rows[2:],
        parts,
        PARTS=triton.next_power_of_2(parts),
    )


def _parts(rows: Rows, parts: int) -> tuple[Tensor, Tensor]:
    """Room for what the parts of each row leave, and for the target's logit: NaN unless some part finds it."""
    return rows.temperature.new_empty(len(rows.target), 3, parts), torch.full_like(rows.temperature, torch.nan)


def _block(columns: int, largest: int) -> int:
    return min(largest, max(128, triton.next_power_of_2(columns)))


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
