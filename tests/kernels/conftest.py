"""What an operator's tests run on.

A test module names its operator in OPERATOR; a test that takes `target` then runs once per backend and device that can run here: on
the CPU the reference, the native extension and, in a process with TRITON_INTERPRET=1, the Triton kernels; with a GPU, the reference,
Triton and CUDA C++ there.
"""

from typing import NamedTuple

import pytest
import torch

from diffpo_kernels import backends


class Target(NamedTuple):
    """A backend and the device its tensors live on."""

    backend: str
    device: str


def targets(operator: str) -> list[Target]:
    """Every target of `operator` that can run in this process."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    every = [Target(backend, device) for device in devices for backend in backends.BACKENDS]
    return [target for target in every if backends.unavailable_reason(operator, *target) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        every = targets(metafunc.module.OPERATOR)
        metafunc.parametrize("target", every, ids=["-".join(target) for target in every])


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """In every test of this folder."""
