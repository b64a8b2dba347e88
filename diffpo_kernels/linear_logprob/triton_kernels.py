"""The GPU kernels of linear_logprob: two passes over a chunk of logits, and a forward that forms no logits. See chunked.py.

A row is split into parts, so that few rows fill a GPU. A part leaves three numbers, relative to its own maximum m (x the logits with their
bias): m, s = sum exp((x - m) / T) and w = sum z exp(z) with z = (x - m) / T; one program per row merges them, in a fixed order.

Shapes: N rows, C columns of a chunk (all V of them but in the gradient), S parts of a row.
"""

from dataclasses import replace

import triton
import triton.language as tl

from diffpo_kernels.aot_case import AotCase

# What changes from call to call, with the number of rows or where a chunk of them begins. One kernel serves all.
_PER_ROW = ["temperature", "target", "logprob", "entropy", "max", "log_sum"]


@triton.jit
def _scale(temperature):
    """1 / T, kept finite so that 0 * scale is 0, and positive so that -inf * scale is -inf."""
    return tl.minimum(tl.maximum(1.0 / temperature, 1.1754943508222875e-38), 3.4e38)


@triton.jit
def _finite(z):
    """-inf becomes a number whose exp is 0 too, so that z exp(z) is 0 and not NaN. A NaN stays."""
    return tl.maximum(z, -1e30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_part(partials, row, part, S, m, s, w, mask):
    base = partials + row * 3 * S + part
    tl.store(base, m, mask=mask)
    tl.store(base + S, s, mask=mask)
    tl.store(base + 2 * S, w, mask=mask)


@triton.jit(do_not_specialize_on_alignment=_PER_ROW[:2])
def part_of_row(
    logits,  # [N, C]
    bias,  # [C] float32
    temperature,  # [N]
    target,  # [N]
    partials,  # [N, 3, S], written
    target_logit,  # [N], written where the part holds the target
    C,
    S,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of one row per program."""
    row = (tl.program_id(0) // S).to(tl.int64)
    part = tl.program_id(0) % S
    logits += row * C
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0)

    m = tl.max(x, axis=0)
    z = _finite((x - tl.where(m == -float("inf"), 0.0, m)) * _scale(tl.load(temperature + row)))
    e = tl.exp(z)
    _store_part(partials, row, part, S, m, tl.sum(e, axis=0), tl.sum(z * e, axis=0), True)

    wanted = tl.load(target + row)
    here = (wanted >= part * BLOCK) & (wanted < part * BLOCK + BLOCK) & (wanted < C)
    x = tl.load(logits + wanted, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + wanted, mask=here, other=0.0)
    tl.store(target_logit + row, x, mask=here)


# N = 1 as a constant spills on sm_100
@triton.jit(do_not_specialize=["N", "S"], do_not_specialize_on_alignment=_PER_ROW[:2])
def part_of_rows_from_hidden(
    hidden,  # [N, D], columns contiguous
    head,  # [C, D], columns contiguous
    bias,
    temperature,
    target,
    partials,
    target_logit,
    N,
    C,
    S,
    hidden_stride,
    head_stride,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMULATED: tl.constexpr,  # under the interpreter, which computes wrongly in bfloat16
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of columns of BLOCK_N rows per program. Neighbouring programs share the columns: their part of head stays in cache."""
    row_blocks = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // row_blocks
    first_row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    alive = row < N
    depth = tl.arange(0, BLOCK_D)
    # 64 bits in the address of a block, 32 inside it: 64 everywhere spills.
    hidden_offset = tl.arange(0, BLOCK_N)[:, None] * hidden_stride + depth[None, :]
    head_offset = tl.arange(0, BLOCK_C)[None, :] * head_stride + depth[:, None]
    scale = _scale(tl.load(temperature + row, mask=alive, other=1.0))
    wanted = tl.load(target + row, mask=alive, other=-1)
    m = tl.full([BLOCK_N], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    w = tl.zeros([BLOCK_N], tl.float32)
    at_target = tl.full([BLOCK_N], -float("inf"), tl.float32)

    for block in range(BLOCKS):
        first_column = (part * BLOCKS + block) * BLOCK_C
        column = first_column + tl.arange(0, BLOCK_C)
        inside = column < C
        hidden_block = hidden + first_row * hidden_stride
        head_block = head + first_column.to(tl.int64) * head_stride
        x = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for first in range(0, D, BLOCK_D):
            a = tl.load(hidden_block + hidden_offset, mask=alive[:, None] & (first + depth[None, :] < D), other=0.0)
            b = tl.load(head_block + head_offset, mask=inside[None, :] & (first + depth[:, None] < D), other=0.0)
            if EMULATED:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            x = tl.dot(a, b, x, input_precision="ieee")
            hidden_block += BLOCK_D
            head_block += BLOCK_D
        if not EMULATED:  # the dtype in which the network forms its logits
            x = x.to(hidden.dtype.element_ty).to(tl.float32)
        if HAS_BIAS:  # -inf excludes a column whatever its head holds
            b = tl.load(bias + column, mask=inside, other=-float("inf"))[None, :]
            x = tl.where(b == -float("inf"), b, x + b)
        else:
            x = tl.where(inside[None, :], x, -float("inf"))

        new_m = tl.maximum(m, tl.max(x, axis=1))
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        gap = _finite((m - shift) * scale)
        factor = tl.exp(gap)
        z = _finite((x - shift[:, None]) * scale[:, None])
        e = tl.exp(z)
        w = factor * (w + gap * s) + tl.sum(z * e, axis=1)
        s = factor * s + tl.sum(e, axis=1)
        m = new_m
        at_target = tl.maximum(
            at_target, tl.max(tl.where(column[None, :] == wanted[:, None], x, -float("inf")), axis=1)
        )

    _store_part(partials, row, part, S, m, s, w, alive)
    begin = part * BLOCKS * BLOCK_C
    here = alive & (wanted >= begin) & (wanted < begin + BLOCKS * BLOCK_C) & (wanted < C)
    tl.store(target_logit + row, at_target, mask=here)


@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
def merge_parts(partials, target_logit, temperature, logprob, entropy, max, log_sum, S, PARTS: tl.constexpr):
    """One row per program; PARTS is S rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    inside = part < S
    base = partials + row * 3 * S + part
    m = tl.load(base, mask=inside, other=-float("inf"))
    s = tl.load(base + S, mask=inside, other=0.0)
    w = tl.load(base + 2 * S, mask=inside, other=0.0)
    scale = _scale(tl.load(temperature + row))

    largest = tl.max(m, axis=0)
    gap = _finite((m - tl.where(largest == -float("inf"), 0.0, largest)) * scale)
    factor = tl.exp(gap)
    total = tl.sum(factor * s, axis=0)  # NaN if the row holds NaN or +inf, 0 if it holds -inf alone
    weighted = tl.sum(factor * (w + gap * s), axis=0)
    log_total = tl.where(total > 0, tl.log(total), float("nan"))
    row_entropy = log_total - weighted / total
    tl.store(logprob + row, (tl.load(target_logit + row) - largest) * scale - log_total)
    tl.store(entropy + row, tl.where(row_entropy < 0, 0.0, row_entropy))
    tl.store(max + row, largest)
    tl.store(log_sum + row, log_total)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, without the cancellation near 0."""
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7)))))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit(
    do_not_specialize=["N", "first_column"], do_not_specialize_on_alignment=[*_PER_ROW, "by_logprob", "by_entropy"]
)
def gradient_in_place(
    logits,  # [N, C], overwritten
    bias,
    temperature,
    target,
    logprob,
    entropy,
    max,
    log_sum,
    by_logprob,  # [N]
    by_entropy,  # [N]
    bias_gradient,  # [ceil(N / ROWS), C], written: sums over ROWS rows
    N,
    C,
    first_column,
    HAS_BIAS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of ROWS rows per program: dx = (g ([v = target] - p) - h p (log p + entropy)) / T."""
    blocks = tl.cdiv(C, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    if SUM_ROWS:
        total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = group * ROWS + i
        alive = row < N
        # The interpreter of triton 3.9 makes inside & alive an int32, which no load takes as its mask.
        there = column < tl.where(alive, C, 0)
        x = tl.load(logits + row * C + column, mask=there, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + column, mask=inside, other=0.0)
        scale = _scale(tl.load(temperature + row, mask=alive, other=1.0))
        g = tl.load(by_logprob + row, mask=alive, other=0.0) * scale
        shift = tl.load(max + row, mask=alive, other=0.0)
        log_p = _finite((x - shift) * scale - tl.load(log_sum + row, mask=alive, other=0.0))
        log_p = tl.minimum(log_p, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a logit formed again may exceed the max
        p = tl.exp(log_p)
        wanted = tl.load(target + row, mask=alive, other=-1) - first_column
        missing = _one_minus_exp(
            _finite(tl.load(logprob + row, mask=alive, other=0.0))
        )  # p rounds to 1 before this does to 0
        dx = g * tl.where(column == wanted, missing, -p)
        if HAS_ENTROPY:
            h = tl.load(by_entropy + row, mask=alive, other=0.0) * scale
            dx -= h * p * (log_p + tl.load(entropy + row, mask=alive, other=0.0))
        tl.store(logits + row * C + column, dx.to(logits.dtype.element_ty), mask=there)
        if SUM_ROWS:
            total += dx
    if SUM_ROWS:
        tl.store(bias_gradient + group * C + column, total, mask=inside)


# Per element size: BLOCK_N, BLOCK_C, BLOCK_D, BLOCKS, warps, stages. Float32 is multiplied exactly, without tensor cores.
FROM_HIDDEN = {2: (128, 128, 64, 8, 8, 3), 4: (64, 64, 32, 16, 8, 2)}
STATISTICS_BLOCK = 4096
GRADIENT_BLOCK = {False: 2048, True: 1024}  # without and with sums over rows, which take registers
SUMMED_ROWS = 32


def aot_cases() -> list[AotCase]:
    """The kernels as they are launched for a large vocabulary."""
    per_row = {"temperature": "*fp32", "target": "*i64"}
    parts = {"partials": "*fp32", "target_logit": "*fp32"}
    cases = []
    for dtype in ("bf16", "fp32"):
        pointers = ("logits", "bias", "C")
        cases.append(
            AotCase(
                f"linear_logprob statistics {dtype}",
                part_of_row,
                {"logits": f"*{dtype}", "bias": "*fp32", **per_row, **parts, "C": "i32", "S": "i32"},
                {"HAS_BIAS": False, "BLOCK": STATISTICS_BLOCK},
                elements=STATISTICS_BLOCK,
                divisible=pointers,
            )
        )
        for sums in (False, True):
            rows = SUMMED_ROWS if sums else 1
            names = ("logprob", "entropy", "max", "log_sum", "by_logprob", "by_entropy", "bias_gradient")
            cases.append(
                AotCase(
                    f"linear_logprob gradient {dtype}{' with bias' if sums else ''}",
                    gradient_in_place,
                    {"logits": f"*{dtype}", "bias": "*fp32", **per_row}
                    | dict.fromkeys(names, "*fp32")
                    | dict.fromkeys(("N", "C", "first_column"), "i32"),
                    {"HAS_BIAS": sums, "HAS_ENTROPY": True, "SUM_ROWS": sums}
                    | {"ROWS": rows, "BLOCK": GRADIENT_BLOCK[sums]},
                    elements=0 if sums else GRADIENT_BLOCK[sums],
                    divisible=(*pointers, "bias_gradient"),
                )
            )
        block_n, block_c, block_d, blocks, warps, stages = FROM_HIDDEN[2 if dtype == "bf16" else 4]
        cases.append(
            AotCase(
                f"linear_logprob from hidden {dtype}",
                part_of_rows_from_hidden,
                {"hidden": f"*{dtype}", "head": f"*{dtype}", "bias": "*fp32", **per_row, **parts}
                | dict.fromkeys(("N", "C", "S", "hidden_stride", "head_stride"), "i32"),
                {
                    "D": 4096,
                    "HAS_BIAS": True,
                    "EMULATED": False,
                    "BLOCK_N": block_n,
                    "BLOCK_C": block_c,
                    "BLOCK_D": block_d,
                }
                | {"BLOCKS": blocks},
                num_warps=warps,
                num_stages=stages,
                tensor_cores=dtype == "bf16",
                max_registers=255,
                max_shared=227 * 1024,
                divisible=("hidden", "head", "bias", "C", "hidden_stride", "head_stride"),
            )
        )
    names = ("partials", "target_logit", "temperature", "logprob", "entropy", "max", "log_sum")
    merge = AotCase("linear_logprob merge", merge_parts, dict.fromkeys(names, "*fp32") | {"S": "i32"}, {"PARTS": 32})
    statistics, gradient, _, from_hidden = cases[:4]  # bf16
    return [
        *cases,
        merge,
        replace(merge, name=f"{merge.name} of 128", constexprs={"PARTS": 128}),
        _variant(statistics, "with bias", HAS_BIAS=True),
        _variant(gradient, "without entropy", HAS_ENTROPY=False),
        replace(
            from_hidden,
            name=f"{from_hidden.name}, V not divisible by 16",
            divisible=tuple(name for name in from_hidden.divisible if name != "C"),
        ),
    ]


def _variant(case: AotCase, what: str, **constexprs: object) -> AotCase:
    return replace(case, name=f"{case.name} {what}", constexprs=case.constexprs | constexprs)
