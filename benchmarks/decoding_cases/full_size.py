"""Decoding at LLaDA-8B's size on a GPU: random weights, bf16, the fixed schedule, every cache mode, with and without CUDA graphs.

Every variant decodes the same prompts twice, with `few` and with `many` steps; the difference in wall-clock time, by the difference in
steps, is the time of a step: what a call pays once (compilation, capture of graphs, the exact pass at each block's start) cancels. Both are
numbers large enough for every graph to be captured. tokens_per_second and its ratios hold all of it, at `many` steps. The reference loop
runs `few` steps, each of which costs the same, and is scaled to `many`; where ours is warmed up before the clock runs, so is it.

Outside the transformer: the share of a step that is not explained by the transformer alone, timed between CUDA events at the same shapes
(in a graph where the step is in one). The head is outside; its own time is beside it. Floor: the bytes of all weights (16 GB, the
embedding included, although a step reads only a few of its rows) by the bandwidth of a copy, measured in the same run.
Tokens are not compared here: in bf16 another batch of rows in a matrix product moves near ties. decoding.py checks them first, on a small
float32 model on the same device.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from kernel_cases.measure import median_and_quartiles
from torch import Tensor

from decoding_cases.plain_loops import PlainLoop, fixed_schedule
from decoding_cases.random_models import SHAPES, random_model, random_prompts
from diffpo.decoding.cache import KeyValueCache, Pass
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import FixedSchedule
from diffpo.models.transformer import MaskedDiffusionLM

REFERENCE = "reference loop"
GEN_LENGTH, BLOCK_LENGTH = 64, 32
BLOCKS = GEN_LENGTH // BLOCK_LENGTH
MODEL_SEED, PROMPT_SEED = 0, 1


@dataclass(frozen=True)
class Case:
    """A batch of sequences of `length` tokens, completion included. few, many: steps; 8 at least, so that every graph is captured.

    few = 0: a single call, and its mean step (what quick runs have time for at the largest size, for its memory).
    """

    batch: int
    length: int
    few: int
    many: int
    repeats: int
    shape: str = "llada-8b"

    @property
    def name(self) -> str:
        return f"{self.shape}, batch {self.batch}, length {self.length}"


@dataclass(frozen=True)
class Variant:
    """How `generate` is called, beside its prompts and rule."""

    name: str
    cache: str = "none"
    graph: bool = False


VARIANTS = (
    Variant("dual cache, graph", "dual", True),
    Variant("no cache, graph", graph=True),
    Variant("no cache"),
    Variant("dual cache", "dual"),
    Variant("prefix cache, graph", "prefix", True),
)
FULL = (
    Case(1, 256, 16, 64, 3),
    Case(1, 1024, 16, 64, 3),
    Case(8, 256, 8, 32, 3),
    Case(8, 1024, 8, 16, 2),
    Case(64, 1024, 8, 10, 1),
    Case(64, 256, 8, 16, 1),
)
# In the order of what the seconds of gpu_suite.sh should be spent on: what does not fit any more is left out.
QUICK = (Case(1, 1024, 8, 32, 1), Case(8, 256, 8, 16, 1), Case(1, 256, 8, 32, 1), Case(64, 1024, 0, 2, 1))
SMOKE = (Case(2, 80, 8, 10, 1, "tiny"),)


@dataclass
class Row:
    """One variant of one case. status: "ok", or why there are no numbers. Seconds and bytes; shares and ratios as fractions.

    seconds, quartiles: of a whole call with `many` steps; step_seconds: of one further step; peak_bytes: of the whole decoding, weights included;
    weight_floor: step_seconds as a multiple of the time to read all weights once; faster_than_reference: tokens/s at equal NFE.
    """

    case: str
    variant: str
    status: str = "ok"
    nfe: int | None = None
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    transformer_seconds: float | None = None
    head_seconds: float | None = None
    outside_transformer: float | None = None
    outside_transformer_and_head: float | None = None
    weight_floor: float | None = None
    peak_bytes: int | None = None
    faster_than_reference: float | None = None
    targets: list[dict] = field(default_factory=list)


class Deadline:
    """Seconds left; nothing is begun that is expected to need more."""

    def __init__(self, end: float):
        self.end = end

    def refusal(self, needed: float) -> str | None:
        left = self.end - time.monotonic()
        return (
            None
            if needed <= left
            else f"left out: needs about {needed:.1f} s, {max(left, 0):.1f} s are left (--seconds)"
        )


def build(cases: Sequence[Case], device: torch.device) -> MaskedDiffusionLM:
    """The model that all of the cases share."""
    (shape,) = {case.shape for case in cases}
    return random_model(SHAPES[shape], device, torch.bfloat16, MODEL_SEED)


def run(case: Case, model: MaskedDiffusionLM, ceilings: dict[str, float], deadline: Deadline) -> Iterator[Row]:
    """The reference loop's row, then each variant's, as they are measured."""
    reference = Row(case.name, REFERENCE)
    _attempt(case, reference, deadline, ceilings, model, partial(_reference, case))
    yield reference
    for variant in VARIANTS:
        row = Row(case.name, variant.name)
        if variant.graph and model.device.type != "cuda":
            row.status = "left out: CUDA graphs need a GPU"
        else:
            _attempt(case, row, deadline, ceilings, model, partial(_measure, case, variant, ceilings))
        _compare(row, reference, case)
        yield row


def _attempt(
    case: Case, row: Row, deadline: Deadline, ceilings: dict[str, float], model: MaskedDiffusionLM, measure: Callable
) -> None:
    """Fill in the row; whatever a variant raises is its result and stops no other."""
    try:
        refusal = deadline.refusal(expected_seconds(case, row.variant, model, ceilings))
        if refusal is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                measure(model, row)
            row.status = "; ".join(["ok", *(str(w.message) for w in caught if w.category is RuntimeWarning)])
        else:
            row.status = refusal
    except Exception as error:
        row.status = f"FAILED: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]
    gc.collect()  # a failure's frames hold its tensors
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def expected_seconds(case: Case, variant: str, model: MaskedDiffusionLM, ceilings: dict[str, float]) -> float:
    """A guess for the deadline: 60% of the matrix product's ceiling, a cached step a quarter of an exact one."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    exact = max(
        2 * parameters * case.batch * case.length / (0.6 * ceilings["matmul bfloat16"]),
        2 * parameters / ceilings["copy"],
    )
    if variant == REFERENCE:
        return 0.5 + exact * ((case.few or case.many) + (BLOCKS if case.repeats > 1 else 0))
    steps = case.repeats * (case.few + case.many)
    if variant.startswith(("dual", "prefix")):
        whole = case.repeats * BLOCKS * (2 if case.few else 1)
        steps = whole + 0.25 * (steps - whole)
    return 0.5 + exact * steps


def _reference(case: Case, model: MaskedDiffusionLM, row: Row) -> None:
    steps = case.few or case.many
    loop = PlainLoop(fixed_schedule(steps // BLOCKS, BLOCK_LENGTH))
    prompts = _prompts(case, model)
    if case.repeats > 1:
        PlainLoop(fixed_schedule(1, BLOCK_LENGTH))(model, prompts, GEN_LENGTH, BLOCK_LENGTH)
    _reset_peak(model.device)
    seconds = _wall(lambda: loop(model, prompts, GEN_LENGTH, BLOCK_LENGTH), model.device)
    row.step_seconds, row.nfe = seconds / steps, case.many
    row.seconds = row.step_seconds * case.many
    row.tokens_per_second = case.batch * GEN_LENGTH / row.seconds
    row.peak_bytes = _peak(model.device)


def _measure(case: Case, variant: Variant, ceilings: dict[str, float], model: MaskedDiffusionLM, row: Row) -> None:
    prompts = _prompts(case, model)

    def decode(steps: int) -> None:
        rule = FixedSchedule(steps)
        generate(model, prompts, GEN_LENGTH, BLOCK_LENGTH, rule, cache=variant.cache, cuda_graph=variant.graph)

    if case.repeats > 1:
        decode(case.few)  # a warm-up: kernels compile, the allocator grows
    _reset_peak(model.device)
    times: dict[int, list[float]] = {steps: [] for steps in (case.few, case.many) if steps}
    for _ in range(case.repeats):
        for steps, seconds in times.items():
            seconds.append(_wall(partial(decode, steps), model.device))
    row.peak_bytes, row.nfe = _peak(model.device), case.many
    row.seconds, row.quartiles = median_and_quartiles(times[case.many])
    row.tokens_per_second = case.batch * GEN_LENGTH / row.seconds
    seconds_of_few = median_and_quartiles(times[case.few])[0] if case.few else 0.0
    row.step_seconds = (row.seconds - seconds_of_few) / (case.many - case.few)
    row.weight_floor = row.step_seconds / weight_read_seconds(model, ceilings)
    row.transformer_seconds = transformer_seconds(case, variant, model)
    weight_VD = model.lm_head.weight
    hidden_ND = weight_VD.new_zeros(case.batch * BLOCK_LENGTH, weight_VD.shape[1])
    row.head_seconds = device_seconds(lambda: model.head(hidden_ND), model.device, variant.graph)
    row.outside_transformer = 1 - row.transformer_seconds / row.step_seconds
    row.outside_transformer_and_head = 1 - (row.transformer_seconds + row.head_seconds) / row.step_seconds


def _prompts(case: Case, model: MaskedDiffusionLM) -> Tensor:
    return random_prompts(model, case.batch, case.length - GEN_LENGTH, PROMPT_SEED)


def weight_read_seconds(model: MaskedDiffusionLM, ceilings: dict[str, float]) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / ceilings["copy"]


@torch.no_grad()
def transformer_seconds(case: Case, variant: Variant, model: MaskedDiffusionLM) -> float:
    """Of the transformer alone in a step; the mean over the blocks where they differ."""
    tokens_BL = torch.full((case.batch, case.length), model.mask_id, device=model.device)
    if variant.cache == "none":
        return device_seconds(lambda: model(tokens_BL), model.device, variant.graph)
    cache, times = KeyValueCache(model, case.batch, case.length), []
    for block in range(BLOCKS):
        first = case.length - GEN_LENGTH + block * BLOCK_LENGTH
        end = first + BLOCK_LENGTH if variant.cache == "dual" else case.length
        columns = torch.arange(first, end, device=model.device).expand(case.batch, -1)
        window = Pass(cache, slice(0, case.batch), case.length, columns, torch.ones_like(columns, dtype=torch.bool))
        call = partial(model, tokens_BL[:, first:end].contiguous(), cache=window)
        times.append(device_seconds(call, model.device, variant.graph))
    return sum(times) / len(times)


@torch.no_grad()
def device_seconds(call: Callable[[], Any], device: torch.device, graph: bool, budget: float = 0.15) -> float:
    """Of one call among several in a row: between events on a GPU, from a replayed graph where `graph`, else wall-clock."""
    seconds = _wall(call, device)
    calls = max(2, min(50, int(budget / seconds)))
    if device.type != "cuda":
        return _wall(lambda: [call() for _ in range(calls)], device) / calls
    if graph:
        call = _captured(call, device).replay
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _captured(call: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # libraries allocate their workspaces
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def _wall(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _compare(row: Row, reference: Row, case: Case) -> None:
    """The ratio to the reference loop, and the issue's targets, None where a part of them was not measured."""
    if row.tokens_per_second and reference.tokens_per_second:
        row.faster_than_reference = row.tokens_per_second / reference.tokens_per_second
    share = {1: 0.05, 8: 0.03}.get(case.batch)
    if share is not None:
        row.targets.append(
            _at_most(f"at most {share:.0%} of a step outside the transformer", row.outside_transformer, share)
        )
    if row.variant == "dual cache, graph":
        if case.batch == 1:
            row.targets.append(_at_most("a step within 1.3x of the weight-read floor", row.weight_floor, 1.3))
        ratio = row.faster_than_reference
        met = None if ratio is None else ratio >= 5
        row.targets.append({"target": "5x the reference loop's tokens/s at equal NFE", "measured": ratio, "met": met})
    if (case.batch, case.length) == (64, 1024):
        met = None if row.status.startswith("left out") else row.status == "ok"
        row.targets.append(
            {"target": "64 x 1024 without running out of memory", "measured": row.peak_bytes, "met": met}
        )


def _at_most(text: str, value: float | None, bound: float) -> dict:
    return {"target": text, "measured": value, "met": None if value is None else value <= bound}


def failed(row: Row) -> bool:
    """One of ours that raised; the reference loop's lack of memory is its own."""
    return row.variant != REFERENCE and row.status.startswith("FAILED")
