"""row_statistics in Triton: two launches.

`_summarise`, one program per (row, chunk), reads the logits once and leaves four numbers per chunk. It keeps no index, no second maximum
and no list of banned ids: at full memory bandwidth a GPU has about 14 instructions per bf16 logit, and these would not fit.
`_finish`, one program per row, first replaces the numbers of chunks that hold a banned id, merges in chunk order, and reads one chunk
again for the argmax and the runner-up (which is in that chunk or the maximum of another), and one for the draw.

A program of the first is a single warp: its reductions are shuffles, without shared memory or barriers.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpo_kernels.aot_case import AotCase

_GRID_LIMIT = 2**31 - 1
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_GROUP = tl.constexpr(64)  # a draw narrows down from chunk to group to entry
_LOWEST = tl.constexpr(-1e30)  # stands for -inf in a product with its exponential, so that it is 0 and not NaN
# Arguments whose alignment changes from call to call, with the number of rows or where a batch begins. One kernel serves all.
_PARTIALS = [f"partial_{kind}" for kind in ("max", "sum", "weighted", "tempered")]
_FIELDS = ("token", "logprob", "entropy", "confidence", "top1", "top2", "odds", "lse", "valid")
_VARYING = ["temperatures", "uniforms", "banned_ids", *_PARTIALS, *(f"{field}_out" for field in _FIELDS)]


def chunk_size(rows: int, vocabulary: int) -> int:
    """Logits per program: 64 per thread where that gives programs enough to fill a GPU, and less where it does not."""
    return 2048 if rows * triton.cdiv(vocabulary, 2048) >= 1024 else 512


def row_statistics(
    logits_NV: Tensor,
    temperature_N: Tensor | None,
    uniform_N: Tensor | None,
    banned_ids: Tensor,
    outputs: tuple[Tensor, ...],
) -> None:
    """Fill `outputs`, on the current device. temperature_N float32 and uniform_N float64, or both None; banned_ids int64; column stride 1."""
    rows, vocabulary = logits_NV.shape
    chunk = chunk_size(rows, vocabulary)
    chunks = triton.cdiv(vocabulary, chunk)
    batch = _GRID_LIMIT // chunks
    for first in range(0, rows, batch):
        part = slice(first, first + batch)
        logits = logits_NV[part]
        temperature = None if temperature_N is None else temperature_N[part]
        uniform = None if uniform_N is None else uniform_N[part]
        partials = torch.empty(4, len(logits), chunks, dtype=torch.float32, device=logits.device)
        shape = (logits, logits.stride(0), vocabulary, chunks)
        options = {"DRAW": uniform is not None, "CHUNK": chunk}
        _summarise[(len(logits) * chunks,)](*shape, temperature, *partials, **options, num_warps=1)
        rest = (temperature, uniform, banned_ids, len(banned_ids), *partials, *(out[part] for out in outputs))
        _finish[(len(logits),)](*shape, *rest, **options, CHUNKS=triton.next_power_of_2(chunks), num_warps=2)


@triton.jit
def _load(row_ptr, begin, vocabulary, SIZE: tl.constexpr):
    """SIZE entries of a row from column `begin` in float32; -inf past its end."""
    offsets = tl.arange(0, SIZE)
    size = tl.minimum(vocabulary - begin, SIZE).to(tl.int32)
    x = tl.load(row_ptr + begin + offsets, mask=offsets < size, other=float("-inf"))
    if x.dtype == tl.bfloat16:  # one instruction, where the conversion takes one and a half
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _load_allowed(row_ptr, begin, vocabulary, banned_ids, banned_count, SIZE: tl.constexpr):
    """The same with -inf at banned ids."""
    x = _load(row_ptr, begin, vocabulary, SIZE)
    k = 0
    while k < banned_count:  # for range() fails in the interpreter of triton 3.6 with numpy 2.4
        offset = tl.load(banned_ids + k) - begin
        offset = tl.where((offset >= 0) & (offset < SIZE), offset, SIZE).to(tl.int32)
        x = tl.where(tl.arange(0, SIZE) == offset, float("-inf"), x)
        k += 1
    return x


@triton.jit
def _exponents(x, max_value):
    """(x - max) log2(e): 0 at the maximum exactly, -inf for -inf, NaN for NaN and +inf."""
    return (x - tl.where(max_value > float("-inf"), max_value, 0.0)) * _LOG2_E


@triton.jit
def _sum(terms):
    """The sum, in two stages: a running float32 sum of many equal terms errs to the same side at every step."""
    return tl.sum(tl.sum(tl.reshape(terms, [terms.shape[0] // 256, 256]), 0), 0)


@triton.jit
def _summary(x):
    """Exponents, max, sum exp(x - max), sum (x - max) exp(x - max) of a chunk. A NaN or +inf makes the sums NaN, whatever the max."""
    max_value = tl.max(x, 0)
    exponents = _exponents(x, max_value)
    terms = tl.exp2(exponents)
    return exponents, max_value, _sum(terms), _sum(tl.maximum(exponents, _LOWEST) * terms) * _LN_2


@triton.jit
def _scale(temperature):
    """1 / T, kept finite so that 0 * scale is 0, and positive so that -inf * scale is -inf."""
    return tl.minimum(tl.maximum(1.0 / temperature, 1.1754943508222875e-38), 1e30)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0: the rounding of 1 + x is divided out again (Goldberg 1991, theorem 4)."""
    above_one = 1.0 + x
    return tl.where(above_one == 1.0, x, tl.log(above_one) * (x / (above_one - 1.0)))


@triton.jit
def _tempered_sum(exponents, untempered, temperature):
    """sum exp((x - max) / T) of a chunk; anything where T = 0."""
    result = untempered
    if temperature != 1:
        result = _sum(tl.exp2(exponents * _scale(temperature)))
    return result


@triton.jit(do_not_specialize_on_alignment=_VARYING)
def _summarise(
    logits,
    row_stride,
    vocabulary,
    chunks,
    temperatures,
    partial_max,
    partial_sum,
    partial_weighted,
    partial_tempered,
    DRAW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // chunks
    begin = (program - row * chunks).to(tl.int64) * CHUNK
    row = row.to(tl.int64)
    x = _load(logits + row * row_stride, begin, vocabulary, CHUNK)
    exponents, max_value, total, weighted = _summary(x)
    tl.store(partial_max + program, max_value)
    tl.store(partial_sum + program, total)
    tl.store(partial_weighted + program, weighted)
    if DRAW:
        tl.store(partial_tempered + program, _tempered_sum(exponents, total, tl.load(temperatures + row)))


@triton.jit
def _choose(weights, threshold):
    """The first entry that takes the running sum above the threshold, and the sum ahead of it.

    Where rounding leaves the sum short of the threshold, the last entry with a positive weight; one of weight 0 is never chosen.
    """
    index = tl.arange(0, weights.shape[0])
    positive = weights > 0
    first = tl.min(tl.where(positive & (tl.cumsum(weights, 0) > threshold), index, weights.shape[0]), 0)
    last = tl.max(tl.where(positive, index, 0), 0)
    choice = tl.minimum(first, last)
    return choice, tl.sum(tl.where(index < choice, weights, 0.0), 0)


@triton.jit
def _entry(values, index):
    """values[index]"""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0.0), 0)


@triton.jit
def _draw(
    row_ptr, vocabulary, banned_ids, banned_count, max_C, tempered_C, row_max, temperature, uniform, CHUNK: tl.constexpr
):
    """The token whose interval of the distribution function holds `uniform`, its logit less the maximum, and its log-probability.

    Inside the chosen chunk weights are relative to its own maximum: none that the first kernel counted is lost to underflow.
    """
    scale = _scale(temperature)
    factor_C = tl.exp2(_exponents(max_C, row_max) * scale)
    weight_C = factor_C.to(tl.float64) * tempered_C.to(tl.float64)
    total = tl.sum(weight_C, 0)
    threshold = uniform * total
    chunk, before = _choose(weight_C, threshold)
    left = (threshold - before) / _entry(factor_C, chunk).to(tl.float64)
    chunk_max = _entry(tl.where(weight_C > 0, max_C, 0.0), chunk)

    begin = chunk.to(tl.int64) * CHUNK
    x = _load_allowed(row_ptr, begin, vocabulary, banned_ids, banned_count, CHUNK)
    weights = tl.exp2(_exponents(x, chunk_max) * scale)
    group, before = _choose(tl.sum(tl.reshape(weights, [CHUNK // _GROUP, _GROUP]), 1).to(tl.float64), left)

    begin += group * _GROUP
    x = _load_allowed(row_ptr, begin, vocabulary, banned_ids, banned_count, _GROUP)
    weights = tl.exp2(_exponents(x, chunk_max) * scale)
    index, _ = _choose(weights.to(tl.float64), left - before)
    chosen = _entry(tl.where(weights > 0, x, 0.0), index)
    return begin + index, chosen - row_max, (chosen - row_max) * scale - tl.log(total.to(tl.float32))


@triton.jit(do_not_specialize=["banned_count"], do_not_specialize_on_alignment=_VARYING)
def _finish(
    logits,
    row_stride,
    vocabulary,
    chunks,
    temperatures,
    uniforms,
    banned_ids,
    banned_count,
    partial_max,
    partial_sum,
    partial_weighted,
    partial_tempered,
    token_out,
    logprob_out,
    entropy_out,
    confidence_out,
    top1_out,
    top2_out,
    odds_out,
    lse_out,
    valid_out,
    DRAW: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * row_stride
    chunk_C = tl.arange(0, CHUNKS)
    there_C = chunk_C < chunks
    where = row * chunks + chunk_C
    max_C = tl.load(partial_max + where, mask=there_C, other=float("-inf"))
    sum_C = tl.load(partial_sum + where, mask=there_C, other=0.0)
    weighted_C = tl.load(partial_weighted + where, mask=there_C, other=0.0)
    if DRAW:
        temperature = tl.load(temperatures + row)
        tempered_C = tl.load(partial_tempered + where, mask=there_C, other=0.0)

    k, done = 0, tl.full([], -1, tl.int64)
    while k < banned_count:
        chunk = tl.load(banned_ids + k) // CHUNK
        if chunk != done:  # the ids are sorted: each chunk is redone once
            x = _load_allowed(row_ptr, chunk * CHUNK, vocabulary, banned_ids, banned_count, CHUNK)
            exponents, max_value, total, weighted = _summary(x)
            max_C = tl.where(chunk_C == chunk, max_value, max_C)
            sum_C = tl.where(chunk_C == chunk, total, sum_C)
            weighted_C = tl.where(chunk_C == chunk, weighted, weighted_C)
            if DRAW:
                tempered_C = tl.where(chunk_C == chunk, _tempered_sum(exponents, total, temperature), tempered_C)
            done = chunk
        k += 1

    row_max = tl.max(max_C, 0)
    gap_C = _exponents(max_C, row_max)
    factor_C = tl.exp2(gap_C)
    gap_C = tl.maximum(gap_C, _LOWEST) * _LN_2
    total = tl.sum(factor_C * sum_C, 0)
    weighted = tl.sum(factor_C * (weighted_C + gap_C * sum_C), 0)

    token = tl.full([], -1, tl.int64)
    logprob = tl.full([], float("nan"), tl.float32)
    entropy, confidence, top1, top2, odds, lse = logprob, logprob, logprob, logprob, logprob, logprob
    valid = total > 0  # a NaN or +inf anywhere made it NaN; without a finite logit it is 0
    if valid:
        chunk = tl.min(tl.where(max_C == row_max, chunk_C, CHUNKS), 0)
        x = _load_allowed(row_ptr, chunk.to(tl.int64) * CHUNK, vocabulary, banned_ids, banned_count, CHUNK)
        offsets = tl.arange(0, CHUNK)
        index = tl.min(tl.where(x == row_max, offsets, CHUNK), 0)
        others = tl.where(offsets == index, float("-inf"), x)
        # Without the largest, which is 1 and would swallow small ones.
        odds = tl.sum(tl.where(chunk_C == chunk, 0.0, factor_C * sum_C), 0) + _sum(tl.exp2(_exponents(others, row_max)))
        total = 1.0 + odds
        log_total = _log1p(odds)
        entropy = tl.maximum(log_total - weighted / total, 0.0)
        top1 = 1.0 / total
        confidence = top1
        lse = row_max + log_total
        elsewhere = tl.max(tl.where(chunk_C == chunk, float("-inf"), max_C), 0)
        second = tl.maximum(elsewhere, tl.max(others, 0))
        top2 = tl.exp(second - row_max) / total
        token = chunk.to(tl.int64) * CHUNK + index
        logprob = -log_total
        if DRAW:  # noqa: SIM102  (a constexpr: the inner condition has no value without it)
            if temperature > 0:
                token, gap, logprob = _draw(
                    row_ptr,
                    vocabulary,
                    banned_ids,
                    banned_count,
                    max_C,
                    tempered_C,
                    row_max,
                    temperature,
                    tl.load(uniforms + row),
                    CHUNK,
                )
                confidence = tl.exp(gap) / total
    tl.store(token_out + row, token)
    tl.store(logprob_out + row, logprob)
    tl.store(entropy_out + row, entropy)
    tl.store(confidence_out + row, confidence)
    tl.store(top1_out + row, top1)
    tl.store(top2_out + row, top2)
    tl.store(odds_out + row, odds)
    tl.store(lse_out + row, lse)
    tl.store(valid_out + row, valid)


def aot_cases() -> list[AotCase]:
    """Both kernels at a vocabulary of 126464 tokens: for many rows, and as one row is cut."""
    choices = (False, True)
    one_row = {"CHUNK": 512, "CHUNKS": 256}
    return [
        *(_summarise_case(dtype, draw) for dtype in ("bf16", "fp32") for draw in choices),
        *(_finish_case(dtype, draw) for dtype in ("bf16", "fp32") for draw in choices),
        *(_resized(case("bf16", draw), one_row) for case in (_summarise_case, _finish_case) for draw in choices),
    ]


def _resized(case: AotCase, sizes: dict[str, int]) -> AotCase:
    return replace(
        case,
        name=case.name.replace("row_statistics", "row_statistics, one row:"),
        constexprs=case.constexprs | {name: size for name, size in sizes.items() if name in case.constexprs},
        elements=sizes["CHUNK"] if case.elements else 0,
        # ptxas puts one value aside on sm_80 (argmax), written and read once per row: no cost beside reading the row.
        max_spills=8 if case.kernel is _finish else 0,
    )


_DIVISIBLE = ("logits", "row_stride", "vocabulary")


def _shape(dtype: str, draw: bool) -> dict[str, str]:
    sizes = {"row_stride": "i32", "vocabulary": "i32", "chunks": "i32"}
    return {"logits": f"*{dtype}"} | sizes | {"temperatures": "*fp32" if draw else "constexpr"}


def _constants(draw: bool, **others: int) -> dict[str, int | bool | None]:
    return {"DRAW": draw, "CHUNK": 2048} | others | ({} if draw else {"temperatures": None})


def _summarise_case(dtype: str, draw: bool) -> AotCase:
    return AotCase(
        f"row_statistics summarise {dtype}, {'drawing' if draw else 'argmax'}",
        _summarise,
        _shape(dtype, draw) | dict.fromkeys(_PARTIALS, "*fp32") | {"DRAW": "constexpr", "CHUNK": "constexpr"},
        _constants(draw),
        num_warps=1,
        elements=2048,
        divisible=_DIVISIBLE,
    )


def _finish_case(dtype: str, draw: bool) -> AotCase:
    inputs = {"uniforms": "*fp64" if draw else "constexpr", "banned_ids": "*i64", "banned_count": "i32"}
    partials = dict.fromkeys(_PARTIALS, "*fp32")
    outputs = {f"{field}_out": {"token": "*i64", "valid": "*i1"}.get(field, "*fp32") for field in _FIELDS}
    sizes = {"DRAW": "constexpr", "CHUNK": "constexpr", "CHUNKS": "constexpr"}
    return AotCase(
        f"row_statistics finish {dtype}, {'drawing' if draw else 'argmax'}",
        _finish,
        _shape(dtype, draw) | inputs | partials | outputs | sizes,
        _constants(draw, CHUNKS=64) | ({} if draw else {"uniforms": None}),
        num_warps=2,
        # float32 drawing takes 132 on sm_100 alone: seven rows at a time on a multiprocessor instead of eight, of a few KB each.
        max_registers=136 if draw and dtype == "fp32" else 128,
        # There the ptxas of triton 3.6 puts 32 bytes aside, once per row; that of 3.7 none.
        max_spills=32 if draw and dtype == "fp32" else 0,
        divisible=_DIVISIBLE,
    )
