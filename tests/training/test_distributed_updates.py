"""Two processes that share the work do what one does, replicated and sharded: rollouts, losses, gradients, weights."""

from pathlib import Path

import pytest
import torch
from two_processes import run_in_two

from diffpo.training.distributed import World

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
HERE = Path(__file__).parent


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("work", [[5], [3, 3, 3, 3], [9, 1, 1, 1, 1], list(range(1, 20)), [7, 2] * 50], ids=str)
def test_shares_are_disjoint_complete_and_fair(size, work):
    shares = [World(rank, size).share(torch.tensor(work)) for rank in range(size)]
    assert sorted(torch.cat(shares).tolist()) == list(range(len(work)))
    for share in shares:
        assert share.tolist() == sorted(share.tolist())
        assert sum(work[i] for i in share) <= sum(work) / size + max(work)


@pytest.mark.slow
def test_two_processes_share_what_one_does(tmp_path):
    """All checks in one pair of processes, because starting one takes seconds: those of distributed_processes.py."""
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    run_in_two(HERE / "distributed_processes.py", tmp_path, seconds=500)
