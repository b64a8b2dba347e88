"""surrogate_loss for GPUs. One program per row writes the row's gradient and one line of float64 sums; one more adds up the lines.

No atomics but on integers, so the result is the same every time. Under "token" normalisation the number of tokens is known only at the end: the
gradient is left without it, and the second kernel writes the missing factor. Sums are float64 because squares of uncapped weights leave
the range of float32; it is a few operations per token. Source: reference.py. Shapes: B rows, L positions, S sums per row.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpo_kernels.aot_case import AotCase
from diffpo_kernels.surrogate_loss.diagnostics import HISTOGRAM_SIZE, SCALARS
from diffpo_kernels.surrogate_loss.reference import LARGEST_EXPONENT

_LARGEST = tl.constexpr(LARGEST_EXPONENT)
_LOG2_E = tl.constexpr(1.4426950408889634)
_SCALARS = tl.constexpr(len(SCALARS))
_HISTOGRAM = tl.constexpr(HISTOGRAM_SIZE)

# A line of sums: 16 for the scalars (objective, kl, count, ratio, clipped, weight, squares, capped, largest ratio, largest weight),
# 16 for the histogram, then BINS each of count, weight, squares, capped, surrogate gap, uncapped weight, its squares.
_MAXIMA = tl.constexpr(8)
_HISTOGRAM_AT = tl.constexpr(16)
_BINS_AT = tl.constexpr(32)
_SUMS_BY_BIN = tl.constexpr(7)

_FINAL_WARPS = 4


@triton.jit
def _bounded_exp(x):
    """exp of x within its bounds, and its slope, 0 where a bound holds. A NaN stays NaN (tl.minimum would drop it)."""
    value = tl.exp(tl.where(x > _LARGEST, _LARGEST, tl.where(x < -_LARGEST, -_LARGEST, x)))
    return value, tl.where((x >= -_LARGEST) & (x <= _LARGEST), value, 0.0)


@triton.jit
def _load(pointer, offset, chosen):
    """0 where not chosen, whatever is stored there."""
    return tl.load(pointer + offset, mask=chosen, other=0.0).to(tl.float32)


@triton.jit
def _total(x):
    return tl.sum(x, axis=0).to(tl.float64)


_PER_ROW = ["logprob", "old", "advantage", "mask", "behaviour", "reference", "step_bin"]  # slices begin anywhere


@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
def _row_kernel(
    logprob, old, advantage, mask, behaviour, reference, step_bin,  # behaviour, reference, step_bin: pointers or None
    gradient, sums, histogram_by_bin,  # [BINS, 16] int32, zeros, or None
    length, high, low, weight_cap, kl_coefficient, share,  # share: 1 / B by sequence, else 1
    CORRECT: tl.constexpr, BY_SEQUENCE: tl.constexpr, ADVANTAGE_PER_TOKEN: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * length
    line = sums + row * (_BINS_AT + _SUMS_BY_BIN * BINS)
    position = tl.arange(0, BLOCK)

    tokens = tl.zeros([BLOCK], tl.int32)
    first = 0
    while first < length:  # a range() over an argument fails under Triton 3.6's interpreter
        inside = first + position < length
        tokens += (tl.load(mask + start + first + position, mask=inside, other=0) != 0).to(tl.int32)
        first += BLOCK
    count = tl.sum(tokens, axis=0)
    if BY_SEQUENCE:
        share = share / tl.maximum(count, 1).to(tl.float32)

    if not ADVANTAGE_PER_TOKEN:
        row_advantage = tl.load(advantage + row).to(tl.float32)
    objective = tl.zeros([], tl.float64)
    kl = tl.zeros([], tl.float64)
    ratios = tl.zeros([], tl.float64)
    clipped = tl.zeros([], tl.float64)
    weights = tl.zeros([], tl.float64)
    squares = tl.zeros([], tl.float64)
    capped = tl.zeros([], tl.float64)
    largest_ratio = tl.zeros([], tl.float32)
    largest_weight = tl.zeros([], tl.float32)
    histogram = tl.zeros([16], tl.int32)
    if step_bin is not None:
        bin_index = tl.arange(0, BINS)
        bin_count = tl.zeros([BINS], tl.float64)
        bin_weight = tl.zeros([BINS], tl.float64)
        bin_squares = tl.zeros([BINS], tl.float64)
        bin_capped = tl.zeros([BINS], tl.float64)
        bin_gap = tl.zeros([BINS], tl.float64)
        bin_uncapped = tl.zeros([BINS], tl.float64)
        bin_uncapped_squares = tl.zeros([BINS], tl.float64)

    first = 0
    while first < length:
        inside = first + position < length
        offset = start + first + position
        chosen = tl.load(mask + offset, mask=inside, other=0) != 0
        if ADVANTAGE_PER_TOKEN:
            token_advantage = _load(advantage, offset, chosen)
        else:
            token_advantage = tl.where(chosen, row_advantage, 0.0)
        new = _load(logprob, offset, chosen)
        before = _load(old, offset, chosen)
        ratio, slope = _bounded_exp(new - before)
        log_weight = tl.zeros([BLOCK], tl.float32)
        if behaviour is not None:
            log_weight = before - _load(behaviour, offset, chosen)
        uncapped, _ = _bounded_exp(log_weight)
        weight = tl.where(chosen, 1.0, 0.0)
        is_capped = tl.zeros([BLOCK], tl.int1)
        if CORRECT:
            is_capped = chosen & (uncapped >= weight_cap)
            weight = tl.where(chosen, tl.where(is_capped, weight_cap, uncapped), 0.0)

        too_high = (token_advantage > 0) & (ratio > high)
        too_low = (token_advantage < 0) & (ratio < low)
        kept = tl.where(too_high, high, tl.where(too_low, low, ratio))
        token_gradient = tl.where(too_high | too_low, 0.0, -(weight * token_advantage * slope))
        objective += _total(tl.where(chosen, weight * kept * token_advantage, 0.0))
        if reference is not None:
            gap = _load(reference, offset, chosen) - new
            inverse, inverse_slope = _bounded_exp(gap)
            kl += _total(tl.where(chosen, inverse - gap - 1.0, 0.0))
            token_gradient += kl_coefficient * (1.0 - inverse_slope)
        tl.store(gradient + offset, tl.where(chosen, share * token_gradient, 0.0), mask=inside)

        square = weight.to(tl.float64) * weight.to(tl.float64)
        ratio = tl.where(chosen, ratio, 0.0)
        ratios += _total(ratio)
        clipped += _total((too_high | too_low).to(tl.int32))
        weights += _total(weight)
        squares += _total(square)
        capped += _total(is_capped.to(tl.int32))
        largest_ratio = tl.maximum(largest_ratio, tl.max(ratio, axis=0))
        largest_weight = tl.maximum(largest_weight, tl.max(weight, axis=0))
        octave = log_weight * _LOG2_E + (_HISTOGRAM // 2 + 0.5)
        octave = tl.where(octave >= 1, tl.where(octave < _HISTOGRAM, octave, _HISTOGRAM - 1), 0)
        octave = tl.where(chosen & (log_weight == log_weight), octave.to(tl.int32), 15)  # 15 is not read
        histogram += tl.histogram(octave, 16)
        if step_bin is not None:
            uncapped_square = uncapped.to(tl.float64) * uncapped.to(tl.float64)
            token_bin = tl.load(step_bin + offset, mask=chosen, other=-1).to(tl.int32)
            here = chosen[:, None] & (token_bin[:, None] == bin_index[None, :])
            in_a_bin = chosen & (token_bin >= 0) & (token_bin < BINS)
            of_bins = tl.histogram(tl.where(in_a_bin, 16 * token_bin + octave, 15), 16 * BINS)
            tl.atomic_add(histogram_by_bin + tl.arange(0, 16 * BINS), of_bins, mask=of_bins > 0, sem="relaxed")
            bin_count += _total(here.to(tl.int32))
            bin_weight += _total(tl.where(here, weight[:, None], 0.0))
            bin_squares += _total(tl.where(here, square[:, None], 0.0))
            bin_capped += _total((here & is_capped[:, None]).to(tl.int32))
            bin_gap += _total(tl.where(here, -log_weight[:, None], 0.0))
            bin_uncapped += _total(tl.where(here, uncapped[:, None], 0.0))
            bin_uncapped_squares += _total(tl.where(here, uncapped_square[:, None], 0.0))
        first += BLOCK

    tl.store(line + 0, objective * share)
    tl.store(line + 1, kl * share)
    tl.store(line + 2, count.to(tl.float64))
    tl.store(line + 3, ratios)
    tl.store(line + 4, clipped)
    tl.store(line + 5, weights)
    tl.store(line + 6, squares)
    tl.store(line + 7, capped)
    tl.store(line + _MAXIMA, largest_ratio.to(tl.float64))
    tl.store(line + _MAXIMA + 1, largest_weight.to(tl.float64))
    tl.store(line + _HISTOGRAM_AT + tl.arange(0, 16), histogram.to(tl.float64))
    if step_bin is not None:
        line += _BINS_AT
        tl.store(line + bin_index, bin_count)
        tl.store(line + BINS + bin_index, bin_weight)
        tl.store(line + 2 * BINS + bin_index, bin_squares)
        tl.store(line + 3 * BINS + bin_index, bin_capped)
        tl.store(line + 4 * BINS + bin_index, bin_gap)
        tl.store(line + 5 * BINS + bin_index, bin_uncapped)
        tl.store(line + 6 * BINS + bin_index, bin_uncapped_squares)


@triton.jit
def _add_up(sums, row, rows, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH] sums over some lines."""
    entry = sums + row[:, None].to(tl.int64) * STRIDE + tl.arange(0, WIDTH)[None, :]
    return tl.sum(tl.load(entry, mask=row[:, None] < rows, other=0.0), axis=0)


@triton.jit
def _largest(sums, row, rows, STRIDE: tl.constexpr):
    return tl.max(tl.load(sums + row.to(tl.int64) * STRIDE, mask=row < rows, other=0.0), axis=0)


@triton.jit
def _entry(scalars, index: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 8) == index, scalars, 0.0), axis=0)


@triton.jit
def _effective_sample_size(weight, squares, count):
    return weight * weight / tl.where(squares == 0, 1.0, count * squares)  # without squares the weights are 0 too


@triton.jit
def _nan_as_in(total, largest):
    """tl.max drops a NaN; the sum of the same values keeps it."""
    return tl.where(total == total, largest, total)


@triton.jit(do_not_specialize=["rows", "bins"])
def _final_kernel(
    sums, loss, factor, diagnostics, rows, bins, kl_coefficient,
    BY_SEQUENCE: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    STRIDE: tl.constexpr = _BINS_AT + _SUMS_BY_BIN * BINS
    scalars = tl.zeros([8], tl.float64)
    histogram = tl.zeros([16], tl.float64)
    largest_ratio = tl.zeros([], tl.float64)
    largest_weight = tl.zeros([], tl.float64)
    if BINS > 0:
        bin_count = tl.zeros([BINS], tl.float64)
        bin_weight = tl.zeros([BINS], tl.float64)
        bin_squares = tl.zeros([BINS], tl.float64)
        bin_capped = tl.zeros([BINS], tl.float64)
        bin_gap = tl.zeros([BINS], tl.float64)
        bin_uncapped = tl.zeros([BINS], tl.float64)
        bin_uncapped_squares = tl.zeros([BINS], tl.float64)
    first = 0
    while first < rows:  # all loads of a turn are under way together
        row = first + tl.arange(0, ROWS)
        scalars += _add_up(sums, row, rows, STRIDE, 8)
        histogram += _add_up(sums + _HISTOGRAM_AT, row, rows, STRIDE, 16)
        largest_ratio = tl.maximum(largest_ratio, _largest(sums + _MAXIMA, row, rows, STRIDE))
        largest_weight = tl.maximum(largest_weight, _largest(sums + _MAXIMA + 1, row, rows, STRIDE))
        if BINS > 0:
            bin_count += _add_up(sums + _BINS_AT, row, rows, STRIDE, BINS)
            bin_weight += _add_up(sums + _BINS_AT + BINS, row, rows, STRIDE, BINS)
            bin_squares += _add_up(sums + _BINS_AT + 2 * BINS, row, rows, STRIDE, BINS)
            bin_capped += _add_up(sums + _BINS_AT + 3 * BINS, row, rows, STRIDE, BINS)
            bin_gap += _add_up(sums + _BINS_AT + 4 * BINS, row, rows, STRIDE, BINS)
            bin_uncapped += _add_up(sums + _BINS_AT + 5 * BINS, row, rows, STRIDE, BINS)
            bin_uncapped_squares += _add_up(sums + _BINS_AT + 6 * BINS, row, rows, STRIDE, BINS)
        first += ROWS

    count = _entry(scalars, 2)
    tokens = tl.where(count > 0, count, 1.0)
    scale = 1.0 / tokens
    if BY_SEQUENCE:
        scale = tl.full([], 1.0, tl.float64)
    kl = _entry(scalars, 1) * scale
    penalty = tl.where(kl_coefficient > 0, kl_coefficient * kl, 0.0)  # a coefficient of 0 hides a KL that is not finite
    tl.store(loss, penalty - _entry(scalars, 0) * scale)
    tl.store(factor, scale)

    weight = _entry(scalars, 5)
    tl.store(diagnostics + 0, _entry(scalars, 3) / tokens)
    tl.store(diagnostics + 1, _nan_as_in(_entry(scalars, 3), largest_ratio))
    tl.store(diagnostics + 2, _entry(scalars, 4) / tokens)
    tl.store(diagnostics + 3, weight / tokens)
    tl.store(diagnostics + 4, _nan_as_in(weight, largest_weight))
    tl.store(diagnostics + 5, _entry(scalars, 7) / tokens)
    tl.store(diagnostics + 6, _effective_sample_size(weight, _entry(scalars, 6), count))
    tl.store(diagnostics + 7, kl)
    octave = tl.arange(0, 16)
    tl.store(diagnostics + _SCALARS + octave, histogram, mask=octave < _HISTOGRAM)
    if BINS > 0:
        bin_index = tl.arange(0, BINS)
        by_bin = diagnostics + _SCALARS + _HISTOGRAM + bin_index
        bin_tokens = tl.where(bin_count > 0, bin_count, 1.0)
        used = bin_index < bins
        tl.store(by_bin, bin_count, mask=used)
        tl.store(by_bin + bins, bin_weight / bin_tokens, mask=used)
        tl.store(by_bin + 2 * bins, _effective_sample_size(bin_weight, bin_squares, bin_count), mask=used)
        tl.store(by_bin + 3 * bins, bin_capped / bin_tokens, mask=used)
        tl.store(by_bin + 4 * bins, bin_gap / bin_tokens, mask=used)
        uncapped_size = _effective_sample_size(bin_uncapped, bin_uncapped_squares, bin_count)
        tl.store(by_bin + 5 * bins, uncapped_size, mask=used)


def launch(
    outputs: tuple[Tensor, ...],
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    behaviour: Tensor | None,
    reference: Tensor | None,
    step_bin: Tensor | None,
    bins: int,
    clip: float,
    weight_cap: float,
    kl_coefficient: float,
    importance_correction: bool,
    normalisation: str,
) -> None:
    """Fill outputs: loss, gradient, factor and diagnostics (float32)."""
    loss, gradient, factor, diagnostics = outputs
    rows, length = logprob.shape
    given = (logprob, old, advantage, mask.view(torch.uint8), behaviour, reference, step_bin)
    inputs = [x if x is None else x.contiguous() for x in given]
    by_sequence = normalisation == "sequence"
    padded_bins, block, row_warps = _row_configuration(length, bins)
    sums = torch.empty(
        rows, _BINS_AT.value + _SUMS_BY_BIN.value * padded_bins, dtype=torch.float64, device=logprob.device
    )
    histogram_by_bin = torch.zeros(padded_bins, 16, dtype=torch.int32, device=logprob.device) if bins else None
    with torch.cuda.device(logprob.device) if logprob.is_cuda else contextlib.nullcontext():
        if rows > 0:
            _row_kernel[(rows,)](
                *inputs,
                gradient,
                sums,
                histogram_by_bin,
                length,
                1 + clip,
                1 - clip,
                weight_cap,
                kl_coefficient,
                1 / rows if by_sequence else 1.0,
                CORRECT=importance_correction and behaviour is not None,
                BY_SEQUENCE=by_sequence,
                ADVANTAGE_PER_TOKEN=advantage.dim() == 2,
                BINS=padded_bins,
                BLOCK=block,
                num_warps=row_warps,
            )
        _final_kernel[(1,)](
            sums,
            loss,
            factor,
            diagnostics,
            rows,
            bins,
            kl_coefficient,
            BY_SEQUENCE=by_sequence,
            BINS=padded_bins,
            ROWS=_final_rows(padded_bins),
            num_warps=_FINAL_WARPS,
        )
    if histogram_by_bin is not None:
        diagnostics[-HISTOGRAM_SIZE * bins :].view(bins, -1).copy_(histogram_by_bin[:bins, :HISTOGRAM_SIZE])


def _row_configuration(length: int, bins: int) -> tuple[int, int, int]:
    """BINS, BLOCK and num_warps of the row kernel; the tile [BLOCK, BINS] of float64 squares has to stay in registers."""
    padded_bins = max(triton.next_power_of_2(bins), 2) if bins else 0  # Triton 3.6 fails on a single column for AMD
    block = min(triton.next_power_of_2(max(length, 1)), 256, 512 // max(padded_bins, 1))
    return padded_bins, block, 1 if block * max(padded_bins, 4) <= 256 else 8 if bins else 4


def _final_rows(padded_bins: int) -> int:
    return min(64, 1024 // max(padded_bins, 1))


def aot_cases() -> list[AotCase]:
    """Both kernels with everything switched on, for short rows, long rows and many bins; then with everything off."""
    optional = {"behaviour": None, "reference": None, "step_bin": None, "histogram_by_bin": None}
    cases = [_row_case(512, 0, optional), _final_case(0)]
    for length, bins in ((13, 4), (1024, 4), (1024, 128)):
        cases += [_row_case(length, bins, {}), _final_case(bins)]
    return list({case.name: case for case in cases}.values())


def _row_case(length: int, bins: int, absent: dict[str, None]) -> AotCase:
    padded_bins, block, warps = _row_configuration(length, bins)
    types = dict.fromkeys(("logprob", "old", "advantage", "behaviour", "reference", "gradient"), "*fp32")
    types |= {"mask": "*u8", "histogram_by_bin": "*i32", "step_bin": "*i64", "sums": "*fp64", "length": "i32"}
    types |= dict.fromkeys(("high", "low", "weight_cap", "kl_coefficient", "share"), "fp32")
    return AotCase(
        f"surrogate_loss rows L={length} bins={bins}",
        _row_kernel,
        {name: "constexpr" if name in absent else types.get(name, "constexpr") for name in _row_kernel.arg_names},
        absent
        | dict.fromkeys(("CORRECT", "BY_SEQUENCE", "ADVANTAGE_PER_TOKEN"), not absent)
        | {"BINS": padded_bins, "BLOCK": block},
        num_warps=warps,
        elements=block,
    )


def _final_case(bins: int) -> AotCase:
    padded_bins, _, _ = _row_configuration(1, bins)
    types = {"sums": "*fp64", "loss": "*fp32", "factor": "*fp32", "diagnostics": "*fp32", "kl_coefficient": "fp32"}
    types |= {"rows": "i32", "bins": "i32"}
    return AotCase(
        f"surrogate_loss final bins={bins}",
        _final_kernel,
        {name: types.get(name, "constexpr") for name in _final_kernel.arg_names},
        {"BY_SEQUENCE": bins > 0, "BINS": padded_bins, "ROWS": _final_rows(padded_bins)},
        num_warps=_FINAL_WARPS,
    )
