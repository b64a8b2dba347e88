"""Learning curves of many seeds: smoothed alike, averaged on a common axis, and the cost at which one arm reaches another's best.

A curve is what `study.curve` stores: equally long columns, one entry per window of updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SMOOTHED_UPDATES = 15
AXES = {"update": "gradient updates", "denoiser_calls": "denoiser calls (sequences)", "seconds": "seconds of training"}
# Okabe and Ito's colours, told apart with any colour vision
PALETTE = (
    "#5A5A5A",
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#000000",
    "#B8A800",
)
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
BESIDE = {
    "frameon": False,
    "fontsize": 8,
    "loc": "upper left",
    "bbox_to_anchor": (1.0, 1.0),
}  # a legend right of its axis


def smooth(curve: Mapping[str, Sequence[float]], name: str) -> np.ndarray:
    """Trailing mean of a column over `SMOOTHED_UPDATES` updates (fewer where the curve begins), the same for every arm."""
    update, values = np.array(curve["update"], dtype=float), np.array(curve[name], dtype=float)
    return np.array([values[(update > u - SMOOTHED_UPDATES) & (update <= u)].mean() for u in update])


def mean_curve(
    curves: Sequence[Mapping], x: str, y: str, points: int = 200
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, standard error) of the smoothed curves of several seeds, interpolated where all of them have values.

    The error is 0 with one seed.
    """
    starts, ends = [curve[x][0] for curve in curves], [curve[x][-1] for curve in curves]
    grid = np.linspace(max(starts), max(min(ends), max(starts)), points)
    values = np.stack([np.interp(grid, curve[x], smooth(curve, y)) for curve in curves])
    error = values.std(axis=0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else np.zeros(points)
    return grid, values.mean(axis=0), error


def cost_to_reach(
    curves: Sequence[Mapping], level: float, x: str = "denoiser_calls", y: str = "accuracy"
) -> float | None:
    """The first x at which the mean over seeds of the smoothed curves is at least `level`; None if it never is."""
    grid, mean, _ = mean_curve(curves, x, y)
    reached = np.flatnonzero(mean >= level)
    return float(grid[reached[0]]) if len(reached) else None


def race(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> dict:
    """How many denoiser calls `ours` need for the best training accuracy of `theirs`, and how many `theirs` need.

    level: the maximum of the mean over seeds of the smoothed training accuracy (rollouts at T = 1) of `theirs`; calls: where the same
    mean of either side first reaches it; ratio = ours / theirs, None if `ours` never do. by_seed: the same ratio, each seed by itself
    (its own level, its own smoothed curve), None if that seed never does; text: all of this in words.
    """
    grid, mean, _ = mean_curve(theirs, "denoiser_calls", "accuracy")
    level = float(mean.max())
    ours_calls, theirs_calls = cost_to_reach(ours, level), cost_to_reach(theirs, level)
    by_seed = []
    for mine, other in zip(ours, theirs, strict=False):
        best = float(mean_curve([other], "denoiser_calls", "accuracy")[1].max())
        calls = cost_to_reach([mine], best)
        by_seed.append(calls and calls / cost_to_reach([other], best))
    ratio = ours_calls and ours_calls / theirs_calls
    each = ", ".join("never" if of is None else f"{of:.2f}" for of in by_seed)
    return {
        "level": level,
        "calls": ours_calls,
        "their_calls": theirs_calls,
        "ratio": ratio,
        "by_seed": by_seed,
        "text": f"{'never' if ratio is None else f'{ratio:.2f}'} on the mean curves, by seed {each}"
        + (" (no race: that best is the first value)" if theirs_calls == grid[0] else ""),
    }


def draw_band(axis, curves: Sequence[Mapping], x: str, y: str, colour: str, label: str) -> None:
    """The mean over seeds with a band of one standard error."""
    grid, mean, error = mean_curve(curves, x, y)
    axis.plot(grid, mean, color=colour, linewidth=1.6, label=f"{label} (n = {len(curves)})")
    axis.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)
