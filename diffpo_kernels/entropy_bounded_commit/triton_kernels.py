"""entropy_bounded_commit_ in Triton: one program per row, everything between the loads and the stores in registers.

Only the row's window is looked at. Its positions are sorted as packed int64 keys (proxy in the upper half, place in the window in the
lower), which is stable without more ado; costs are then gathered in that order and scanned.

The scan is over pairs (excess, highest) = (sum - max, max) of a run of costs. Two neighbouring runs join as

    sum_1 + sum_2 - max(max_1, max_2) = excess_1 + excess_2 + min(max_1, max_2),        max(max_1, max_2)

without a subtraction, so nothing cancels. In float64 a sum of float32 costs whose sizes lie within a factor of 2^29 / BLOCK of each other
is exact in any order, and then equals the reference's bit by bit; otherwise the two can differ by rounding, 1e-16 relative.
"""

import triton
import triton.language as tl

from diffpo_kernels.aot_case import AotCase

RULE_CODE = {"joint": 0, "ranked": 1}
_CHUNK = tl.constexpr(128)
# Warps per block size, else 1, which sorts without barriers. A long sort is spread over as many as keep the keys in registers; 16 at 1024
# spilled on sm_100.
WARPS = {128: 2, 256: 4, 512: 8, 1024: 8, 2048: 16}


@triton.jit
def _join(excess_1, highest_1, excess_2, highest_2):
    return excess_1 + excess_2 + tl.minimum(highest_1, highest_2), tl.maximum(highest_1, highest_2)


@triton.jit
def _ascending(proxy):
    """fp32 -> int32 in the same order; NaN as +inf, -0 as 0. The largest int32 stays free."""
    proxy = tl.where(proxy != proxy, float("inf"), proxy)
    bits = tl.where(proxy == 0, 0.0, proxy).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _to_float64(value):
    return value if value.dtype == tl.float64 else value.to(tl.float32).to(tl.float64)


_NUMBERS = ["gamma_bits", "mask_id", "start_of_all", "end_of_all", "rule", "length", "max_window"]
_ROWS = ("tokens", "proposal", "proxy", "entropy", "proposal_logprob", "logprob", "commit_step")
_POINTERS = [f"{name}_ptr" for name in (*_ROWS, "committed", "gamma", "start", "end", "nfe")]


# Nothing of a call is specialised on: a new gamma, mask id or width of the prompts must not compile a new kernel, and where a window begins
# is known only here, so that no alignment helps. The type of an int is part of the kernel too and goes by its size (the bits of 0.0 are an
# int32) unless it is given. The interpreter takes no notice, hence the casts below.
@triton.jit(
    do_not_specialize=[*_NUMBERS, *(f"{name}_stride" for name in _ROWS)], do_not_specialize_on_alignment=_POINTERS
)
def entropy_bounded_commit_kernel(
    tokens_ptr,  # [B, L], rows strided
    proposal_ptr,
    proxy_ptr,
    entropy_ptr,
    proposal_logprob_ptr,  # None where logprob is
    logprob_ptr,
    commit_step_ptr,
    committed_ptr,  # [B, L], contiguous
    gamma_ptr,  # [B], or None for one number given as the bits of a float64: Triton would round a float argument to fp32
    start_ptr,  # [B], or None for one number
    end_ptr,
    nfe_ptr,
    tokens_stride,
    proposal_stride,
    proxy_stride,
    entropy_stride,
    proposal_logprob_stride,
    logprob_stride,
    commit_step_stride,
    gamma_bits: tl.int64,
    mask_id: tl.int64,
    start_of_all: tl.int64,
    end_of_all: tl.int64,
    rule,
    length,
    max_window,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Everything that is also written is read up here, ahead of the barriers of the sort: other warps write it below.
    if gamma_ptr is None:
        gamma = gamma_bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        gamma = _to_float64(tl.load(gamma_ptr + row))
    start = start_of_all.to(tl.int64) if start_ptr is None else tl.load(start_ptr + row)
    end = end_of_all.to(tl.int64) if end_ptr is None else tl.load(end_ptr + row)
    if nfe_ptr is not None:
        nfe = tl.load(nfe_ptr + row)
    first = tl.minimum(tl.maximum(start, 0), length)
    last = tl.minimum(end, length)
    rank = tl.arange(0, BLOCK)
    position = first + rank
    inside = (position < last) & (rank < max_window)
    active = inside & (tl.load(tokens_ptr + row * tokens_stride + position, mask=inside, other=0) == mask_id)
    count = tl.sum(active.to(tl.int32))

    proxy = tl.load(proxy_ptr + row * proxy_stride + position, mask=active, other=0.0).to(tl.float32)
    key = tl.where(active, _ascending(proxy), 0x7FFFFFFF).to(tl.int64)
    key = tl.sort((key << 32) | rank)
    position = first + (key & 0xFFFFFFFF)
    active = rank < count

    cost = _to_float64(tl.load(entropy_ptr + row * entropy_stride + position, mask=active, other=0.0))
    cost = tl.where(cost != cost, float("inf"), tl.maximum(cost, 0.0))
    excess, highest = tl.associative_scan((tl.zeros_like(cost), cost), 0, _join)
    price = tl.where(rule == 1, (rank + 2).to(tl.float64) * cost, excess)
    price = tl.where(highest == float("inf"), float("inf"), price)
    refused = active & (rank > 0) & ~(price <= gamma)
    accepted = rank < tl.minimum(tl.min(tl.where(refused, rank, BLOCK)), count)

    proposal = tl.load(proposal_ptr + row * proposal_stride + position, mask=accepted, other=0)
    tl.store(tokens_ptr + row * tokens_stride + position, proposal, mask=accepted)
    if logprob_ptr is not None:
        logprob = tl.load(proposal_logprob_ptr + row * proposal_logprob_stride + position, mask=accepted, other=0.0)
        tl.store(logprob_ptr + row * logprob_stride + position, logprob, mask=accepted)
    if nfe_ptr is not None:
        nfe += (count > 0).to(tl.int64)
        tl.store(nfe_ptr + row, nfe)
        if commit_step_ptr is not None:
            tl.store(
                commit_step_ptr + row * commit_step_stride + position, tl.zeros_like(position) + nfe, mask=accepted
            )
    if ADVANCE:
        left = tl.sum((active & ~(accepted & (proposal != mask_id))).to(tl.int32))
        full = (left == 0) & (last - first <= max_window)
        tl.store(start_ptr + row, last, mask=full)
        tl.store(end_ptr + row, tl.minimum(2 * end - start, length), mask=full)

    # Each position of the block once, in sorted order, then those around it: no byte is written twice.
    committed_ptr += row * length
    tl.store(committed_ptr + position, accepted, mask=position < length)
    around = tl.arange(0, _CHUNK)
    covered = first.to(tl.int32)
    while tl.min(around) < length:
        outside = (around < covered) | (around >= covered + BLOCK)
        tl.store(committed_ptr + around, outside & False, mask=outside & (around < length))
        around += _CHUNK


def block_of(max_window: int) -> int:
    """Positions a program holds."""
    return max(16, triton.next_power_of_2(max_window))


def aot_cases() -> list[AotCase]:
    int64s, floats = (
        ("tokens", "proposal", "commit_step", "start", "end", "nfe"),
        ("proxy", "entropy", "gamma", "proposal_logprob", "logprob"),
    )
    signature = {f"{name}_ptr": "*i64" for name in int64s} | {f"{name}_ptr": "*fp32" for name in floats}
    signature |= {"committed_ptr": "*i1"} | {f"{name}_stride": "i32" for name in _ROWS}
    signature |= dict.fromkeys(("gamma_bits", "mask_id", "start_of_all", "end_of_all"), "i64")
    signature |= dict.fromkeys(("rule", "length", "max_window"), "i32")
    signature |= {"ADVANCE": "constexpr", "BLOCK": "constexpr"}
    kernel = entropy_bounded_commit_kernel
    return [
        AotCase(
            name=f"entropy_bounded_commit_ window {block}",
            kernel=kernel,
            signature={name: signature[name] for name in kernel.arg_names},
            constexprs={"ADVANCE": True, "BLOCK": block},
            num_warps=WARPS.get(block, 1),
            elements=block,
        )
        for block in (32, 128, 1024, 2048)
    ]
