"""``python benchmarks/experiments/importance.py``: which importance weights train best, at fast rollouts and at careful ones?

{none, token, quarter, sequence} x {default, careful} x {countdown, sudoku}. default: the rollouts of adaptive.py's default arm, whose threshold is
trained too; careful: the model alone, at a fixed bound of .1 nats. Everything else is equal. By arm, over seeds: accuracy and NFE by the rule that was
trained, accuracy one token at a time, reward late in training, the differences to none and to token (the paper's) of the same seeds, and the weights
that were used. Runs that exist are not repeated; ``--report`` summarises what is there. Writes importance.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_arms import ALONE, COMMON, OWN, READS
from estimators import late, mean_weights, points
from rich.console import Console
from rich.table import Table
from seed_statistics import difference, estimate, text, verdict
from study import Options, Run, crossed, existing, parser, provenance, read, train_all, write

TASKS = ("countdown", "sudoku")
SEEDS = 5
MINUTES = 6.0  # one run, one core
KINDS = ("none", "token", "quarter", "sequence")
ROLLOUTS = {"default": {OWN: "std", READS: "both"}, "careful": ALONE | {"rollout.gamma": 0.1}}
ARMS = {
    f"{rollouts}-{kind}": settings | {"algorithm.importance-weights": kind}
    for rollouts, settings in ROLLOUTS.items()
    for kind in KINDS
}
REFERENCES = ("none", "token")
COLUMNS = {"accuracy": (100, 1), "careful": (100, 1), "nfe": (1, 2), "reward": (1, 3)}  # scale and digits


def runs(seeds: int, tasks: tuple[str, ...], arms: tuple[str, ...] = tuple(ARMS)) -> list[Run]:
    return crossed(seeds, tasks, arms, lambda task, arm: COMMON[task] | ARMS[arm])


def describe(arm: str, of_task: dict[str, list[dict]]) -> dict:
    """accuracy, nfe: by the rule that was trained; careful: the better of one token at a time and the careful bound; reward: mean over the
    last fifth of the curve; weights: at the end of training, by quarter of the steps; to_<reference>_points: accuracy less the reference's."""
    mine, rollouts = of_task[arm], arm.partition("-")[0]
    found = {
        "accuracy": estimate([r["trained"]["accuracy"] for r in mine]),
        "careful": estimate([r["careful"]["trained"]["accuracy"] for r in mine]),
        "nfe": estimate([r["trained"]["nfe"] for r in mine]),
        "reward": estimate([late(r["curve"]["reward"]) for r in mine]),
        "weights": mean_weights([r["weights"] for r in mine if r["weights"]]),
    }
    for reference in (f"{rollouts}-{kind}" for kind in REFERENCES):
        if reference in of_task and reference != arm:
            found[f"to_{reference}_points"] = difference(points(mine), points(of_task[reference]))
    return found


def summarise(results: Sequence[dict]) -> dict:
    """{task: {arm: numbers}} over the seeds there are; see `describe`."""
    found = {}
    for task in dict.fromkeys(result["task"] for result in results):
        of_task = {arm: [r for r in results if (r["task"], r["arm"]) == (task, arm)] for arm in ARMS}
        of_task = {arm: mine for arm, mine in of_task.items() if mine}
        found[task] = {arm: describe(arm, of_task) for arm in of_task}
    return found


def reading(tasks: dict[str, dict]) -> list[str]:
    """What the numbers say, a line an arm and a line a difference."""
    found = []
    for task, arms in tasks.items():
        for arm, of in arms.items():
            found.append(
                f"{task}, {arm}: {text(of['accuracy'], 100, 1)}% in {text(of['nfe'])} evaluations, "
                f"{text(of['careful'], 100, 1)}% when careful (n = {of['accuracy']['n']})."
            )
            for name, against in of.items():
                if name.endswith("_points") and against:
                    reference = name.removeprefix("to_").removesuffix("_points")
                    found.append(f"{task}, {arm} against {reference}: {text(against, 1, 1, '+')} points ({verdict(against)}).")  # fmt: skip
    return found


def by_quarter(of: dict, name: str) -> str:
    weights = of["weights"]
    return "-" if weights is None else " ".join("-" if value is None else f"{value:.2f}" for value in weights[name])


def report(results: list[dict], given: Options) -> None:
    tasks, console = summarise(results), Console(width=170, highlight=False)
    for task, arms in tasks.items():
        table = Table("arm", "seeds", *COLUMNS, "weight by quarter", "ESS by quarter", title=f"{task}: 95% intervals")
        for arm, of in arms.items():
            cells = (text(of[name], scale, digits) for name, (scale, digits) in COLUMNS.items())
            table.add_row(arm, str(of["nfe"]["n"]), *cells, by_quarter(of, "weight_mean"), by_quarter(of, "ess"))
        console.print(table)
    lines = reading(tasks)
    console.print(*lines, sep="\n")
    seeds = {"runs": sorted({result["seed"] for result in results})}
    write(given.output / "importance.json", {"tasks": tasks, "reading": lines, "provenance": provenance(seeds)})


def main() -> None:
    command = parser(__doc__, SEEDS, TASKS)
    command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments = command.parse_args()
    given = read(arguments)
    results = train_all("importance", runs(given.seeds, given.tasks, tuple(arguments.arms)), given, lambda run: MINUTES)
    if given.report:
        results = existing("importance", runs(SEEDS, given.tasks), given.output)
    report(results, given)


if __name__ == "__main__":
    main()
