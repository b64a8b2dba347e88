"""The CUDA sources compile for every supported architecture, without a GPU, and no kernel spills registers."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the copy that comes with triton."""
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.is_file() else None)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA sources cannot be compiled here")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, architecture: int, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    command = [NVCC, "-O3", "-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("compiled, but cuobjdump is not installed: spills cannot be counted")
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    kernels = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert kernels, usage
    for registers, stack, shared, local in kernels:
        assert int(stack) == int(local) == 0, usage  # a spill would appear as stack or local memory
        assert int(registers) <= 128, usage  # at least two blocks of 256 threads on a multiprocessor
        assert int(shared) <= 48 * 1024, usage
