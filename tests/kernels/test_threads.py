"""The native backend's threads: those of torch's OpenMP runtime, and its own in a forked child."""

import subprocess
import sys

import pytest

from diffpo_kernels import backends

# A sum over 2^19 logits is split over two threads; the child of a fork has none of its parent's OpenMP threads.
AFTER_A_FORK = """
import os, torch
from diffpo_kernels import row_statistics
torch.set_num_threads(2)
logits_NV = torch.randn(8, 1 << 17)
logits_NV.exp().sum()  # torch's own threads are running
expected = row_statistics(logits_NV, backend="native")
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch's own data loaders do; asking for two again must not hang
    torch.set_num_threads(2)
    found = row_statistics(logits_NV, backend="native")
    os._exit(0 if all(map(torch.equal, found, expected)) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes_too() -> None:
    if backends.native_module() is None:
        pytest.skip(backends.missing_extension_reason())
    done = subprocess.run([sys.executable, "-c", AFTER_A_FORK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
