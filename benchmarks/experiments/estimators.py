"""``python benchmarks/experiments/estimators.py``: which likelihood estimator trains best, per update, per denoiser call, per second?

{MF, MF + IS, 2-MF, 2-MF + IS, 4-MF + IS, exact} x {countdown, sudoku}. Everything else is equal: the model alone is trained, at a fixed entropy bound, by
the same clipped loss with the same KL, on correctness alone. MF without correction is d1's estimator. Beside them runs the base model, untrained, on the
same training prompts: training rewards and accuracies are taken over its own, so that a run of easy prompts is not mistaken for learning. Runs that
exist are not repeated; ``--report`` summarises what is there. Writes estimators.json, estimators.png (learning curves) and estimators_weights.png.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from learning_curves import AXES, BESIDE, PALETTE, SMOOTHED_UPDATES, STYLE, draw_band, race
from rich.console import Console
from rich.table import Table
from seed_statistics import difference, estimate, text, verdict
from study import QUARTERS, Options, Run, crossed, existing, on_one_processor, options, provenance, train_all, write

from diffpo_kernels.surrogate_loss import WEIGHT_EDGES

ESTIMATORS = {
    arm: {"algorithm.m": m, "algorithm.importance-weights": weights}
    for arm, m, weights in (
        ("mf", 1, "none"),
        ("mf-is", 1, "token"),
        ("2mf", 2, "none"),
        ("2mf-is", 2, "token"),
        ("4mf-is", 4, "token"),
        ("exact", 0, "none"),
    )
}
UNTRAINED = "untrained"
ARMS = ESTIMATORS | {UNTRAINED: ESTIMATORS["mf"] | {"optimizer.lr": 1e-30}}  # moves no weight
COLOURS = dict(zip(ESTIMATORS, PALETTE, strict=False))
SMOKE_ARMS = ("2mf-is", UNTRAINED)
SEEDS = 5
REFERENCES = ("mf", "2mf")  # what every arm is compared with
MINUTES = {"countdown": 2.5, "sudoku": 2.0}  # one run, one core; exact three times as long
COMMON = {
    "algorithm.train": "model",
    "algorithm.kl-coefficient": 0.05,
    "algorithm.prompts-per-update": 32,
    "algorithm.fresh-latents": False,
    "optimizer.lr": 2.5e-4,
    "rollout.order": "confidence",
    "updates": 150,
    "rollout.gamma": 0.1,
    "rollout.speed-exponent": 0.0,
    "heldout": 1000,
}
# Sudoku: an update takes more than three times as long, so half the prompts and fewer updates
OF_TASK = {"countdown": {}, "sudoku": {"algorithm.prompts-per-update": 16, "updates": 60}}


def runs(seeds: int, tasks: tuple[str, ...], arms: tuple[str, ...] = tuple(ARMS)) -> list[Run]:
    return crossed(seeds, tasks, arms, lambda task, arm: COMMON | OF_TASK[task] | ARMS[arm])


def summarise(results: list[dict]) -> dict:
    """{task: {arm: numbers}} over the seeds there are; see `describe`."""
    found: dict[str, dict] = {}
    for task in dict.fromkeys(result["task"] for result in results):
        mine = [result for result in results if result["task"] == task]
        arms = {arm: [r for r in mine if r["arm"] == arm] for arm in ESTIMATORS if any(r["arm"] == arm for r in mine)}
        untrained = {r["seed"]: r for r in mine if r["arm"] == UNTRAINED}
        found[task] = {arm: describe(arm, arms, untrained) for arm in arms}
    return found


def over_untrained(results: list[dict], untrained: dict[int, dict]) -> dict[int, dict]:
    """By seed the curves with training reward and accuracy less the untrained model's on the same prompts, for the seeds that have one."""
    return {
        r["seed"]: r["curve"] | {
            name: [ours - base for ours, base in zip(r["curve"][name], untrained[r["seed"]]["curve"][name], strict=True)]
            for name in ("reward", "accuracy")
        }
        for r in results if r["seed"] in untrained
    }  # fmt: skip


def describe(arm: str, arms: dict[str, list[dict]], untrained: dict[int, dict]) -> dict:
    """Final test accuracy and NFE, costs, gain in training reward, weights, and the paired differences to the references.

    accuracy: at the trained entropy bound, greedy. gain_points and to_untrained_points: over the base model one token at a time, and at the same
    bound, in percentage points. reward_over_untrained: mean over the last fifth of the curve. to_<reference>_points: accuracy less the
    reference's of the same seed, in percentage points; calls_<reference>: denoiser calls to the reference's best training accuracy over
    the untrained model's.
    """
    mine, everyone = arms[arm], [result for of in arms.values() for result in of]
    found = {
        "accuracy": estimate([r["trained"]["accuracy"] for r in mine]),
        "nfe": estimate([r["trained"]["nfe"] for r in mine]),
        "gain_points": estimate(
            [100 * (r["trained"]["accuracy"] - r["base"]["one_at_a_time"]["accuracy"]) for r in mine]
        ),
        "denoiser_calls": estimate([r["denoiser_calls"] for r in mine]),
        "seconds": estimate([r["curve"]["seconds"][-1] for r in on_one_processor(mine, everyone)]),
        "reward_over_untrained": estimate(
            [late(curve["reward"]) for curve in over_untrained(mine, untrained).values()]
        ),
        "to_untrained_points": difference(points(mine), points(untrained.values())),
        "weights": mean_weights([r["weights"] for r in mine if r.get("weights")]),
    }
    for reference in REFERENCES:
        if reference in arms and reference != arm:
            found[f"to_{reference}_points"] = difference(points(mine), points(arms[reference]))
            common = [over_untrained(arms[name], untrained) for name in (arm, reference)]
            seeds = sorted(common[0].keys() & common[1].keys())
            if seeds:
                found[f"calls_{reference}"] = race(*([curves[seed] for seed in seeds] for curves in common))
    return found


def together(summary: dict) -> dict:
    """{arm: {"to_<reference>_points": estimate}}: the paired differences of all tasks as one sample, a value for each task and seed.

    Only where every task has the difference.
    """
    found: dict[str, dict] = {}
    for arm in dict.fromkeys(arm for arms in summary.values() for arm in arms):
        for name in (f"to_{reference}_points" for reference in REFERENCES):
            of_tasks = [arms[arm][name] for arms in summary.values() if arms.get(arm, {}).get(name)]
            if len(of_tasks) == len(summary):
                found.setdefault(arm, {})[name] = estimate([value for of in of_tasks for value in of["values"]])
    return found


def points(results: Iterable[dict]) -> dict[int, float]:
    """Test accuracy in percent by seed."""
    return {r["seed"]: 100 * r["trained"]["accuracy"] for r in results}


def late(values: list[float]) -> float:
    """Mean of the last fifth."""
    return _mean(values[-max(len(values) // 5, 1) :])


def mean_weights(of_seeds: list[dict]) -> dict | None:
    """`study.late_weights` averaged over the seeds; None for results without."""
    if not of_seeds:
        return None
    found = {}
    for name in of_seeds[0]:
        by_quarter = [
            [weights[name][q] for weights in of_seeds if weights[name][q] is not None] for q in range(QUARTERS)
        ]
        found[name] = [_mean(values) if values else None for values in by_quarter]
    return found


def _mean(values: list):
    if isinstance(values[0], list):
        return [sum(column) / len(values) for column in zip(*values, strict=True)]
    return sum(values) / len(values)


def reading(summary: dict) -> list[str]:
    """What the numbers say, sentence by sentence."""
    found = []
    for task, arms in summary.items():
        for arm, numbers in arms.items():
            over, change = numbers["to_untrained_points"], numbers["reward_over_untrained"]
            found.append(
                f"{task}, {arm}: {text(numbers['accuracy'], 100, 1)}% at {text(numbers['nfe'])} NFE, {text(numbers['gain_points'], 1, 1, '+')} points over the base one token at "
                f"a time, {text(over, 1, 1, '+')} at the same bound (n = {numbers['accuracy']['n']}); its own training reward at the end is "
                f"{text(change, 1, 3, '+')} from the base's on the same prompts ({verdict(change)}; n = {change['n'] if change else 0})."
            )
            weights = numbers["weights"]
            if arm.endswith("-is") and weights:
                means = " ".join("-" if mean is None else f"{mean:.2f}" for mean in weights["weight_mean"])
                found.append(f"{task}, {arm}: mean capped weight by quarter of the steps {means}; below 1, these tokens weigh less in the gradient than without correction.")  # fmt: skip
        for reference in REFERENCES:
            for arm, numbers in arms.items():
                against, cost = numbers.get(f"to_{reference}_points"), numbers.get(f"calls_{reference}")
                if against is None:
                    continue
                found.append(
                    f"{task}, {arm} against {reference}: {text(against, 1, 1, '+')} points ({verdict(against)}; n = {against['n']}); "
                    f"denoiser calls to {reference}'s best smoothed training accuracy over the base's, over {reference}'s own: {cost['text'] if cost else '-'}."
                )
    if len(summary) > 1:
        found += [
            f"{' and '.join(summary)} together, {arm} against {reference}: {text(against, 1, 1, '+')} points ({verdict(against)}; n = {against['n']})."
            for reference in REFERENCES
            for arm, of in together(summary).items()
            if (against := of.get(f"to_{reference}_points"))
        ]
    return found


def draw(results: list[dict], path: Path) -> None:
    """Training reward and accuracy over the untrained model's of each task (rows) against updates, denoiser calls and seconds (columns)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    tasks = list(dict.fromkeys(result["task"] for result in results))
    rows = [(task, name) for task in tasks for name in ("reward", "accuracy")]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(rows), len(AXES), figsize=(13, 2.7 * len(rows) + 0.6), layout="constrained", squeeze=False, sharey="row")  # fmt: skip
        for line, (task, name) in zip(axes, rows, strict=True):
            mine = [result for result in results if result["task"] == task]
            untrained = {r["seed"]: r for r in mine if r["arm"] == UNTRAINED}
            for axis, (x, label) in zip(line, AXES.items(), strict=True):
                for arm, colour in COLOURS.items():
                    drawn = [r for r in (on_one_processor(mine, mine) if x == "seconds" else mine) if r["arm"] == arm]
                    curves = list(over_untrained(drawn, untrained).values())
                    if curves:
                        draw_band(axis, curves, x, name, colour, arm)
                axis.set_xlabel(f"{label}, runs on one processor" if x == "seconds" else label)
                axis.grid(color="0.92", linewidth=0.8)
            line[0].set(
                ylabel=f"training {name}",
                title=f"{task}: training {name} over the untrained model's, rollouts at T = 1",
            )
            line[1].xaxis.set_major_formatter(EngFormatter())
            line[-1].legend(*line[0].get_legend_handles_labels(), **BESIDE)
        figure.suptitle(
            f"Mean over seeds, trailing mean of {SMOOTHED_UPDATES} updates, band: one standard error", fontsize=10
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)


def draw_weights(summary: dict, path: Path) -> None:
    """Uncapped weights surrogate / true likelihood at the end of training: histogram by quarter of the steps, a row per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task, arms in summary.items() if any(numbers["weights"] for numbers in arms.values())]
    if not tasks:
        return
    centres = ["less", *(f"$2^{{{octave}}}$" for octave in range(-4, 5)), "more"]
    assert len(centres) == len(WEIGHT_EDGES) + 1
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(tasks), QUARTERS, figsize=(14, 2.8 * len(tasks) + 0.4), layout="constrained", squeeze=False, sharey="row")  # fmt: skip
        for line, task in zip(axes, tasks, strict=True):
            for q, axis in enumerate(line):
                for arm, numbers in summary[task].items():
                    shares = numbers["weights"] and numbers["weights"]["weight_histogram"][q]
                    if shares:
                        axis.step(
                            range(len(shares)),
                            shares,
                            where="mid",
                            color=COLOURS[arm],
                            label=f"{arm} (n = {numbers['accuracy']['n']})",
                        )
                axis.set(
                    title=f"{task}, quarter {q + 1} of the steps",
                    yscale="log",
                    ylim=(1e-4, 1.5),
                    xlabel="uncapped weight",
                )
                axis.set_xticks(range(0, len(centres), 2), centres[::2])
            line[0].set_ylabel("share of the tokens")
            line[-1].legend(**BESIDE)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def print_tables(summary: dict, console: Console) -> None:
    for task, arms in summary.items():
        table = Table("arm", "n", "accuracy, %", "NFE", "calls", "seconds", "- base, points", "- mf, points", "- 2mf, points", "calls to mf's best", "ESS by quarter",
                      title=f"{task}: 95% intervals over seeds")  # fmt: skip
        for arm, numbers in arms.items():
            weights, race_to_mf = numbers["weights"], numbers.get("calls_mf")
            table.add_row(
                arm, str(numbers["accuracy"]["n"]), text(numbers["accuracy"], 100, 1), text(numbers["nfe"]),
                f"{numbers['denoiser_calls']['mean']:,.0f}", text(numbers["seconds"], 1, 0),
                *(text(numbers.get(f"to_{reference}_points"), 1, 1, "+") for reference in (UNTRAINED, *REFERENCES)),
                "" if race_to_mf is None else race_to_mf["text"],
                "-" if weights is None else " ".join("-" if ess is None else f"{ess:.2f}" for ess in weights["ess"]),
            )  # fmt: skip
        console.print(table)


def report(results: list[dict], given: Options) -> None:
    summary = summarise(results)
    document = {
        "tasks": summary,
        "untrained": {r["task"]: r["trained"] for r in results if r["arm"] == UNTRAINED},
        "together": together(summary),
        "smoothed_updates": SMOOTHED_UPDATES,
        "weight_edges": WEIGHT_EDGES,
        "reading": reading(summary),
    }
    seeds = {"runs": sorted({result["seed"] for result in results})}
    write(given.output / "estimators.json", document | {"provenance": provenance(seeds)})
    draw(results, given.output / "estimators.png")
    draw_weights(summary, given.output / "estimators_weights.png")
    console = Console(width=180, highlight=False)
    print_tables(summary, console)
    console.print(*document["reading"], sep="\n")


def main() -> None:
    given = options(__doc__, SEEDS)
    wanted = runs(given.seeds, given.tasks, SMOKE_ARMS if given.smoke else tuple(ARMS))
    results = train_all("estimators", wanted, given, lambda run: MINUTES[run.task] * (3 if run.arm == "exact" else 1))
    if not given.smoke:  # the summary is of all that is there, whatever was trained just now
        results = existing("estimators", runs(SEEDS, tuple(OF_TASK)), given.output)
    if results:
        report(results, given)


if __name__ == "__main__":
    main()
