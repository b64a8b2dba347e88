"""The sampler study in numbers and sentences."""

from __future__ import annotations

from front_area import area, aup, common_limit
from learning_curves import race
from rich.console import Console
from rich.table import Table
from seed_statistics import estimate, ratio, text
from study import on_one_processor

TRAINED = ("joint", "joint-long")  # the arms that the targets are for
# what their areas are divided by
AGAINST = ("d1", "d1-2", "model-0.1", "model-0.5", "model-0.5-priced", "model-2", "base")


def pairs(front: dict) -> list[tuple[float, float]]:
    """(tokens per forward, accuracy) of a sweep."""
    return [(point["tokens_per_forward"], point["accuracy"]) for point in front["points"]]


def operating_point(result: dict) -> dict:
    """Where a run's own rule decodes: the learned threshold, or the entropy bound of its rollouts (from the training run itself)."""
    return next((point for point in result["front"]["points"] if point["learned"]), result["trained"])


def summarise(results: list[dict], bases: dict) -> dict:
    """{task: numbers} over the seeds there are.

    limit: tokens per forward up to which areas run; best_accuracy: y_max of the weight, over all points of the task; base: areas, and its
    best accuracy under any untrained rule; arms: `describe` of each; ratios: the areas of each of TRAINED over others', by seed; target: each of TRAINED at its learned threshold against the base's best point: gain in percentage points, share of its NFE;
    race: joint's denoiser calls to d1's best training accuracy; best: the best accuracies of joint and d1 (`best_against_d1`).
    """
    found = {}
    for task, base in bases.items():
        mine = [result for result in results if result["task"] == task]
        if not mine:
            continue
        fronts = [pairs(base), *(pairs(result["front"]) for result in mine)]
        y_max, limit = max(y for line in fronts for _, y in line), common_limit(fronts)
        arms = {arm: [r for r in mine if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in mine)}
        areas = {arm: {r["seed"]: {"aup": aup(pairs(r["front"]), y_max), "area": area(pairs(r["front"]), y_max, limit), "calls": r["denoiser_calls"]} for r in of} for arm, of in arms.items()}  # fmt: skip
        base_areas = {"aup": aup(pairs(base), y_max), "area": area(pairs(base), y_max, limit)}
        areas["base"] = dict.fromkeys((result["seed"] for result in mine), base_areas)
        found[task] = {
            "limit": limit,
            "best_accuracy": y_max,
            "base": {**base_areas, "best": base["best"], "rules": base["rules"]},
            "arms": {arm: describe(of, areas[arm], mine) for arm, of in arms.items()},
            "ratios": {arm: ratios(arm, areas) for arm in TRAINED if arm in arms},
            "target": {arm: target(arms[arm], base["best"]) for arm in TRAINED if arm in arms},
            "race": joint_against_d1(arms),
            "best": best_against_d1(arms),
        }
    return found


def describe(results: list[dict], areas: dict[int, dict], everyone: list[dict]) -> dict:
    """Accuracy and NFE at the run's own rule, its best accuracy over the sweep, areas, costs (seconds of one processor: that of most
    of everyone's runs), and how the threshold is spread (None without one), over the seeds."""
    points, spread = [operating_point(r) for r in results], [r["adaptation"] for r in results if r["adaptation"]]
    found = {
        "accuracy": estimate([point["accuracy"] for point in points]),
        "nfe": estimate([point["nfe"] for point in points]),
        "best_accuracy": estimate([best_accuracy(r) for r in results]),
        "aup": estimate([values["aup"] for values in areas.values()]),
        "area": estimate([values["area"] for values in areas.values()]),
        "denoiser_calls": estimate([r["denoiser_calls"] for r in results]),
        "seconds": estimate([r["curve"]["seconds"][-1] for r in on_one_processor(results, everyone)]),
        "threshold": None,
    }
    if spread:
        names = ("top_share", "top_gamma", "bin_entropy", "information", "p_value", "spearman")
        found["threshold"] = {name: estimate([s[name] for s in spread if s[name] is not None]) for name in names}
        found["threshold"]["bins"] = results[0]["front"]["bins"]
        histograms = [s["histogram"] for s in spread]
        found["threshold"]["histogram"] = [[sum(cell) / len(cell) for cell in zip(*rows, strict=True)] for rows in zip(*histograms, strict=True)]  # fmt: skip
    return found


def ratios(arm: str, areas: dict[str, dict[int, dict]]) -> dict:
    """An arm's AUP, area and denoiser calls divided by those of AGAINST, seed by seed; the base model has no calls."""
    return {
        other: {kind: ratio(*({seed: values[kind] for seed, values in areas[name].items()} for name in (arm, other))) for kind in ("aup", "area", "calls")[: 2 if other == "base" else 3]}
        for other in AGAINST
        if other in areas
    }  # fmt: skip


def best_accuracy(result: dict) -> float:
    """Greedy, the highest over the sweep of entropy bounds: picked on the test problems, the same number of them for every arm."""
    return max(point["accuracy"] for point in result["front"]["points"] if not point["learned"])


def target(results: list[dict], best: dict) -> dict:
    points = [operating_point(result) for result in results]
    return {
        "gain_points": estimate([100 * (point["accuracy"] - best["accuracy"]) for point in points]),
        "nfe_share": estimate([point["nfe"] / best["nfe"] for point in points]),
    }


def joint_against_d1(arms: dict[str, list[dict]]) -> dict | None:
    """`race` of training accuracies, which are not quite alike: joint draws its thresholds, widely at first, d1 decodes at a fixed bound."""
    curves = [{r["seed"]: r["curve"] for r in arms.get(arm, [])} for arm in ("joint", "d1")]
    seeds = sorted(curves[0].keys() & curves[1].keys())
    return race(*([of[seed] for seed in seeds] for of in curves)) if seeds else None


def best_against_d1(arms: dict[str, list[dict]]) -> dict | None:
    """joint's best greedy accuracy less d1's (percentage points), and its share of d1's denoiser calls, over the seeds both have."""
    joint, d1 = ({r["seed"]: r for r in arms.get(arm, [])} for arm in ("joint", "d1"))
    seeds = sorted(joint.keys() & d1.keys())
    if not seeds:
        return None
    return {
        "gain_points": estimate([100 * (best_accuracy(joint[seed]) - best_accuracy(d1[seed])) for seed in seeds]),
        "calls_share": estimate([joint[seed]["denoiser_calls"] / d1[seed]["denoiser_calls"] for seed in seeds]),
    }


def reading(summary: dict) -> list[str]:
    """What the numbers say, sentence by sentence."""
    found = []
    for task, numbers in summary.items():
        base, calls = numbers["base"]["best"], numbers["race"]
        found.append(f"{task}: the base model's best of {numbers['base']['rules']} rules is {base['accuracy']:.1%} at {base['nfe']:.2f} NFE ({base['rule']}).")  # fmt: skip
        for arm, of in numbers["arms"].items():
            found.append(f"{task}, {arm}: {text(of['accuracy'], 100, 1)}% at {text(of['nfe'])} NFE, area {text(of['area'], 1, 3)} up to {numbers['limit']:.2f} tokens per forward, AUP {text(of['aup'], 1, 3)} (n = {of['area']['n']}).")  # fmt: skip
            if of["threshold"]:
                found.append(threshold_sentence(task, arm, of["threshold"]))
        for arm, others in numbers["ratios"].items():
            found += [f"{task}: {arm}'s area over that of {other}: {text(of['area'])}, its AUP {text(of['aup'])}, its denoiser calls {text(of.get('calls'))} (n = {of['area']['n'] if of['area'] else 0})." for other, of in others.items()]  # fmt: skip
        for arm, goal in numbers["target"].items():
            found.append(f"{task}: {arm} at its learned threshold is {text(goal['gain_points'], 1, 1, '+')} points from the base's best accuracy, at {text(goal['nfe_share'])} of its NFE (n = {goal['gain_points']['n']}).")  # fmt: skip
        if calls:
            found.append(f"{task}: d1's best smoothed training accuracy is {calls['level']:.1%}; joint's denoiser calls to it, over d1's own: {calls['text']}.")  # fmt: skip
        if best := numbers["best"]:
            found.append(f"{task}: joint's best accuracy over the sweep is {text(best['gain_points'], 1, 1, '+')} points from d1's, with {text(best['calls_share'])} of its calls (n = {best['gain_points']['n']}).")  # fmt: skip
    return found


def threshold_sentence(task: str, arm: str, spread: dict) -> str:
    share, information, p_value = (spread[name] for name in ("top_share", "information", "p_value"))
    significant = sum(value < 0.05 for value in p_value["values"])
    return (
        f"{task}, {arm}: the most common threshold (gamma {', '.join(f'{g:g}' for g in spread['top_gamma']['values'])} by seed) is chosen for {text(share, 100, 1)}% of the problems; "
        f"mutual information with the difficulty {text(information, 1, 4)} nats of {text(spread['bin_entropy'], 1, 3)} nats of spread, "
        f"beyond chance (p < .05) in {significant} of {p_value['n']} seeds; rank correlation of gamma with difficulty {text(spread['spearman'], 1, 2, '+')}."
    )


def print_tables(summary: dict, console: Console) -> None:
    for task, numbers in summary.items():
        table = Table(
            "arm",
            "n",
            "accuracy, %",
            "NFE",
            "area",
            "AUP",
            "calls",
            "top bin",
            "information, nats",
            title=f"{task}: 95% intervals over seeds",
        )
        base = numbers["base"]
        table.add_row("base, best rule", "1", f"{100 * base['best']['accuracy']:.1f}", f"{base['best']['nfe']:.2f}", f"{base['area']:.3f}", f"{base['aup']:.3f}")  # fmt: skip
        for arm, of in numbers["arms"].items():
            spread = of["threshold"]
            table.add_row(
                arm, str(of["area"]["n"]), text(of["accuracy"], 100, 1), text(of["nfe"]), text(of["area"], 1, 3), text(of["aup"], 1, 3),
                f"{of['denoiser_calls']['mean']:,.0f}", *((text(spread["top_share"]), text(spread["information"], 1, 4)) if spread else ("", "")),
            )  # fmt: skip
        console.print(table)
