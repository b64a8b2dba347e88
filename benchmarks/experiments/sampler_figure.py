"""The sampler study in three panels a task: fronts, areas, and thresholds by difficulty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from difficulty import GROUPS
from front_area import front
from learning_curves import PALETTE, STYLE
from sampler_report import operating_point, pairs

FRONT_ARMS = (
    "base",
    "d1",
    "joint",
    "model-2",
    "model-0.5",
    "joint-long",
    "d1-2",
    "model-0.1",
    "model-0.5-priced",
)
COLOURS = dict(zip(FRONT_ARMS, PALETTE, strict=True))


def draw(results: list[dict], bases: dict, summary: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(summary), 3, figsize=(14, 4.2 * len(summary)), layout="constrained", squeeze=False
        )
        for line, (task, numbers) in zip(axes, summary.items(), strict=True):
            mine = [result for result in results if result["task"] == task]
            draw_fronts(line[0], mine, bases[task], numbers["limit"])
            draw_areas(line[1], numbers)
            draw_thresholds(line[2], numbers["arms"].get("joint", {}).get("threshold"))
            for axis in filter(lambda axis: axis.axison, line):
                axis.set_title(f"{task}: {axis.get_title(loc='left')}")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def draw_fronts(axis, results: list[dict], base: dict, limit: float) -> None:
    """Mean over seeds of the fronts, with one standard error; a star where a run's own rule decodes."""
    for arm in FRONT_ARMS:
        mine = [result for result in results if result["arm"] == arm]
        lines = [front(pairs(base))] if arm == "base" else [front(pairs(result["front"])) for result in mine]
        if not lines:
            continue
        draw_band_of_fronts(axis, lines, limit, COLOURS[arm], arm)
        for result in mine:
            point, length = operating_point(result), mean_length(result)
            axis.scatter(length / point["nfe"], point["accuracy"], color=COLOURS[arm], marker="*", s=60, zorder=5, edgecolors="white", linewidths=0.6)  # fmt: skip
    label_front_axis(axis, "fronts; star: each run's own rule", limit)


def label_front_axis(axis, title: str, limit: float) -> None:
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16) if tick <= limit]
    axis.set(title=title, xlabel="tokens per forward", ylabel="accuracy", xscale="log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)


def draw_band_of_fronts(axis, lines: list, limit: float, colour: str, label: str) -> None:
    """Mean accuracy of several seeds' fronts with a band of one standard error, from where all have begun up to `limit`."""
    grid = np.geomspace(min(max(line[0][0] for line in lines), limit), limit, 200)
    values = np.stack([np.interp(grid, *zip(*line, strict=True)) for line in lines])
    error = values.std(axis=0, ddof=1) / len(lines) ** 0.5 if len(lines) > 1 else np.zeros(len(grid))
    mean = values.mean(axis=0)
    axis.plot(grid, mean, color=colour, linewidth=1.8, label=f"{label} (n = {len(lines)})")
    axis.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def mean_length(result: dict) -> float:
    """Tokens of an answer, from the run's point with the most evaluations."""
    point = max(result["front"]["points"], key=lambda p: p["nfe"])
    return point["tokens_per_forward"] * point["nfe"]


def draw_areas(axis, numbers: dict) -> None:
    """Area of every arm with its 95% interval, the base's as a line."""
    for i, (arm, of) in enumerate(numbers["arms"].items()):
        low, high = of["area"]["interval"] or (of["area"]["mean"],) * 2
        axis.plot([low, high], [i, i], color=COLOURS.get(arm, "0.4"), linewidth=2)
        axis.plot(of["area"]["mean"], i, "o", color=COLOURS.get(arm, "0.4"))
    axis.axvline(numbers["base"]["area"], color=COLOURS["base"], linestyle="--", label="base")
    labels = [f"{arm} (n = {of['area']['n']})" for arm, of in numbers["arms"].items()]
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set(
        title="area, 95% interval over seeds", xlabel=f"weighted area up to {numbers['limit']:.1f} tokens per forward"
    )
    axis.legend(frameon=False, fontsize=8)


def draw_thresholds(axis, spread: dict | None) -> None:
    """Share of each difficulty quartile's problems by the threshold that joint chose."""
    if spread is None:
        axis.set_axis_off()
        return
    axis.set_title("joint's threshold by difficulty")
    bins, width = spread["bins"], 0.8 / GROUPS
    for group, shares in enumerate(spread["histogram"]):
        name = {0: "easiest quarter", GROUPS - 1: "hardest quarter"}.get(group, f"quarter {group + 1}")
        positions = np.arange(len(bins)) + (group - (GROUPS - 1) / 2) * width
        axis.bar(positions, shares, width, color=[0.15 + 0.2 * group, 0.35, 0.85 - 0.22 * group], label=name)
    axis.set_xticks(range(len(bins)), [f"{gamma:g}" for gamma in bins])
    axis.set(
        xlabel="chosen gamma, nats", ylabel=f"share of the problems (n = {spread['top_share']['n']} seeds)", ylim=(0, 1)
    )
    axis.legend(frameon=False, fontsize=8)
