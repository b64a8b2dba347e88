"""``python benchmarks/experiments/estimators.py``: which likelihood estimator trains best, per update, per denoiser call, per second?

{MF, MF + IS, 2-MF, 2-MF + IS, 4-MF + IS, exact} x {countdown, sudoku}. Everything else is equal: the model alone is trained, at a fixed entropy bound, by
the same clipped loss with the same KL, on correctness alone. MF without correction is d1's estimator.
"""

from __future__ import annotations

from study import Run, options, train_all

ESTIMATORS = {
    "mf": (1, False),
    "mf-is": (1, True),
    "2mf": (2, False),
    "2mf-is": (2, True),
    "4mf-is": (4, True),
    "exact": (0, False),
}
UPDATES = 150
MINUTES = {"countdown": 5.0, "sudoku": 8.0}  # one run, one core
COMMON = {
    "algorithm.mode": "model",
    "updates": UPDATES,
    "rollout.gamma": 0.1,
    "rollout.speed-exponent": 0.0,
    "heldout": 1000,
}


def runs(seeds: int, tasks: tuple[str, ...]) -> list[Run]:
    return [
        Run(arm, task, seed, COMMON | {"algorithm.m": m, "algorithm.importance-correction": correct})
        for seed in range(seeds)
        for task in tasks
        for arm, (m, correct) in ESTIMATORS.items()
    ]


def main() -> None:
    given = options(__doc__)
    results = train_all(
        "estimators",
        runs(given.seeds, given.tasks),
        given,
        lambda run: MINUTES[run.task] * (3 if run.arm == "exact" else 1),
    )
    for result in results:
        print(
            result["task"],
            result["arm"],
            result["seed"],
            result["trained"],
            result["denoiser_calls"],
            result["seconds"],
        )


if __name__ == "__main__":
    main()
