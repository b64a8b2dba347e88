"""Tests of this folder again, in processes of their own: with lesser instruction sets, and under Triton's interpreter.

Both are chosen by an environment variable that is read once a process. Compilation and registration have no instruction set.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffpo_kernels import backends

FOLDER = Path(__file__).parent
NATIVE = ("row_statistics", "linear_logprob", "skinny_linear")  # operators with code for each instruction set
TRITON = ("row_statistics", "linear_logprob", "surrogate_loss", "entropy_bounded_commit")


def run_again(operators: tuple[str, ...], selected: str, **environment: str) -> None:
    files = [str(FOLDER / f"test_{operator}.py") for operator in operators]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected, *files]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])  # the best one runs in the other tests
def test_lesser_instruction_sets(instruction_set: str) -> None:
    if backends.native_module() is None:
        pytest.skip(backends.missing_extension_reason())
    loaded = [sys.executable, "-c", "import torch, diffpo_kernels._native as n; print(n.instruction_set)"]
    found = subprocess.check_output(loaded, env=os.environ | {"DIFFPO_CPU": instruction_set}, text=True).strip()
    if found != instruction_set:
        pytest.skip(f"this processor or build has no {instruction_set}, it loads {found}")
    run_again(NATIVE, "(native or depends) and not compile and not registered", DIFFPO_CPU=instruction_set)


@pytest.mark.parametrize("operator", TRITON)
def test_under_the_interpreter(operator: str) -> None:
    """The Triton kernels, which TRITON_INTERPRET=1 runs on the CPU; it must be set before triton is imported."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that process")
    run_again((operator,), "triton", TRITON_INTERPRET="1")
