"""``python benchmarks/experiments/sampler.py``: what does training the threshold together with the model gain?

Arms (sampler_arms.py): joint (on countdown the defaults of `diffpo.train` up to 0.1), model-G (the model alone, for correctness alone, rolled out at a fixed bound of G nats), d1
and d1-2 (rolled out at .1 and at 2 nats), and the base model. joint-long: smaller bounds, boundaries drawn anew for each inner update, twice the prompts and a
higher learning rate. model-0.5-priced (Sudoku): the model alone for joint's own reward. Each trained model decodes 1,000 test problems over a sweep of
entropy bounds in the order it was trained with, and at its learned threshold: fronts of accuracy over tokens per forward and their
areas (front_area.py), by seed. Whether the threshold follows the difficulty of a problem (1 - the base model's solve rate over 16 draws
at T = 1): difficulty.py.

Runs, fronts and difficulties that exist are not repeated; ``--report`` summarises what is there. Writes sampler.json and sampler.png.
Intervals are over seeds, on the same test problems: they do not cover the choice of these problems.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from decode_front import GAMMAS, SMOKE_GAMMAS, decode, sweep
from difficulty import SAMPLES, adaptation, solve_rates
from rich.console import Console
from sampler_arms import COMMON, NAMES, runs
from sampler_figure import draw
from sampler_report import print_tables, reading, summarise
from study import Options, Run, existing, flags_of, parser, provenance, read, train_all, write

from diffpo.config import fail
from diffpo.evaluation import fixed_problems
from diffpo.models.checkpoints import load
from diffpo.tasks import get_task
from diffpo.training.config import ROLLOUT_ORDER

SMOKE_ARMS = ("joint",)
SEEDS = 5  # at most: sampler_arms.py says how many each arm has
TASKS = ("countdown", "sudoku")
MINUTES = {"countdown": 7.0, "sudoku": 6.0}  # one run, one core; joint-long four times as long
FRONT_MINUTES = 1.0  # one sweep, one core


def minutes(run: Run) -> float:
    return MINUTES[run.task] * (4 if run.arm == "joint-long" else 1) + FRONT_MINUTES


def order_of(result: dict) -> str:
    """The order of commitment a run was trained with."""
    return flags_of(result).get("rollout.order", ROLLOUT_ORDER)


def decode_all(results: list[dict], given: Options) -> None:
    """The front of every run and of the base models, and the difficulty of every problem, as far as they are missing."""
    folder = given.output / "sampler" / "fronts"
    heldout, gammas = (16, SMOKE_GAMMAS) if given.smoke else (COMMON["heldout"], GAMMAS)
    jobs = []
    for result in results:
        name = f"{result['task']}-{result['arm']}-seed{result['seed']}"
        model = given.runs / "sampler" / name / "model"
        jobs.append((folder / f"{name}.json", model, (front_of_run, str(model), result, heldout, gammas)))
    for task in dict.fromkeys(result["task"] for result in results):
        base = f"tiny-{task}"
        jobs.append((folder / f"{task}-base.json", None, (base_front, base, task, heldout, gammas, given.smoke)))
        jobs.append(
            (folder / f"{task}-difficulty.json", None, (difficulty, base, task, heldout, 4 if given.smoke else SAMPLES))
        )
    jobs = [(path, model, job) for path, model, job in jobs if not path.exists()]
    lost = [path.stem for path, model, _ in jobs if model is not None and not model.exists()]
    if lost:
        fail(f"no trained model in {given.runs / 'sampler'} for {', '.join(lost)}: give its folder with --runs, or delete these results to train again")  # fmt: skip
    if not given.smoke:
        print(f"decoding: {len(jobs)} sweeps to do, about {len(jobs) * FRONT_MINUTES / given.jobs:.0f} minutes")
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [(path, pool.submit(*job)) for path, _, job in jobs]
        for path, future in futures:
            write(path, future.result() | {"provenance": provenance({"heldout": 0})})


def front_of_run(model: str, result: dict, heldout: int, gammas: tuple) -> dict:
    """`sweep` of a trained model, with the denoiser calls of its training, by which `gather` knows that front and result are of one run."""
    found = sweep(model, result["task"], order_of(result), heldout, gammas)
    return found | {"denoiser_calls": result["denoiser_calls"]}


def base_front(model: str, task: str, heldout: int, gammas: tuple, smoke: bool) -> dict:
    """`sweep` of the base model in the default order, and every untrained rule of nfe_pareto.py, for its best accuracy of all."""
    from nfe_pareto import rules

    found = sweep(model, task, ROLLOUT_ORDER, heldout, gammas)
    loaded, its_task = load(model, "cpu"), get_task(task)
    problems = fixed_problems(its_task, heldout)
    every = [decode(loaded, its_task, problems, rule) for _, rule in rules(its_task, loaded, quick=smoke)]
    best = max(every, key=lambda point: (point["accuracy"], -point["nfe"]))
    return found | {"rules": len(every), "best": {name: best[name] for name in ("rule", "accuracy", "nfe")}}


def difficulty(model: str, task: str, heldout: int, samples: int) -> dict:
    return {"samples": samples, "solve_rate": solve_rates(model, task, heldout, samples)}


def gather(results: list[dict], folder: Path) -> tuple[list[dict], dict, dict]:
    """Results with their "front" (those that have one), the base fronts by task, the difficulties by task."""

    def found_in(name: str) -> dict | None:
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    found = [
        result | {"front": found_in(f"{result['task']}-{result['arm']}-seed{result['seed']}")} for result in results
    ]
    tasks = dict.fromkeys(result["task"] for result in results)
    bases, rates = ({task: found_in(f"{task}-{name}") for task in tasks} for name in ("base", "difficulty"))
    found = [result for result in found if result["front"] and bases[result["task"]] and rates[result["task"]]]
    for result in found:
        if result["front"]["denoiser_calls"] != result["denoiser_calls"]:
            fail(f"the front of {result['task']}-{result['arm']}-seed{result['seed']} is of another run: delete it in {folder} to decode again")  # fmt: skip
        front, rate = result["front"], rates[result["task"]]["solve_rate"]
        learned = next((point for point in front["points"] if point["learned"]), None)
        result["adaptation"] = learned and adaptation(learned["chosen"], front["bins"], [1 - value for value in rate])
    return found, bases, rates


def report(results: list[dict], given: Options) -> None:
    found, bases, _ = gather(results, given.output / "sampler" / "fronts")
    if not found:
        return
    summary = summarise(found, bases)
    document = {"tasks": summary, "reading": reading(summary)}
    seeds = {"runs": sorted({result["seed"] for result in found}), "heldout": 0, "difficulty": 0}
    write(given.output / "sampler.json", document | {"provenance": provenance(seeds)})
    draw(found, bases, summary, given.output / "sampler.png")
    console = Console(width=180, highlight=False)
    print_tables(summary, console)
    console.print(*document["reading"], sep="\n")


def main() -> None:
    command = parser(__doc__, SEEDS, TASKS)
    command.add_argument("--arms", nargs="+", choices=NAMES, default=NAMES)
    arguments = command.parse_args()
    given = read(arguments)
    wanted = runs(given.seeds, given.tasks, SMOKE_ARMS if given.smoke else tuple(arguments.arms))
    results = train_all("sampler", wanted, given, minutes)
    if not given.report:
        decode_all(results, given)
    if not given.smoke:  # the summary is of all that is there, whatever was trained just now
        results = existing("sampler", runs(SEEDS, TASKS), given.output)
    report(results, given)


if __name__ == "__main__":
    main()
