"""``python benchmarks/experiments/adaptive.py``: does the learned threshold adapt to the prompt, and what does each remedy do?

Task medley: kinds of problems that need different bounds. Arms (adaptive_arms.py) differ in the advantage of the threshold's choice, in exploration, in
what the threshold reads, and in what is trained. Each trained model decodes test problems at its learned threshold and over a sweep of bounds, by kind; problems of difficulties
that it was not trained on at the learned threshold. Countdown and Sudoku: what a remedy costs where one bound suits all.

By arm, over seeds: accuracy and NFE, the kind that lost most against the base model at a careful bound, the mutual information of the chosen bound and
the kind (bits), area and AUP (front_area.py). Runs that exist are not repeated. Writes adaptive.json and adaptive.png.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
from adaptive_arms import ARMS, BINS, COMMON, DEFAULT, runs
from adaptive_figure import draw
from decode_front import BATCH
from difficulty import mutual_information
from front_area import area, aup
from rich.console import Console
from rich.table import Table
from seed_statistics import estimate, text
from study import Options, existing, parser, provenance, read, train_all, write

from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import EntropyBounded, PromptThreshold, Rule
from diffpo.evaluation import fixed_problems
from diffpo.models.checkpoints import load
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Task, get_task
from diffpo.tasks.medley import Medley
from diffpo.training.config import ROLLOUT_ORDER

TASKS = ("medley", "countdown", "sudoku")
GAMMAS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
MINUTES = {"medley": 12.0, "countdown": 6.0, "sudoku": 6.0}
COLUMNS = ("accuracy", "nfe", "worst", "bits", "area", "aup", "denoiser_calls")
MARGIN = 0.02  # of accuracy, by which a bound may fall behind the careful one


def decode(model: MaskedDiffusionLM, task: Task, problems: Sequence, rule: Rule) -> dict:
    """Greedy decoding: solved, nfe, tokens of each problem; chosen: bin of the learned threshold, or None."""
    prompts = [task.prompt(problem) for problem in problems]
    out = generate(model, prompts, task.gen_length, task.block_length, rule, batch_size=BATCH)
    grades = task.grade_many(problems, out.text)
    learned = isinstance(rule, PromptThreshold)
    return {
        "solved": [int(grade.correct is True) for grade in grades],
        "nfe": out.trajectory.nfe.tolist(),
        "tokens": out.trajectory.length.tolist(),
        "chosen": out.trajectory.actions["gamma"].choice.tolist() if learned else None,
    }


def measure(folder: str, task_name: str, heldout: int) -> dict:
    """What the model decodes at each bound and, where it has one, at its learned threshold."""
    keep_freed_memory()
    model, task = load(folder), get_task(task_name)
    problems = fixed_problems(task, heldout)
    found = {
        "kinds": [task.kind(problem) for problem in problems],
        "fixed": [decode(model, task, problems, EntropyBounded(gamma, ROLLOUT_ORDER)) for gamma in GAMMAS],
        "bins": model.config.threshold_gammas or None,
    }
    if model.threshold is not None:
        found["learned"] = decode(model, task, problems, PromptThreshold())
        if isinstance(task, Medley):
            unseen = Medley(levels="unseen")
            others = fixed_problems(unseen, heldout)
            found["unseen"] = decode(model, unseen, others, PromptThreshold()) | {
                "kinds": [problem.kind for problem in others],
                "levels": [problem.level for problem in others],
            }
            found["levels"] = [problem.level for problem in problems]
    return found


def by_kind(found: dict, point: dict) -> dict[str, dict[str, float]]:
    """accuracy and nfe of each kind."""
    kinds = np.array(found["kinds"])
    return {
        str(kind): {name: float(np.mean(np.array(point[column])[kinds == kind])) for name, column in (("accuracy", "solved"), ("nfe", "nfe"))}
        for kind in np.unique(kinds)
    }  # fmt: skip


def tokens_per_forward(point: dict) -> float:
    return sum(point["tokens"]) / sum(point["nfe"])


def bits(found: dict, chosen: Sequence[int]) -> float:
    """Mutual information of the chosen bin and the kind."""
    _, kind = np.unique(found["kinds"], return_inverse=True)
    return mutual_information(np.array(chosen), kind, max(chosen) + 1) / float(np.log(2))


def careful(base: dict) -> dict[str, dict[str, float]]:
    """The base model by kind at the smallest bin."""
    return by_kind(base, base["fixed"][GAMMAS.index(BINS[0])])


def oracle_by_kind(base: dict) -> dict:
    """For each kind the bin with the fewest evaluations that keeps the careful bound's accuracy within MARGIN: nfe, accuracy, bits."""
    safe, kinds = careful(base), np.array(base["kinds"])
    chosen, nfe, solved = np.zeros(len(kinds), dtype=int), np.zeros(len(kinds)), np.zeros(len(kinds))
    for kind in safe:
        of_kind = kinds == kind
        for index, gamma in enumerate(BINS):
            point = base["fixed"][GAMMAS.index(gamma)]
            if np.mean(np.array(point["solved"])[of_kind]) >= safe[kind]["accuracy"] - MARGIN:
                chosen[of_kind] = index
                nfe[of_kind], solved[of_kind] = np.array(point["nfe"])[of_kind], np.array(point["solved"])[of_kind]
    return {"nfe": float(nfe.mean()), "accuracy": float(solved.mean()), "bits": bits(base, chosen)}


def best_for_all(found: dict, base: dict) -> int:
    """Which of the model's bounds has the fewest evaluations and keeps every kind within MARGIN of the base; the careful one if none does."""
    safe = careful(base)
    kept = [
        (float(np.mean(point["nfe"])), index)
        for index, point in enumerate(found["fixed"])
        if all(now["accuracy"] >= safe[kind]["accuracy"] - MARGIN for kind, now in by_kind(found, point).items())
    ]
    return min(kept)[1] if kept else GAMMAS.index(BINS[0])


def numbers(found: dict, base: dict) -> dict:
    """Of one trained model, at its learned threshold or its best bound for all: accuracy, nfe, worst (largest loss of a kind against the
    base's careful bound), bits, the front."""
    own = found.get("learned") or found["fixed"][best_for_all(found, base)]
    kinds, safe = by_kind(found, own), careful(base)
    points = [*found["fixed"], *([found["learned"]] if "learned" in found else [])]
    return {
        "accuracy": float(np.mean(own["solved"])),
        "nfe": float(np.mean(own["nfe"])),
        "worst": min(kinds[kind]["accuracy"] - safe[kind]["accuracy"] for kind in kinds),
        "bits": bits(found, own["chosen"]) if own["chosen"] else 0.0,
        "kinds": kinds,
        "front": [(tokens_per_forward(point), float(np.mean(point["solved"]))) for point in points],
        "chosen": {kind: dict(Counter(c for c, k in zip(own["chosen"], found["kinds"], strict=True) if k == kind)) for kind in kinds} if own["chosen"] else {},
    }  # fmt: skip


def areas(of_runs: Sequence[dict]) -> None:
    """Adds area (up to the fewest tokens per forward that all fronts reach) and aup to each."""
    y_max = max(y for run in of_runs for _, y in run["front"])
    high = min(max(rho for rho, _ in run["front"]) for run in of_runs)
    for run in of_runs:
        run |= {"area": area(run["front"], y_max, high), "aup": aup(run["front"], y_max)}


def measured(results: list[dict], given: Options) -> dict[str, dict]:
    """`measure` of every run and base model, by name; what exists is not decoded again."""
    folder, found = given.output / "adaptive" / "decoded", {}
    wanted = {f"{r['task']}-{r['arm']}-seed{r['seed']}": (r["task"], None) for r in results}
    wanted |= {f"{task}-base": (task, f"tiny-{task}") for task in {r["task"] for r in results}}
    for name, (task, model) in wanted.items():
        path = folder / f"{name}.json"
        if not path.exists() and not given.report:
            source = model or str(given.runs / "adaptive" / name / "model")
            write(path, measure(source, task, 24 if given.smoke else int(COMMON[task]["heldout"])))  # type: ignore[call-overload]
        if path.exists():
            found[name] = json.loads(path.read_text())
    return found


def draw_first(decoded: dict[str, dict], found: dict, given: Options) -> None:
    """The picture of the default arm's first seed, where there is one."""
    name, base, one = f"medley-{DEFAULT}-seed0", decoded["medley-base"], found["best_for_all"]["gamma"]
    if name in decoded and one in BINS:
        points = [base["fixed"][GAMMAS.index(gamma)] for gamma in BINS]
        draw(base, points, decoded[name], one, given.output / "adaptive.png")


def summarise(task: str, results: Sequence[dict], decoded: dict[str, dict]) -> dict:
    """runs: `numbers` and areas of each; arms: their means with intervals, and accuracy, nfe and base accuracy by kind; best_for_all and
    oracle_by_kind: of the base model."""
    base = decoded[f"{task}-base"]
    of_runs = [
        {"arm": r["arm"], "seed": r["seed"], "denoiser_calls": r["denoiser_calls"], **numbers(decoded[name], base)}
        for r in results
        if r["task"] == task and (name := f"{task}-{r['arm']}-seed{r['seed']}") in decoded
    ]
    areas(of_runs)
    arms = {}
    for arm in dict.fromkeys(run["arm"] for run in of_runs):
        rows = [run for run in of_runs if run["arm"] == arm]
        kinds = {
            kind: {name: float(np.mean([row["kinds"][kind][name] for row in rows])) for name in ("accuracy", "nfe")}
            for kind in rows[0]["kinds"]
        }
        arms[arm] = {name: estimate([row[name] for row in rows]) for name in COLUMNS} | {"kinds": kinds}
    index = best_for_all(base, base)
    point = base["fixed"][index]
    one = {"gamma": GAMMAS[index], "nfe": float(np.mean(point["nfe"])), "accuracy": float(np.mean(point["solved"]))}
    return {"runs": of_runs, "arms": arms, "best_for_all": one, "oracle_by_kind": oracle_by_kind(base), "careful": careful(base)}  # fmt: skip


def reading(tasks: dict[str, dict]) -> list[str]:
    """What the numbers say, a line an arm."""
    return [
        f"{task}, {arm}: {text(of['accuracy'], 100, 1)}% in {text(of['nfe'])} evaluations, worst kind {text(of['worst'], 100, 1, '+')} points, "
        f"{text(of['bits'])} bits (one bound for all: {100 * found['best_for_all']['accuracy']:.1f}% in {found['best_for_all']['nfe']:.2f}; each kind its own: "
        f"{100 * found['oracle_by_kind']['accuracy']:.1f}% in {found['oracle_by_kind']['nfe']:.2f}, {found['oracle_by_kind']['bits']:.2f} bits)."
        for task, found in tasks.items()
        for arm, of in found["arms"].items()
    ]


def report(results: list[dict], given: Options) -> None:
    decoded, console = measured(results, given), Console(width=170, highlight=False)
    tasks = {task: summarise(task, results, decoded) for task in dict.fromkeys(result["task"] for result in results)}
    for task, found in tasks.items():
        table = Table("arm", "seeds", *COLUMNS, title=task)
        for arm, of in found["arms"].items():
            cells = (text(of[name], digits=0 if name == "denoiser_calls" else 3) for name in COLUMNS)
            table.add_row(arm, str(of["nfe"]["n"]), *cells)
        console.print(table)
    lines = reading(tasks)
    console.print(*lines, sep="\n")
    if "medley" in tasks:
        draw_first(decoded, tasks["medley"], given)
    seeds = {"runs": sorted({result["seed"] for result in results}), "heldout": 0}
    write(given.output / "adaptive.json", {"tasks": tasks, "reading": lines, "provenance": provenance(seeds)})


def main() -> None:
    command = parser(__doc__, 5, TASKS)
    command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments = command.parse_args()
    given = read(arguments)
    wanted = runs(given.seeds, given.tasks, tuple(arguments.arms))
    results = train_all("adaptive", wanted, given, lambda run: MINUTES[run.task])
    if given.report:
        results = existing("adaptive", runs(5, given.tasks), given.output)
    report(results, given)


if __name__ == "__main__":
    main()
