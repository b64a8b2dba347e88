"""``python benchmarks/nfe_pareto.py [--quick]``: accuracy against network evaluations, and against tokens per second.

Every model decodes the held-out problems greedily under every commit rule and a sweep of its threshold. Written to
benchmarks/results/: all points with hardware and versions (json), and the fronts (png). With the three shipped models on two
CPU cores: 2 minutes with --quick, about 6 in full.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.rules import (
    ORDERS,
    ConfidenceThreshold,
    EntropyBounded,
    FixedSchedule,
    PromptThreshold,
    Rule,
)
from diffpo.device import choose_device
from diffpo.evaluation import evaluate, fixed_problems
from diffpo.models.checkpoints import load, shipped_models
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.runs.provenance import provenance
from diffpo.tasks import CompactTask, get_task, task_names
from diffpo.tasks.prompts import suited
from diffpo.tasks.task import Lengths, completion_lengths

COMPACT_TASKS = [name for name in task_names() if isinstance(get_task(name), CompactTask)]
RESULTS = Path(__file__).parent / "results"
GAMMAS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, math.inf)
CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
QUICK_GAMMAS = (0.0, 0.01, 0.1, 0.5, 1.0, math.inf)
QUICK_CONFIDENCES = (0.5, 0.7, 0.9)
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """One model under one rule. interval: 95% Wilson interval of the accuracy; nfe: mean; gamma: mean, nats."""

    model: str
    family: str
    rule: str
    accuracy: float
    interval: tuple[float, float]
    nfe: float
    tokens_per_second: float
    gamma: float | None


def rules(lengths: Lengths, model: MaskedDiffusionLM, quick: bool) -> list[tuple[str, Rule]]:
    """(family, rule) of the sweep; the learned threshold only for a model that has one."""
    blocks = lengths.gen_length // lengths.block_length
    divisors = [s for s in range(1, lengths.block_length + 1) if lengths.block_length % s == 0]
    gammas, confidences = (QUICK_GAMMAS, QUICK_CONFIDENCES) if quick else (GAMMAS, CONFIDENCES)
    return [
        *(("fixed schedule", FixedSchedule(s * blocks)) for s in divisors),
        *((f"entropy-bounded, {p}", EntropyBounded(gamma, p)) for p in ORDERS for gamma in gammas),
        *(("confidence threshold", ConfidenceThreshold(p)) for p in confidences),
        *([("learned threshold", PromptThreshold())] if model.threshold is not None else []),
    ]


def pareto_front(points: Sequence[T], cost: Callable[[T], float], gain: Callable[[T], float]) -> list[T]:
    """The points no other beats: none has less or equal cost and more gain, or less cost and equal gain. By rising cost."""
    front: list[T] = []
    for point in sorted(points, key=lambda p: (cost(p), -gain(p))):
        if not front or gain(point) > gain(front[-1]):
            front.append(point)
    return front


def fronts(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Most accuracy for the fewest network evaluations, and for the most tokens per second."""
    return {
        "nfe": pareto_front(points, lambda p: p.nfe, lambda p: p.accuracy),
        "tokens_per_second": pareto_front(points, lambda p: -p.tokens_per_second, lambda p: p.accuracy),
    }


def measure(
    model: MaskedDiffusionLM, label: str, task: CompactTask, problems: Sequence, quick: bool, progress
) -> list[Point]:
    """All points of one model."""
    lengths = completion_lengths(task)
    sweep = rules(lengths, model, quick)
    evaluate(model, task, problems[:32], sweep[0][1])  # the first call pays for start-up
    points = []
    for family, rule in progress.track(sweep, description=label):
        e = evaluate(model, task, problems, rule, lengths)
        interval = e.accuracy_interval_95
        points.append(Point(label, family, e.rule, e.accuracy, interval, e.nfe, e.tokens_per_second, e.gamma))
    return points


def labels(names: Sequence[str]) -> list[str]:
    """Short names for a plot: the folder's, or its parent's where the folder is a run's "model"; in full where they clash."""
    paths = [Path(name) for name in names]
    short = [path.resolve().parent.name if path.name == "model" else path.name for path in paths]
    return [name if short.count(label) > 1 else label for name, label in zip(names, short, strict=True)]


def chosen_models(task: str, given: Sequence[str] | None, console: Console) -> list[str]:
    """The models given, or those that ship for the task, with a line for one that is missing."""
    if given:
        return list(dict.fromkeys(given))
    wanted = [f"tiny-{task}", f"tiny-{task}-d1", f"tiny-{task}-diffpo"]
    for name in wanted:
        if name not in shipped_models():
            console.print(f"{name} is not among the shipped models: left out")
    return [name for name in wanted if name in shipped_models()]


def print_fronts(points: Sequence[Point], console: Console) -> None:
    """One table per model: its front of accuracy against NFE."""
    for model in dict.fromkeys(point.model for point in points):
        mine = [point for point in points if point.model == model]
        front = fronts(mine)["nfe"]
        learned = [point for point in mine if point.family == "learned threshold" and point not in front]
        table = Table(title=model, title_justify="left")
        for name, justify in (("rule", "left"), ("accuracy (95%)", "right"), ("NFE", "right"), ("tokens/s", "right")):
            table.add_column(name, justify=justify)
        for point in front + learned:
            low, high = point.interval
            table.add_row(
                point.rule + (" (not on the front)" if point in learned else ""),
                f"{point.accuracy:.1%} ({low:.1%} - {high:.1%})",
                f"{point.nfe:.2f}",
                f"{point.tokens_per_second:,.0f}",
            )
        console.print(table)


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Two panels, accuracy against NFE and against tokens per second: one colour a model, faint markers for every rule,
    the front as a bold step line, the learned threshold as a star with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    models = list(dict.fromkeys(point.model for point in points))
    # Okabe and Ito's colours, told apart with any colour vision; the first, the base model, is neutral
    palette = ("#5A5A5A", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
    colours = {model: palette[i % len(palette)] for i, model in enumerate(models)}
    markers = {"fixed schedule": "s", "confidence threshold": "D", "learned threshold": "*"}
    markers |= dict(zip((f"entropy-bounded, {order}" for order in ORDERS), ("o", "^", "v"), strict=True))
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.8), sharey=True, layout="constrained")
        for axis, label in zip(axes, ("mean network evaluations (NFE) per answer", "tokens per second"), strict=True):
            axis.set_xlabel(label)
            axis.grid(color="0.92", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[0].set(ylabel="accuracy on held-out problems", xlim=(0, 1.04 * max(point.nfe for point in points)))
        _scale_throughput(axes[1], [point.tokens_per_second for point in points])
        for model in models:
            mine = [point for point in points if point.model == model]
            for axis, (key, front) in zip(axes, fronts(mine).items(), strict=True):
                _draw_points(axis, mine, key, colours[model], markers)
                _draw_front(axis, front, key, colours[model])
        _label_fronts(axes[0], points, colours)
        families = dict.fromkeys(point.family for point in points)
        handles = [
            plt.Line2D([], [], linestyle="", marker=markers[f], color="0.35", markersize=11 if f in _LEARNED else 5.5)
            for f in families
        ]
        handles.append(plt.Line2D([], [], color="0.35", linewidth=2.4))
        figure.legend(
            handles, [*families, "best of its model"], loc="outside lower center", ncols=4, frameon=False, fontsize=9
        )
        axes[0].set_title(title, fontsize=12, pad=12)
        figure.savefig(path, dpi=160)
        plt.close(figure)


_LEARNED = ("learned threshold",)


def _scale_throughput(axis, values: Sequence[float]) -> None:
    """Logarithmic, as the fast end would squeeze the accurate one, with plain numbers at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.set_xlim(min(values) / 1.15, max(values) * 1.1)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_points(axis, points: Sequence[Point], key: str, colour: str, markers: dict[str, str]) -> None:
    for point in points:
        x, (low, high) = getattr(point, key), point.interval
        if point.family in _LEARNED:
            error = [[point.accuracy - low], [high - point.accuracy]]
            axis.errorbar(x, point.accuracy, error, fmt="none", ecolor=colour, elinewidth=1.4, capsize=3, zorder=4)
            star = {"marker": "*", "s": 260, "edgecolors": "white", "linewidths": 1.2, "zorder": 5}
            axis.scatter(x, point.accuracy, color=colour, **star)
        else:
            axis.scatter(x, point.accuracy, color=colour, marker=markers[point.family], s=16, alpha=0.3, linewidths=0)


def _draw_front(axis, front: Sequence[Point], key: str, colour: str) -> None:
    """What is reached with at most x evaluations holds to the right of a point, with at least x tokens/s to the left."""
    front = sorted(front, key=lambda point: getattr(point, key))
    x, y = [getattr(point, key) for point in front], [point.accuracy for point in front]
    if key == "nfe":
        x, y, where = [*x, axis.get_xlim()[1]], [*y, y[-1]], "post"
    else:
        x, y, where = [axis.get_xlim()[0], *x], [y[0], *y], "pre"
    axis.step(x, y, where=where, color=colour, linewidth=2.4, zorder=3, solid_joinstyle="round")


def _label_fronts(axis, points: Sequence[Point], colours: dict[str, str]) -> None:
    """Each model's name beside the right end of its front, pushed apart where they would overlap."""
    best = {m: max(point.accuracy for point in points if point.model == m) for m in colours}
    low, high = axis.get_ylim()
    gap, previous = 0.055 * (high - low), math.inf
    for model in sorted(best, key=best.get, reverse=True):
        previous = min(best[model], previous - gap)
        place = {"xy": (1.0, previous), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axis.annotate(model, xytext=(6, 0), va="center", color=colours[model], fontweight="bold", fontsize=9, **place)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", "--models", dest="models", nargs="+", action="extend", metavar="MODEL",
        help="shipped names or folders, repeatable; default: the task's shipped base, d1 and DiFFPO models",
    )  # fmt: skip
    parser.add_argument("--task", default="countdown", choices=COMPACT_TASKS)
    parser.add_argument("--heldout", type=int, help="held-out problems (default 1000, 500 with --quick)")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU where there is one"
    )
    parser.add_argument("--quick", action="store_true", help="fewer thresholds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default benchmarks/results)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    task, names = get_task(options.task), chosen_models(options.task, options.models, console)
    if not names:
        parser.error("no model to evaluate: give one with --model")
    try:
        problems = fixed_problems(task, options.heldout or (500 if options.quick else 1000))
        device = choose_device(options.device)
        models = {label: load(name, device) for label, name in zip(labels(names), names, strict=True)}
        for model in models.values():
            suited(task, model, "compact")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    keep_freed_memory()
    points: list[Point] = []
    with Progress(console=console) as progress:
        for label, model in models.items():
            points += measure(model, label, task, problems, options.quick, progress)
    on_front = {m: fronts([point for point in points if point.model == m]) for m in models}
    result = provenance({"heldout": 0}) | {
        "task": task.name,
        "heldout": len(problems),
        "points": [
            asdict(point) | {f"on_{key}_front": point in front for key, front in on_front[point.model].items()}
            for point in points
        ],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / f"nfe_pareto_{task.name}"
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(points, target.with_suffix(".png"), f"{task.name.capitalize()}, {len(problems)} held-out problems, greedy")
    print_fronts(points, console)
    console.print(f"points: {target.with_suffix('.json')}, figure: {target.with_suffix('.png')}")


if __name__ == "__main__":
    main()
