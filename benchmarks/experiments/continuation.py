"""``python benchmarks/experiments/continuation.py``: how much of reinforcement learning's gain is just more training?

The shipped base model is trained further by its pretraining loss, on fresh examples, for as many denoiser calls (sequences through the
network; backward passes are counted on neither side) as the joint run of the same seed in sampler.py spent; the learning rate warms up and falls linearly to a
tenth, as there. Every one of these calls has a backward pass; in reinforcement learning most are rollouts without one, so the control gets more
arithmetic, not less. Two peak rates: pretraining's own, and reinforcement learning's. Then the same sweep of entropy bounds as in sampler.py.

Needs sampler.py's joint runs (or ``--calls``). What exists is not repeated. Writes continuation.json and continuation.png.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from decode_front import GAMMAS, SMOKE_GAMMAS, sweep
from front_area import area, common_limit, front
from learning_curves import PALETTE, STYLE
from rich.console import Console
from sampler_arms import PLAN
from sampler_figure import draw_band_of_fronts, label_front_axis
from sampler_report import operating_point, pairs
from seed_statistics import difference, estimate, ratio, text, verdict
from study import Options, parser, provenance, read, write

from diffpo.config import PretrainConfig, fail
from diffpo.training.config import ROLLOUT_PROXY, OptimizerConfig

RATES = {"pretraining's rate": PretrainConfig().lr, "rl's rate": OptimizerConfig().lr}
BOUND = 0.1  # nats, of the comparison at a fixed bound
SECONDS_PER_CALL = 0.0017  # forward and backward of one sequence, one core
HELDOUT = 1000
FIRST_SEED = 1000  # the base models were made with seed 0, which decides their examples


@dataclass(frozen=True)
class Continuation:
    task: str
    arm: str
    seed: int
    calls: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.arm.replace(' ', '-').replace(chr(39), '')}-seed{self.seed}"

    def flags(self) -> dict:
        """Of ``python -m diffpo.pretrain``."""
        optimizer, batch = OptimizerConfig(), PretrainConfig().batch_size
        steps = max(round(self.calls / batch), 1)
        return {
            "task": self.task,
            "start": f"tiny-{self.task}",
            "steps": steps,
            "batch-size": batch,
            "lr": RATES[self.arm],
            "warmup-steps": max(round(steps * optimizer.warmup_updates / PLAN[self.task][0]["joint"]["updates"]), 1),
            "final-lr-fraction": optimizer.final_lr_fraction,
            "seed": FIRST_SEED + self.seed,
        }


def joint_runs(output: Path, task: str) -> dict[int, dict]:
    """The joint runs of sampler.py by seed, with their fronts."""
    found = {}
    for path in sorted((output / "sampler").glob(f"{task}-joint-seed*.json")):
        curve = path.parent / "fronts" / path.name
        if curve.exists():
            result = json.loads(path.read_text())
            found[result["seed"]] = result | {"front": json.loads(curve.read_text())}
    return found


def plan(task: str, given: Options, calls: int | None) -> list[Continuation]:
    """Both rates for every seed; exit code 2 when nobody says how many calls."""
    spent = {seed: result["denoiser_calls"] for seed, result in joint_runs(given.output, task).items()}
    seeds = range(min(given.seeds, PLAN[task][1]["joint"]))  # as many as sampler.py has
    if calls is None and not all(seed in spent for seed in seeds):
        fail(f"{task}: no joint runs of seeds {[s for s in seeds if s not in spent]} in {given.output.name}/sampler: run sampler.py first, or give --calls")  # fmt: skip
    rates = list(RATES)[-1:] if given.smoke else RATES
    return [Continuation(task, arm, seed, calls or spent[seed]) for seed in seeds for arm in rates]


def train(run: Continuation, given: Options) -> None:
    """One run in its own process with one thread, and its front; a run that was interrupted starts again."""
    folder, path = given.runs / "continuation" / run.name, given.output / "continuation" / f"{run.name}.json"
    heldout, gammas = (16, SMOKE_GAMMAS) if given.smoke else (HELDOUT, GAMMAS)
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        flags = run.flags() | {"output": folder, "heldout": heldout, "device": given.device}
        command = [sys.executable, "-m", "diffpo.pretrain"]
        command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{run.name} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    swept = sweep(str(folder), run.task, ROLLOUT_PROXY, heldout, gammas)
    about = {"arm": run.arm, "task": run.task, "seed": run.seed, "denoiser_calls": run.calls, "flags": run.flags()}
    write(path, about | {"front": swept, "provenance": provenance({"run": FIRST_SEED + run.seed})})


def bases(tasks: tuple[str, ...], given: Options) -> dict[str, dict]:
    """The base models' fronts, from sampler.py or measured here."""
    found = {}
    for task in tasks:
        paths = [
            given.output / "sampler" / "fronts" / f"{task}-base.json",
            given.output / "continuation" / f"{task}-base.json",
        ]
        if not any(path.exists() for path in paths):
            heldout, gammas = (16, SMOKE_GAMMAS) if given.smoke else (HELDOUT, GAMMAS)
            write(paths[1], sweep(f"tiny-{task}", task, ROLLOUT_PROXY, heldout, gammas) | {"provenance": provenance({"heldout": 0})})  # fmt: skip
        found[task] = json.loads(next(path for path in paths if path.exists()).read_text())
    return found


def accuracies(swept: dict) -> dict[str, float]:
    """Under the rules compared: one token at a time (bound 0), at a fixed bound where the sweep has it, and at the best bound."""
    bounds = {point["gamma"]: point["accuracy"] for point in swept["points"] if not point["learned"]}
    nearest = min((gamma for gamma in bounds if gamma != "inf"), key=lambda gamma: abs(gamma - BOUND))
    return {"one at a time": bounds[0.0], f"bound {nearest:.3g}": bounds[nearest], "best bound": max(bounds.values())}


def summarise(results: list[dict], joint: dict[str, dict[int, dict]], base: dict[str, dict]) -> dict:
    """{task: {"arms": {arm: ...}, "joint": ...}} over the seeds there are.

    gain_points: over the base model by rule, in percentage points; for joint also at its learned threshold, over the base's best bound.
    joint_less_points: joint's accuracy less this arm's by rule, same seed; share: mean gain of this arm over mean gain of joint by rule;
    area: up to the tokens per forward that all reach; joint_over: joint's area over this arm's, same seed.
    """
    found = {}
    for task in dict.fromkeys(result["task"] for result in results):
        groups = {
            arm: {r["seed"]: r["front"] for r in results if (r["task"], r["arm"]) == (task, arm)} for arm in RATES
        }
        groups = {arm: of for arm, of in groups.items() if of} | ({"joint": {s: r["front"] for s, r in joint[task].items()}} if joint[task] else {})  # fmt: skip
        lines = [
            pairs({"points": points})
            for points in [base[task]["points"], *(swept["points"] for of in groups.values() for swept in of.values())]
        ]
        y_max, limit = max(y for line in lines for _, y in line), common_limit(lines)
        areas = {
            arm: {seed: area(pairs(swept), y_max, limit) for seed, swept in of.items()} for arm, of in groups.items()
        }
        arms = {
            arm: gains(of, base[task]) | {"area": estimate(list(areas[arm].values()))} for arm, of in groups.items()
        }
        for arm, numbers in arms.items():
            if "joint" in arms and arm != "joint":
                numbers["joint_less_points"] = {
                    rule: difference(percent(groups["joint"], rule), percent(groups[arm], rule))
                    for rule in numbers["gain_points"]
                }
                numbers["share"] = {
                    rule: of["mean"] / arms["joint"]["gain_points"][rule]["mean"]
                    for rule, of in numbers["gain_points"].items()
                    if arms["joint"]["gain_points"][rule]["mean"] > 0
                }
                numbers["joint_over"] = ratio(areas["joint"], areas[arm])
        learned = [operating_point(r)["accuracy"] for r in joint[task].values()]
        best = accuracies(base[task])["best bound"]
        found[task] = {
            "base": accuracies(base[task]), "limit": limit, "arms": arms,
            "joint_learned_points": estimate([100 * (value - best) for value in learned]),
            "denoiser_calls": estimate([r["denoiser_calls"] for r in results if r["task"] == task]),
        }  # fmt: skip
    return found


def percent(fronts: dict[int, dict], rule: str) -> dict[int, float]:
    return {seed: 100 * accuracies(swept)[rule] for seed, swept in fronts.items()}


def gains(fronts: dict[int, dict], base: dict) -> dict:
    of_base = accuracies(base)
    rules = {rule: percent(fronts, rule) for rule in of_base}
    return {
        "accuracy": {rule: estimate([value / 100 for value in values.values()]) for rule, values in rules.items()},
        "gain_points": {
            rule: estimate([value - 100 * of_base[rule] for value in values.values()]) for rule, values in rules.items()
        },
    }


def reading(summary: dict) -> list[str]:
    """What the numbers say, sentence by sentence."""
    found = []
    for task, numbers in summary.items():
        for arm, of in numbers["arms"].items():
            by_rule = "; ".join(f"{rule} {text(gain, 1, 1, '+')}" for rule, gain in of["gain_points"].items())
            n = next(iter(of["gain_points"].values()))["n"]
            found.append(f"{task}, {arm}: points over the base model: {by_rule} (n = {n}).")
            for rule, rest in of.get("joint_less_points", {}).items():
                share = (
                    f"more training alone makes {of['share'][rule]:.0%} of joint's gain"
                    if rule in of["share"]
                    else "joint gains nothing there"
                )
                found.append(
                    f"{task}, {rule}: joint less {arm} {text(rest, 1, 1, '+')} points ({verdict(rest)}); {share}."
                )
        if numbers["joint_learned_points"]:
            found.append(f"{task}: joint at its learned threshold is {text(numbers['joint_learned_points'], 1, 1, '+')} points above the base at its best bound.")  # fmt: skip
    return found


def draw(results: list[dict], joint: dict, base: dict, summary: dict, path: Path) -> None:
    """Fronts of the base model, its continuations and joint, a panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(summary), figsize=(6 * len(summary), 4.2), layout="constrained", squeeze=False
        )
        for axis, (task, numbers) in zip(axes[0], summary.items(), strict=True):
            groups = {"base": [base[task]]} | {
                arm: [r["front"] for r in results if (r["task"], r["arm"]) == (task, arm)] for arm in RATES
            }
            groups["joint"] = [result["front"] for result in joint[task].values()]
            for colour, (arm, fronts) in zip(PALETTE, groups.items(), strict=False):
                if fronts:
                    label = arm if arm in ("base", "joint") else f"more training, {arm}"
                    draw_band_of_fronts(
                        axis, [front(pairs(swept)) for swept in fronts], numbers["limit"], colour, label
                    )
            label_front_axis(axis, f"{task}: equal denoiser calls", numbers["limit"])
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    command = parser(__doc__)
    command.add_argument(
        "--calls", type=int, help="denoiser calls of each run (default: those of sampler.py's joint runs)"
    )
    arguments = command.parse_args()
    given, calls = read(arguments), 512 if arguments.smoke else arguments.calls
    folder = given.output / "continuation"
    if not given.report:
        runs = [run for task in given.tasks for run in plan(task, given, calls)]
        missing = [run for run in runs if not (folder / f"{run.name}.json").exists()]
        if not given.smoke:
            minutes = sum(run.calls for run in missing) * SECONDS_PER_CALL / 60 / given.jobs + len(missing)
            print(
                f"continuation: {len(runs)} runs, {len(missing)} to do, about {minutes:.0f} minutes with {given.jobs} at a time"
            )
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda run: train(run, given), missing))
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]
    results = [result for result in results if result["task"] in given.tasks]
    if not results:
        return
    tasks = tuple(dict.fromkeys(result["task"] for result in results))
    base, joint = bases(tasks, given), {task: joint_runs(given.output, task) for task in tasks}
    summary = summarise(results, joint, base)
    document = {"tasks": summary, "reading": reading(summary)}
    seeds = {"runs": sorted({FIRST_SEED + result["seed"] for result in results}), "heldout": 0}
    write(given.output / "continuation.json", document | {"provenance": provenance(seeds)})
    draw(results, joint, base, summary, given.output / "continuation.png")
    Console(width=160, highlight=False).print(*document["reading"], sep="\n")


if __name__ == "__main__":
    main()
