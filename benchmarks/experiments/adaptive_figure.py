"""The bound chosen for each problem against the largest that it can bear, by kind: before and after training the threshold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from learning_curves import PALETTE, STYLE

SPREAD = 0.32  # of the dots around their bin, so that they can be told apart


def bearable(points: Sequence[dict]) -> np.ndarray:
    """The last of the bins, from careful to fast, at which the base model solves each problem; -1 where it solves it at none."""
    solved = np.array([point["solved"] for point in points])
    return np.where(solved.any(axis=0), len(points) - 1 - solved[::-1].argmax(axis=0), -1)


def draw(base: dict, points: Sequence[dict], trained: dict, one: float, path: Path) -> None:
    """points: the base model's at the bins; one: the best bound for all (nats). Problems that the base solves at no bin are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bins, kinds, bears = trained["bins"], np.array(base["kinds"]), bearable(points)
    chosen = np.array(trained["learned"]["chosen"])
    before = np.full(len(chosen), bins.index(one))
    rng = np.random.default_rng(0)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
        panels = ((before, "before: the best bound for all"), (chosen, "after: the threshold that was trained"))
        for axis, (bounds, title) in zip(axes, panels, strict=True):
            x, y = (bound + rng.uniform(-SPREAD, SPREAD, len(kinds)) for bound in (bears, bounds))
            for kind, colour in zip(np.unique(kinds), PALETTE[1:], strict=False):
                of_kind = (kinds == kind) & (bears >= 0)
                axis.scatter(x[of_kind], y[of_kind], s=7, color=colour, label=kind, linewidths=0)
            axis.plot([-0.5, len(bins) - 0.5], [-0.5, len(bins) - 0.5], color="#BBBBBB", zorder=0, linewidth=1)
            axis.set(title=title, xlabel="largest bound that still solves the problem, nats")
            axis.set_xticks(range(len(bins)), [f"{gamma:g}" for gamma in bins])
            axis.set_yticks(range(len(bins)), [f"{gamma:g}" for gamma in bins])
        axes[0].set_ylabel("bound chosen, nats")
        axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=2)
        figure.savefig(path, dpi=150)
        plt.close(figure)
