"""Two processes that share the work do what one does, replicated and sharded: rollouts, losses, gradients, weights."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
HERE = Path(__file__).parent


def test_two_processes_share_what_one_does(tmp_path):
    """All checks in one pair of processes, because starting one takes seconds: those of distributed_processes.py."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", str(HERE / "distributed_processes.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=200)[0]
    finally:
        with suppress(ProcessLookupError):  # both have ended
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert {"done 0", "done 1"} <= set(output.splitlines())
