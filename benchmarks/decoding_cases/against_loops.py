"""Our decoder against plain loops: the same model, prompts and rule, the same tokens in the same NFE.

First everyone decodes once. Unless tokens and NFE are equal in every row, nobody of that rule is timed. Then wall-clock times of whole
decodings, in interleaved rounds in a random order, medians and quartiles. Everyone has the same threads, dtype (float32), network module
and attention kernel. Where freed memory is kept by the C allocator (--keep-freed-memory), loops with large logits gain most: by default
their pages are handed back and faulted in again in each step. The end of sequence token is switched off: ending early would be a gain of its own. "Lean" loops form logits at the active block alone and stay in float32:
what is left against them is the head at masked positions only, fused statistics, and finished rows that leave the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from kernel_cases.measure import Clock, interleaved_seconds, median_and_quartiles
from torch import Tensor

from decoding_cases import plain_loops
from decoding_cases.plain_loops import Decoded, PlainLoop
from decoding_cases.random_models import SHAPES, random_model, random_prompts
from decoding_cases.step_parts import seconds_by_part
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import ConfidenceThreshold, EntropyBounded, FixedSchedule, Rule
from diffpo.models.transformer import MaskedDiffusionLM

OURS = "diffpo"
MODEL_SEED, PROMPT_SEED = 0, 1
P_THRESHOLD, GAMMA = 0.9, 0.5


@dataclass(frozen=True)
class Case:
    """A model and a batch of prompts. steps: of the fixed schedule; lengths in tokens."""

    shape: str
    batch: int
    prompt_length: int = 64
    gen_length: int = 64
    block_length: int = 32
    steps: int = 32

    @property
    def name(self) -> str:
        return f"{self.shape}, batch {self.batch}, prompt {self.prompt_length}, gen {self.gen_length}, block {self.block_length}"


FULL = tuple(Case(shape, batch) for shape in ("small", "medium") for batch in (1, 8))
QUICK = (Case("small", 1),)
SMOKE = (Case("tiny", 3, prompt_length=7, gen_length=8, block_length=4, steps=4),)


@dataclass(frozen=True)
class Contest:
    """One commit rule in our decoder and in plain loops. targets: loop -> how many times faster ours has to be."""

    rule: Rule
    loops: dict[str, PlainLoop]
    targets: dict[str, float] = field(default_factory=dict)


def contests(case: Case) -> list[Contest]:
    steps_per_block = case.steps * case.block_length // case.gen_length
    fixed = plain_loops.fixed_schedule(steps_per_block, case.block_length)
    threshold, entropy = plain_loops.confidence_threshold(P_THRESHOLD), plain_loops.entropy_bounded(GAMMA)
    return [
        Contest(
            FixedSchedule(case.steps),
            {"reference loop": PlainLoop(fixed), "reference loop, lean": lean(fixed)},
            {"reference loop": 8.0},
        ),
        Contest(
            ConfidenceThreshold(P_THRESHOLD),
            {"threshold loop": PlainLoop(threshold), "threshold loop, lean": lean(threshold)},
            {"threshold loop": 1.3},
        ),
        Contest(EntropyBounded(GAMMA), {"entropy-bounded loop, lean": lean(entropy)}),
    ]


def lean(choose: plain_loops.Choose) -> PlainLoop:
    """Without what costs a published loop most: logits outside the block, and float64."""
    return PlainLoop(choose, head="block", dtype=torch.float32)


@dataclass
class Row:
    """One contestant. status: "ok", or why it was not timed. seconds: of one decoding of the batch; parts: seconds of one profiled decoding.

    nfe: mean of the rows; forwards: of the batch, where known; faster_than: loop -> how many times longer it takes.
    """

    case: str
    rule: str
    contestant: str
    status: str
    nfe: float | None = None
    forwards: int | None = None
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    tokens_per_second: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    faster_than: dict[str, float] = field(default_factory=dict)
    targets: list[dict] = field(default_factory=list)


def run(case: Case, seconds: float, report: Callable[[list[Row]], None]) -> None:
    """Check and time every contest on the CPU, `report` each when it is done. seconds: of timing for each contestant, 3 rounds at least."""
    model = random_model(SHAPES[case.shape], torch.device("cpu"), torch.float32, MODEL_SEED)
    prompts = random_prompts(model, case.batch, case.prompt_length, PROMPT_SEED)
    for contest in contests(case):
        report(hold(contest, case, model, prompts, seconds))


def hold(contest: Contest, case: Case, model: MaskedDiffusionLM, prompts: Tensor, seconds: float) -> list[Row]:
    """Everyone's row, ours first; without times where anyone's tokens differ."""
    decoders = decoders_of(contest, case, model, prompts)
    decoded = {name: decode() for name, decode in decoders.items()}
    reasons = differences(decoded)
    rows = {
        name: Row(case.name, repr(contest.rule), name, reasons.get(name, "ok"), one.nfe.float().mean().item(), one.forwards)
        for name, one in decoded.items()
    }  # fmt: skip
    if reasons:
        for name in rows.keys() - reasons.keys():
            rows[name].status = "not timed: others of this rule decode other tokens"
        return list(rows.values())
    times = interleaved_seconds(decoders, Clock(torch.device("cpu")), seconds)
    for name, row in rows.items():
        row.seconds, row.quartiles = median_and_quartiles(times[name])
        row.rounds, row.tokens_per_second = len(times[name]), case.batch * case.gen_length / row.seconds
        row.parts = seconds_by_part(model, decoders[name])
    judge(rows, contest)
    return list(rows.values())


def decoders_of(
    contest: Contest, case: Case, model: MaskedDiffusionLM, prompts: Tensor
) -> dict[str, Callable[[], Decoded]]:
    def ours() -> Decoded:
        out = generate(model, prompts, case.gen_length, case.block_length, contest.rule)
        return Decoded(out.tokens, out.nfe, int(out.nfe.max()))  # rows are decoded side by side: as many as the longest

    return {OURS: ours} | {
        name: partial(loop, model, prompts, case.gen_length, case.block_length) for name, loop in contest.loops.items()
    }


def differences(decoded: dict[str, Decoded]) -> dict[str, str]:
    """Of everyone whose tokens or NFE are not ours: how many."""
    ours, reasons = decoded[OURS], {}
    for name, one in decoded.items():
        tokens, rows = int((one.tokens != ours.tokens).sum()), int((one.nfe != ours.nfe).sum())
        if tokens or rows:
            reasons[name] = f"DIFFERS: {tokens} of {one.tokens.numel()} tokens, NFE of {rows} of {len(one.nfe)} rows"
    return reasons


def verify(case: Case, device: torch.device) -> dict[str, str]:
    """ "rule: loop" -> how its tokens differ from ours; nothing is timed."""
    model = random_model(SHAPES[case.shape], device, torch.float32, MODEL_SEED)
    prompts = random_prompts(model, case.batch, case.prompt_length, PROMPT_SEED)
    found = {}
    for contest in contests(case):
        decoded = {name: decode() for name, decode in decoders_of(contest, case, model, prompts).items()}
        found |= {f"{contest.rule!r}: {name}": reason for name, reason in differences(decoded).items()}
    return found


def judge(rows: dict[str, Row], contest: Contest) -> None:
    ours = rows[OURS]
    ours.faster_than = {name: rows[name].seconds / ours.seconds for name in contest.loops}
    ours.targets = [
        {
            "target": f"{bound:g}x the speed of the {name}",
            "measured": ours.faster_than[name],
            "met": ours.faster_than[name] >= bound,
        }
        for name, bound in contest.targets.items()
    ]


def failed(row: Row) -> bool:
    return row.status != "ok"
