"""The arms of the sampler study: what is trained, with which settings, on which task, with how many seeds."""

from __future__ import annotations

from study import EARLIER, Run

COMMON = {"heldout": 1000, "compile": True}
PARALLEL = {
    "algorithm.fresh-latents": False,
    "algorithm.kl-coefficient": 0.01,
    "algorithm.prompts-per-update": 64,
    "optimizer.lr": 2e-4,
    "rollout.order": "confidence",
    "updates": 800,
}
JOINT = PARALLEL | EARLIER | {"rollout.threshold-gammas": (2.0, 3.0, 4.0, 6.0), "rollout.speed-exponent": 1.0}
ALONE = PARALLEL | {"algorithm.train": "model", "rollout.speed-exponent": 0.0}  # for correctness alone
D1 = {
    "algorithm.name": "d1",
    "rollout.speed-exponent": 0.0,
    "rollout.order": "confidence",
    "algorithm.fresh-latents": True,
    "optimizer.lr": 1e-4,
}

# Updates: about 300,000 denoiser calls for joint and model-2, 1.65 M for joint-long, about 500,000 for the others.
# Ratios are reported with their share of calls.
ARMS = {
    "joint-long": JOINT | {
        "rollout.threshold-gammas": (0.5, 0.75, 1.0, 1.5), "algorithm.fresh-latents": True,
        "algorithm.prompts-per-update": 128, "optimizer.lr": 3e-4, "updates": 1000,
    },
    "joint": JOINT,
    # at d1's bound, and at larger ones
    "model-0.1": ALONE | {
        "rollout.gamma": 0.1, "algorithm.kl-coefficient": 0.05, "optimizer.lr": 2.5e-4, "algorithm.fresh-latents": True, "updates": 220,
    },
    "model-0.5": ALONE | {"rollout.gamma": 0.5, "updates": 600},
    "model-2": ALONE | {"rollout.gamma": 2.0},
    "d1": D1 | {"rollout.gamma": 0.1, "updates": 240},
    "d1-2": D1 | {"rollout.gamma": 2.0, "updates": 400},
}  # fmt: skip
# How many seeds each has: those that the claims are about five.
SEEDS = {"joint-long": 5, "joint": 5, "model-0.1": 1, "model-0.5": 2, "model-2": 5, "d1": 5, "d1-2": 1}
# Sudoku: an update takes five times as long, so there are fewer. Exponent 4: there an evaluation costs about a tenth of a solved problem, which is where
# headroom.py finds that choosing by the prompt can pay. model-0.5-priced: the model alone for the same reward as joint, which leaves out partial credit
SUDOKU = {"algorithm.prompts-per-update": 32, "updates": 150}
SUDOKU_ARMS = {
    "joint": JOINT | SUDOKU | {"rollout.speed-exponent": 4.0, "rollout.threshold-gammas": (0.1, 0.5, 1.0, 2.0, 4.0)},
    "model-0.5": ALONE | SUDOKU | {"rollout.gamma": 0.5},
    "model-0.5-priced": ALONE | SUDOKU | {"rollout.gamma": 0.5, "rollout.speed-exponent": 4.0},
    "d1": D1 | {"algorithm.prompts-per-update": 32, "rollout.gamma": 0.1, "updates": 60},
}
SUDOKU_SEEDS = {"joint": 5, "model-0.5": 5, "model-0.5-priced": 3, "d1": 5}
PLAN = {"countdown": (ARMS, SEEDS), "sudoku": (SUDOKU_ARMS, SUDOKU_SEEDS)}
NAMES = tuple(dict.fromkeys((*ARMS, *SUDOKU_ARMS)))


def runs(seeds: int, tasks: tuple[str, ...], arms: tuple[str, ...] = NAMES) -> list[Run]:
    """The runs of the given arms, seed by seed, at most `seeds` of each."""
    return [
        Run(arm, task, seed, COMMON | PLAN[task][0][arm])
        for seed in range(seeds)
        for task in tasks
        for arm in PLAN[task][0]
        if arm in arms and seed < PLAN[task][1][arm]
    ]
