"""Shared by the kernel tests: which backends of row_statistics can run on the CPU of this machine."""

import pytest

from diffpo_kernels import backends


@pytest.fixture(params=["reference", "native"])
def cpu_backend(request: pytest.FixtureRequest) -> str:
    """Each CPU backend in turn; skipped, with the reason, where it is not available."""
    reason = backends.unavailable_reason("row_statistics", request.param, "cpu")
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param
