"""Everything in this folder is marked `gpu` and skipped where torch sees no CUDA device."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def auto_is_the_gpu(monkeypatch):
    with suppress(ImportError):  # the tests of the kernels need no diffpo
        monkeypatch.setattr("diffpo.device.default_device", lambda: "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:  # this hook sees the tests of every folder
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
