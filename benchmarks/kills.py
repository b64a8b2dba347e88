"""``python benchmarks/kills.py``: two processes train, one is killed at a random moment, torchrun restarts both; the final weights must be the same bits.

Each kill is a run of its own, ``torchrun --nproc-per-node 2 --max-restarts 1``, in which one process, chosen at random, gets SIGKILL once:

    update   at a random moment after a random update
    save     as soon as a random checkpoint, or the next that is noticed, is begun, while it is written

Half of the runs hold the whole model in each process, half spread it (--distributed.shard), whose checkpoints are written in the background.
A run passes if it ends with exit code 0, went on from a checkpoint, and model and last checkpoint, with its optimizer, hold the bits
of a run that nothing stopped. Half a minute a kill on 2 CPU cores.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffpo.runs.provenance import REPOSITORY, provenance

SETTINGS = (
    *("--task", "sudoku", "--model", "tiny-sudoku", "--heldout", "8", "--no-sweep", "--guard.every", "0"),
    *("--algorithm.prompts-per-update", "4", "--algorithm.group-size", "4", "--device", "cpu"),
)
Tensors = dict[str, torch.Tensor]
WAYS: dict[str, tuple[str, ...]] = {"replicated": (), "sharded": ("--distributed.shard",)}
DEADLINE = 900  # seconds of a run
ATTEMPTS = 3  # to meet a moment


@dataclass(frozen=True)
class Kill:
    """What is done to a run."""

    way: str
    moment: str
    update: int
    process: int


def start(runs: Path, name: str, way: str, updates: int, log: Path) -> subprocess.Popen:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    train = ("-m", "diffpo.train", *SETTINGS, *WAYS[way], "--runs", str(runs), "--name", name)
    search_path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *torchrun, *train, "--updates", str(updates), "--save-every", "2"],
            env=os.environ | {"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def process_of(torchrun: subprocess.Popen, rank: int) -> int:
    """The process id of a worker."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise RuntimeError(f"torchrun has no process {rank}")


def has_come(kill: Kill, run: Path, torchrun: subprocess.Popen, pause: float) -> bool:
    """Waits for the moment of a kill; False if the run ended before, because a save was over between two looks."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + DEADLINE
    while time.monotonic() < deadline and torchrun.poll() is None:
        if kill.moment == "save" and any(int(path.name[1:7]) >= kill.update for path in half_written(run)):
            return True
        if kill.moment == "update" and log.exists() and log.read_text().count("\n") >= kill.update:
            time.sleep(pause)
            return True
        time.sleep(0.0002)
    return False


def half_written(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".*.partial"))


def content(run: Path) -> Tensors:
    """What a run has made: the weights of its model, and of its last checkpoint weights and optimizer. (Of two equal safetensors files the
    headers may differ in their order.)"""
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    files = [*(run / "model").glob("*.safetensors"), *newest.glob("*.safetensors")]
    return {f"{path.relative_to(run)}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def same_bits(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def killed(kill: Kill, runs: Path, name: str, expected: Tensors, updates: int, pause: float) -> dict | None:
    """What became of a run; None if it ended before it could be killed."""
    log = runs / f"{name}.log"
    torchrun = start(runs, name, kill.way, updates, log)
    try:
        if not has_come(kill, runs / name, torchrun, pause):
            return None
        os.kill(process_of(torchrun, kill.process), signal.SIGKILL)
        half = [path.name for path in half_written(runs / name)]
        code = torchrun.wait(DEADLINE)
    except (OSError, RuntimeError):  # the process has just ended by itself
        return None
    finally:
        torchrun.terminate()  # and with it its processes
    went_on = re.findall(r"resuming after update (\d+)", log.read_text())
    same = code == 0 and same_bits(content(runs / name), expected)
    return asdict(kill) | {
        "half_written": half,
        "exit_code": code,
        "went_on_after": [int(update) for update in went_on],
        "same_bits": same,
        "passed": same and len(went_on) == 1,
    }


def drawn(count: int, updates: int, seed: int) -> list[Kill]:
    """Half of them of each way, and of each moment."""
    draw = random.Random(seed)
    return [
        Kill(list(WAYS)[i % 2], ("update", "save")[i // 2 % 2], draw.randrange(2, updates - 1), draw.randrange(2))
        for i in range(count)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--updates", type=int, default=20, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/kills.json")
    options = parser.parse_args(arguments)
    runs = Path(tempfile.mkdtemp(prefix="kills-"))
    results, expected, seconds = [], {}, {}
    for way in WAYS:
        started = time.monotonic()
        if start(runs, way, way, options.updates, runs / f"{way}.log").wait(DEADLINE):
            raise SystemExit(f"the run that nothing stops fails:\n{(runs / f'{way}.log').read_text()}")
        expected[way], seconds[way] = content(runs / way), time.monotonic() - started
    draw = random.Random(options.seed + 1)
    for kill in drawn(options.kills, options.updates, options.seed):
        result = None
        for attempt in range(ATTEMPTS):
            pause = draw.random() * seconds[kill.way] / options.updates / 4  # less than an update takes
            name = f"{len(results)}-{attempt}-{kill.way}-{kill.moment}-{kill.update}-{kill.process}"
            result = result or killed(kill, runs, name, expected[kill.way], options.updates, pause)
        results.append(result or asdict(kill) | {"half_written": [], "passed": False, "missed": ATTEMPTS})
        print(json.dumps(results[-1]), flush=True)
    passed = sum(result["passed"] for result in results)
    summary = {
        "kills": len(results),
        "passed": passed,
        "left_half_a_checkpoint": sum(bool(result["half_written"]) for result in results),
        "results": results,
        "provenance": provenance({"kills": options.seed}),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{passed} of {len(results)} kills ended in the same bits; {summary['left_half_a_checkpoint']} hit a checkpoint half-written"
    )
    if passed == len(results):
        shutil.rmtree(runs)
    else:
        print(f"logs and runs are in {runs}")
    return int(passed < len(results))


if __name__ == "__main__":
    raise SystemExit(main())
