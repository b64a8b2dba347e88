"""A model whose weights are spread over two processes (FSDP2), with and without LoRA, does what the plain model does."""

from pathlib import Path

import pytest
import torch
from two_processes import run_in_two

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
HERE = Path(__file__).parent


def test_two_processes_do_what_one_does(tmp_path):
    """All checks in one pair of processes, because starting one takes seconds: those of sharded_processes.py."""
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    run_in_two(HERE / "sharded_processes.py", tmp_path, seconds=120)
