"""``python benchmarks/likelihood.py [--rounds N] [--smoke] [--keep-freed-memory] [--out file.json]``: what the update of a batch costs.

update      Old scores, loss, gradient and diagnostics of DiFFPO's two-times mean field, for 8 rollouts of one prompt, 64 + 64 tokens, a
            vocabulary of 126,464 and a tiny body in fp32, beside plain code (likelihood_cases/plain_update.py) that takes the 8 rollouts
            in one graph, or one after the other. First, both must have the same loss, diagnostics and gradient (1e-4, relative). Seconds are
            medians of runs that take turns; ratios are medians of the ratios of neighbours. Targets: at least twice as fast, at most half
            the memory of the plain code with the batch in one graph.
rollouts    Peak memory of an update in parts of 4 sequences against the number of rollouts: even 8 fill two parts, whose gradients add up.
            Target: within 20% of each other.
exact       The same with the exact likelihood, a boundary at every step, of 64 rollouts of 256 tokens, in parts of 64 sequences, beside
            the update of one such part. The body is smaller and the vocabulary 1,000 here, as there are 16,321 network inputs. About
            10 MiB are holes that the first parts leave in the heap, whatever their size; no later part adds to them.
            Target: within 20% of each other.

Memory is likelihood_cases/peak_memory.py's. The results go to benchmarks/results/likelihood_cpu.json (--smoke, all of it at tiny sizes:
only to --out). Exit code 1 if gradients differ. Made for a quiet machine: about 5 minutes on two cores.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from decoding_cases.random_models import Shape
from likelihood_cases import peak_memory
from likelihood_cases.updates import Case, Setting, Update, model_of, rollouts, with_behaviour
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from diffpo.cpu_memory import keep_freed_memory
from diffpo.models.checkpoints import write_atomically
from diffpo.runs.provenance import provenance

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4
SMALL = 0.1  # a smaller number's difference counts relative to this: log-probs of -70 nats are rounded at 1e-5
VARIANTS = {
    "diffpo": ("ours", {}),
    "plain, 8 rollouts in one graph": ("plain", {}),
    "plain, one rollout after the other": ("plain", {"samples": 1}),
}
OURS, BASELINE = list(VARIANTS)[:2]
ONE_GROUP = Setting(Shape(128, 384, 4, 4))
GROWING, COUNTS = replace(ONE_GROUP, sequences_at_once=4, correction=False), (8, 32, 256)
EXACT = Setting(
    Shape(32, 96, 1, 2, vocabulary=1000), rollouts=64, prompt_length=16, gen_length=256, steps=256, m=0,
    correction=False, sequences_at_once=64,
)  # fmt: skip
TINY = Shape(32, 96, 1, 2, vocabulary=500)
SMOKE = {"shape": TINY, "prompt_length": 6, "gen_length": 8, "steps": 4}


def compare_updates(setting: Setting, rounds: int, keep_freed: bool) -> list[dict]:
    """One row per update and variant."""
    model = model_of(setting)
    trajectory = with_behaviour(setting, model, rollouts(setting, model))
    case, rows = Case(setting, trajectory, model), []
    for update, later in (("first", False), ("later", True)):
        updates = {name: getattr(case, of)(later=later, **flags) for name, (of, flags) in VARIANTS.items()}
        gaps = {name: gap(case, updates[OURS], updates[name]) for name in VARIANTS if name != OURS}
        times = take_turns(case, updates, rounds)
        for name, (of, flags) in VARIANTS.items():
            arguments = (setting, trajectory.to_bytes(), of, flags | {"later": later}, keep_freed)
            rows.append({
                "update": update,
                "variant": name,
                "seconds": statistics.median(times[name]),
                "times": times[name],
                "times_ours": statistics.median(a / b for a, b in zip(times[name], times[OURS], strict=True)),
                "peak_bytes": peak_memory.in_fresh_process(peak_memory.of_update, *arguments),
                "largest_difference": gaps.get(name),
            })  # fmt: skip
    return rows


def gap(case: Case, ours: Update, other: Update) -> float:
    """The largest relative difference: of the gradient as a whole, of the loss and of the diagnostics that both report."""
    (loss, found, gradient), (their_loss, theirs, their_gradient) = case.gradient(ours), case.gradient(other)
    squares = [(gradient[name] - value).double().square().sum() for name, value in their_gradient.items()]
    length = sum(value.double().square().sum() for value in their_gradient.values()) ** 0.5
    of_numbers = [((found[name] - value).abs() / value.abs().clamp(min=SMALL)).max() for name, value in theirs.items()]
    of_loss = (loss - their_loss).abs() / their_loss.abs().clamp(min=SMALL)
    return max(float(value) for value in (sum(squares) ** 0.5 / length, of_loss, *of_numbers))


def take_turns(case: Case, updates: dict[str, Update], rounds: int) -> dict[str, list[float]]:
    """Seconds of each update, `rounds` times, one after the other; they have run before."""
    times: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(rounds):
        for name, update in updates.items():
            case.model.zero_grad()
            started = time.perf_counter()
            update()
            times[name].append(time.perf_counter() - started)
    return times


def grow(setting: Setting, counts: tuple[int, ...], keep_freed: bool) -> list[dict]:
    """Peak memory by number of rollouts."""
    rows = []
    for count in counts:
        of_size = replace(setting, rollouts=count)
        trajectory = rollouts(of_size, model_of(of_size)).to_bytes()
        peak = peak_memory.in_fresh_process(peak_memory.of_update, of_size, trajectory, "ours", {}, keep_freed)
        rows.append({"rollouts": count, "peak_bytes": peak})
    return rows


def exact(setting: Setting, keep_freed: bool) -> list[dict]:
    """Peak memory of the whole batch and of one part of it."""
    trajectory = rollouts(setting, model_of(setting)).to_bytes()
    part = peak_memory.in_fresh_process(peak_memory.of_one_part, setting, trajectory, keep_freed)
    whole = peak_memory.in_fresh_process(peak_memory.of_update, setting, trajectory, "ours", {}, keep_freed)
    return [{"latents": "one part", "peak_bytes": part}, {"latents": "every step", "peak_bytes": whole}]


def judge(sections: dict[str, list[dict]]) -> list[dict]:
    """The targets: what was measured, and whether they are met."""
    baselines = [row for row in sections["update"] if row["variant"] == BASELINE]
    ours = [row for row in sections["update"] if row["variant"] == OURS]
    memory = [mine["peak_bytes"] / theirs["peak_bytes"] for mine, theirs in zip(ours, baselines, strict=True)]
    peaks = [row["peak_bytes"] for row in sections["rollouts"]]
    part, whole = (row["peak_bytes"] for row in sections["exact"])
    measured = [
        ("at least twice as fast as plain code", min(row["times_ours"] for row in baselines), lambda x: x >= 2),
        ("at most half of its peak memory", max(memory), lambda x: x <= 0.5),
        ("largest over smallest peak by rollouts at most 1.2", max(peaks) / min(peaks), lambda x: x <= 1.2),
        ("exact over one part at most 1.2", whole / part, lambda x: x <= 1.2),
    ]
    return [{"target": text, "measured": value, "met": met(value)} for text, value, met in measured]


def show(sections: dict[str, list[dict]], console: Console) -> None:
    for name, rows in sections.items():
        columns = [key for key in rows[0] if key not in ("times", "targets")]
        table = Table(*columns, title=name, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(_text(key, row[key]) for key in columns))
        console.print(table)


def _text(key: str, value: object) -> str:
    if key == "peak_bytes":
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each variant (default 3)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="as diffpo's programs do; plain code gains most"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    keep = given.keep_freed_memory
    if keep:
        keep_freed_memory()
    one, growing, counts, steps = ONE_GROUP, GROWING, COUNTS, EXACT
    if given.smoke:
        one, growing = replace(one, **SMOKE), replace(growing, **SMOKE)
        counts, steps = (8, 16), replace(steps, **SMOKE, rollouts=8, sequences_at_once=4)
    record = provenance({"model and rollouts": 0}) | {"freed_memory_kept": keep}
    sections = {
        "update": compare_updates(one, given.rounds, keep),
        "rollouts": grow(growing, counts, keep),
        "exact": exact(steps, keep),
    }
    sections["targets"] = judge(sections)
    out = given.out or (None if given.smoke else RESULTS / "likelihood_cpu.json")
    if out is not None:
        document = json.dumps({"method": __doc__, "run": record} | sections, indent=1) + "\n"
        write_atomically(out, lambda path: Path(path).write_text(document))
    show(sections, Console(highlight=False, width=150))
    differences = [row["largest_difference"] or 0.0 for row in sections["update"]]
    return 0 if max(differences) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
