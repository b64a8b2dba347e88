"""A script of two processes that check something together: how a test runs it, and how it begins."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import distributed

TESTS = Path(__file__).parent


def run_in_two(script: Path, folder: Path, seconds: float) -> None:
    """Run ``script`` with ``folder``, in a session of its own that is gone afterwards; both processes have to get to their end."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", str(script), str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=seconds)[0]
    finally:
        with suppress(ProcessLookupError):  # both have ended
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert {"done 0", "done 1"} <= set(output.splitlines())


def both(check: Callable[[int, Path], None]) -> None:
    """``check(rank, folder)`` in two processes of one group and one start, because the imports take seconds. folder: the script's argument."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    other = multiprocessing.get_context("fork").Process(target=_joined, args=(check, 1, folder), daemon=True)
    other.start()
    _joined(check, 0, folder)
    other.join()
    sys.exit(other.exitcode)


def _joined(check: Callable[[int, Path], None], rank: int, folder: Path) -> None:
    store = distributed.FileStore(str(folder / "rendezvous"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    check(rank, folder)
    distributed.destroy_process_group()
    print(f"done {rank}\n", end="")  # in one piece: the other process writes to the same pipe
