"""A model whose weights are spread over two processes (FSDP2), with and without LoRA, does what the plain model does."""

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
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
HERE = Path(__file__).parent


def test_two_processes_do_what_one_does(tmp_path):
    """All checks in one pair of processes, because starting one takes seconds: those of sharded_processes.py."""
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", str(HERE / "sharded_processes.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        with suppress(ProcessLookupError):  # both have ended
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert {"done 0", "done 1"} <= set(output.splitlines())
