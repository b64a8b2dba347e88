"""What every experiment shares: a command line, and results that are resumed where they stopped, one JSON file per run.

A study is a list of runs, each a name, a seed and the flags of ``python -m diffpo.train``. A run whose result exists is not repeated, one that was
interrupted continues from its last checkpoint. Runs go side by side, one thread each. What trains nothing is a `measurement`, computed `in_parts`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from diffpo.config import fail

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffpo.runs.provenance import provenance

RESULTS = Path(__file__).resolve().parents[1] / "results" / "experiments"
RUNS = Path("runs/experiments")
SOURCES = [
    Path(__file__).resolve().parent,
    *(Path(__file__).resolve().parents[2] / name for name in ("diffpo", "diffpo_kernels", "csrc")),
]
SUFFIXES = (".py", ".cpp", ".h", ".safetensors")  # of code and shipped models
CURVE = ("update", "denoiser_calls", "reward", "accuracy", "nfe", "gamma", "zero_advantage_fraction", "ess", "kl")
WEIGHTS = ("tokens", "surrogate_kl", "weight_mean", "ess", "ess_uncapped", "weight_cap_fraction", "weight_histogram")
EARLIER = {"algorithm.threshold-advantage": "mean", "rollout.threshold-reads": "completion"}  # the only ones up to 0.1
QUARTERS = 4  # of a rollout's denoising steps
SMOKE_FLAGS = {"updates": 2, "heldout": 16, "algorithm.prompts-per-update": 4, "save-every": 1, "compile": False}


@dataclass(frozen=True)
class Run:
    """One training run: `arm` is what is compared, `flags` those of ``python -m diffpo.train`` without their dashes."""

    arm: str
    task: str
    seed: int
    flags: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.task}-{self.arm}-seed{self.seed}"


def crossed(
    seeds: int, tasks: Sequence[str], arms: Sequence[str], flags: Callable[[str, str], dict[str, Any]]
) -> list[Run]:
    """A run of each arm on each task with each seed, seed by seed. flags: of a task and an arm; None leaves one out."""
    return [
        Run(arm, task, seed, {name: value for name, value in flags(task, arm).items() if value is not None})
        for seed in range(seeds)
        for task in tasks
        for arm in arms
    ]


@dataclass(frozen=True)
class Options:
    """The command line of an experiment."""

    tasks: tuple[str, ...]
    seeds: int
    jobs: int
    device: str
    smoke: bool
    report: bool
    output: Path
    runs: Path


def options(description: str, seeds: int = 5, tasks: Sequence[str] = ("countdown", "sudoku")) -> Options:
    """Parse the command line that every experiment has."""
    return read(parser(description, seeds, tasks).parse_args())


def parser(description: str, seeds: int = 5, tasks: Sequence[str] = ("countdown", "sudoku")) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"seeds of each arm, at most (default {seeds})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side (default: the cores)")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto", help="of the training runs")
    parser.add_argument("--smoke", action="store_true", help="two updates of one seed: does everything run?")
    parser.add_argument("--report", action="store_true", help="train nothing: summarise the results that are there")
    return with_folders(parser)


def with_folders(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--output", type=Path, help="folder (default benchmarks/results/experiments)")
    parser.add_argument("--runs", type=Path, help=f"folder of trained models, and to resume from (default {RUNS})")
    return parser


def settle_folders(given: argparse.Namespace) -> None:
    """A smoke run leaves the results and the runs of a full one alone: what it is not given is a new temporary folder."""
    output, runs = RESULTS, RUNS
    if given.smoke and None in (given.output, given.runs):
        output = runs = Path(tempfile.mkdtemp(prefix="diffpo-smoke-"))
        print(f"smoke: results and runs not placed by --output and --runs go to {output}")
    given.output, given.runs = given.output or output, given.runs or runs


def measurement(description: str, smoke: str) -> argparse.Namespace:
    """The command line of an experiment that trains nothing: smoke, output, runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=smoke)
    given = with_folders(parser).parse_args()
    settle_folders(given)
    return given


@contextmanager
def in_parts(folder: Path, settings: dict, parts: Mapping[str, Callable[[], Any]]) -> Iterator[list]:
    """The values of `parts`, JSON, in their order. Each is written to `folder` when it is known; the folder is deleted when the block ends without an error.

    So what was interrupted goes on where it stopped. A part made with other settings (JSON too), code or shipped models is computed again.
    """
    sources = (path for source in SOURCES for path in source.rglob("*") if path.suffix in SUFFIXES)
    made_by, values = settings | {"code": digest(sources)}, []
    for name, compute in parts.items():
        path = folder / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else None
        if kept is not None and kept["made_by"] == made_by:
            print(f"  {name} is there")
        else:
            kept = {"made_by": made_by, "value": compute()}
            write(path, kept)
        values.append(kept["value"])
    yield values
    shutil.rmtree(folder, ignore_errors=True)


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of the files' contents."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(files))).hexdigest()


def read(given: argparse.Namespace) -> Options:
    settle_folders(given)
    return Options(
        tasks=tuple(given.tasks), seeds=1 if given.smoke else given.seeds, jobs=given.jobs, device=given.device,
        smoke=given.smoke, report=given.report, output=given.output, runs=given.runs,
    )  # fmt: skip


def train_all(study: str, runs: Sequence[Run], given: Options, minutes: Callable[[Run], float]) -> list[dict]:
    """Train what has no result yet, and return the results in the order of `runs`; with --report, of those that are there.

    States the cost first. SystemExit with code 2 if a result was made with other flags than the run has now, or if there is no run.
    """
    if not runs:
        fail(f"{study}: no run has the tasks and arms asked for")
    if given.smoke:  # in its flags too, so that its result is never taken for a full run's
        runs = [replace(run, flags=run.flags | SMOKE_FLAGS) for run in runs]
    console = Console(highlight=False)
    folder = given.output / study
    done = {(result["arm"], result["task"], result["seed"]) for result in existing(study, runs, given.output)}
    missing = [] if given.report else [run for run in runs if (run.arm, run.task, run.seed) not in done]
    if not given.smoke:
        cost = sum(map(minutes, missing)) / max(min(given.jobs, len(missing)), 1)
        console.print(
            f"{study}: {len(runs)} runs, {len(done)} done, {len(missing)} to do, about {cost:.0f} minutes with "
            f"{given.jobs} at a time"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        for run, _ in zip(missing, pool.map(lambda run: train(study, run, given), missing), strict=True):
            console.print(f"  {run.name} done")
    return existing(study, runs, given.output)


def existing(study: str, runs: Sequence[Run], output: Path) -> list[dict]:
    """The results there are, in the order of `runs`. SystemExit with code 2 if one was made with other flags than its run has now."""
    paths = {run.name: output / study / f"{run.name}.json" for run in runs}
    found = [run for run in runs if paths[run.name].exists()]
    for run in found:
        check_flags(run, paths[run.name])
    return [json.loads(paths[run.name].read_text()) for run in found]


def on_one_processor(results: Sequence[dict], among: Sequence[dict]) -> list[dict]:
    """Those of `results` whose seconds can be compared: made on the processor that most of `among` were made on."""
    made_on = Counter(processor(result) for result in among)
    return [result for result in results if processor(result) == made_on.most_common(1)[0][0]]


def processor(result: dict) -> str:
    return result["provenance"]["hardware"]["cpu"]


def flags_of(result: dict) -> dict:
    """The flags that a result was made with, as they are called now. One that trained a threshold before there was a choice had EARLIER."""
    flags = {"rollout.order" if name == "rollout.proxy" else name: value for name, value in result["flags"].items()}
    if (switch := flags.pop("algorithm.importance-correction", None)) is not None:
        flags["algorithm.importance-weights"] = "token" if switch else "none"
    return EARLIER | flags if "rollout.threshold-gammas" in flags else flags


def check_flags(run: Run, path: Path) -> None:
    """A result of other settings must not be averaged with these."""
    found, now = flags_of(json.loads(path.read_text())), json.loads(json.dumps(run.flags))
    changed = [
        f"{name}: {found.get(name)} -> {now.get(name)}"
        for name in sorted(found | now)
        if found.get(name) != now.get(name)
    ]
    if changed:
        fail(f"{path.name} was made with other flags ({', '.join(changed)}): move it away or choose another --output")


def train(study: str, run: Run, given: Options) -> None:
    """One run in its own process with one thread; its curve and its evaluations go to <output>/<study>/<name>.json."""
    folder = given.runs / study / run.name
    flags = run.flags | {
        "task": run.task,
        "model": f"tiny-{run.task}",
        "seed": run.seed,
        "device": given.device,
    }
    flags |= {"name": run.name, "runs": str(folder.parent), "sweep": False}
    command = [sys.executable, "-m", "diffpo.train"]
    command += [part for flag, value in flags.items() for part in as_flag(flag, value)]
    if (folder / "config.json").exists():
        command.append("--resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summary = folder / "summary.json"
    if done.returncode != 0 or not summary.exists():
        raise RuntimeError(f"{run.name} ended with exit code {done.returncode}:\n{done.stdout[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "arm": run.arm, "task": run.task, "seed": run.seed, "flags": run.flags,
        "curve": curve(lines), "weights": late_weights(lines), **json.loads(summary.read_text()), "provenance": provenance({"run": run.seed}),
    }  # fmt: skip
    write(given.output / study / f"{run.name}.json", result)


def write(path: Path, document: dict) -> None:
    """Written aside and renamed: a result is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(document) + "\n")
    path.with_suffix(".tmp").replace(path)


def as_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name if value else no(name)}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]


def no(flag: str) -> str:
    """tyro's negated switch: algorithm.no-fresh-latents."""
    *groups, name = flag.split(".")
    return ".".join([*groups, f"no-{name}"])


def curve(lines: Sequence[dict], points: int = 60) -> dict[str, list]:
    """Columns of the metrics, each the mean over one of at most `points` windows of updates, with the seconds spent so far."""
    seconds, total = [], 0.0
    for line in lines:
        total += sum(value for name, value in line.items() if name.startswith("seconds/"))
        seconds.append(total)
    width = -(-len(lines) // points)
    windows = [range(i, min(i + width, len(lines))) for i in range(0, len(lines), width)]
    columns = {name: [_mean([lines[i].get(name) for i in window]) for window in windows] for name in CURVE}
    return columns | {"seconds": [round(seconds[window[-1]], 2) for window in windows]}


def late_weights(lines: Sequence[dict]) -> dict[str, list]:
    """The importance weights at the end of training: means over the last tenth of the updates, by quarter of the denoising steps.

    Names as in `diffpo.training.trainer.mean_diagnostics`; weight_histogram: [4, 11], shares of a quarter's tokens by uncapped weight.
    A quarter without tokens, and a frozen model's, is None.
    """
    late = lines[-max(len(lines) // 10, 1) :]
    return {
        name: [_mean_of_lists([line.get(f"{name}/quarter_{q + 1}") for line in late]) for q in range(QUARTERS)] for name in WEIGHTS
    }  # fmt: skip


def _mean_of_lists(values: Sequence[float | list | None]) -> float | list | None:
    known = [value for value in values if value is not None]
    if not known or not isinstance(known[0], list):
        return _mean(known)
    total = sum(map(sum, known))
    return [round(sum(column) / total, 5) for column in zip(*known, strict=True)] if total else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 5) if known else None
