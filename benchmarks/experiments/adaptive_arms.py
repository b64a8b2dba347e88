"""The arms of the adaptive study: how the threshold's advantage is taken, and how often rollouts explore."""

from __future__ import annotations

from study import Run, crossed

BINS = (0.1, 1.0, 4.0, 32.0)  # nats, of the mixture: from one token at a time to all at once
MEDLEY = {
    "heldout": 600,
    "compile": True,
    "updates": 120,
    "algorithm.prompts-per-update": 48,
    "rollout.threshold-gammas": BINS,
    "guard.every": 40,
}
TINY = {"heldout": 1000, "compile": True, "guard.every": 0}
SUDOKU = {
    "algorithm.prompts-per-update": 32,
    "updates": 150,
    "rollout.speed-exponent": 4.0,
    "rollout.threshold-gammas": (0.1, 0.5, 1.0, 2.0, 4.0),
}
COMMON = {"medley": MEDLEY, "countdown": TINY, "sudoku": TINY | SUDOKU}
OWN = "algorithm.threshold-advantage"
EXPLORE = "rollout.threshold-exploration"
READS = "rollout.threshold-reads"
DEFAULT = "std"  # the arm that diffpo.train does by default
ALONE = {"algorithm.train": "model", READS: None, "rollout.threshold-gammas": None}

ARMS = {
    **{kind: {OWN: kind, READS: "both"} for kind in ("mean", "std", "best", "rank", "leave_one_out")},
    **{f"{kind}-completion": {OWN: kind, READS: "completion"} for kind in ("mean", "std")},
    **{f"std-{reads}": {OWN: "std", READS: reads} for reads in ("attention", "entropies")},
    **{f"{kind}-explore": {OWN: kind, READS: "both", EXPLORE: 0.2} for kind in ("mean", "std")},
    "std-tokens": {"algorithm.advantage": "std", OWN: "std", READS: "both"},
    "exponent": {OWN: "mean", READS: "both", "rollout.speed-exponent": 0.25},
    "threshold": {OWN: "std", READS: "both", "algorithm.train": "threshold"},
    "model-0.1": ALONE | {"rollout.gamma": 0.1},
    "model-1": ALONE | {"rollout.gamma": 1.0},
}


def runs(seeds: int, tasks: tuple[str, ...], arms: tuple[str, ...] = tuple(ARMS)) -> list[Run]:
    """The runs of the given arms, seed by seed."""
    return crossed(seeds, tasks, arms, lambda task, arm: COMMON[task] | ARMS[arm])
