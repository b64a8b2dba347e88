"""A model whose weights are spread over two processes (FSDP2), with and without LoRA, does what the plain model does."""

import os
import subprocess
import sys
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
    command = [sys.executable, "-P", "-W", "ignore", str(HERE / "sharded_processes.py")]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert [output.splitlines()[-1] for output in outputs] == ["done 0", "done 1"]
