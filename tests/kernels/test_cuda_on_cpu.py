"""The arithmetic of csrc/row_statistics.cu where there is no GPU: its source, rewritten for a warp of 32 CPU threads.

What it cannot show: anything about races, memory ordering, launches and speed.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffpo_kernels import RowStatistics, row_statistics

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")
CHUNK = 2048  # kChunk in csrc/row_statistics.cu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENTRY_POINT = """
extern "C" void run(diffpo::RowStatisticsArguments* arguments) {
    std::vector<char> workspace(diffpo::row_statistics_cuda_workspace(arguments->rows, arguments->vocabulary) + 16, -1);
    const auto aligned = (reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16;
    diffpo::row_statistics_cuda(*arguments, reinterpret_cast<void*>(aligned), 0, nullptr);
}
"""


class Arguments(ctypes.Structure):
    """RowStatisticsArguments of csrc/row_statistics.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "row_stride")),
        *((name, ctypes.c_void_p) for name in ("temperature", "uniform", "banned")),
        ("banned_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in RowStatistics._fields),
    )


def substitute(pattern: str, replacement: str, source: str) -> str:
    source, count = re.subn(pattern, replacement, source)
    assert count > 0, f"csrc/row_statistics.cu has no {pattern} any more"
    return source


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs g++ and the thread barriers of Linux")
    source = (CSRC / "row_statistics.cu").read_text()
    source = substitute(r"#include <cuda\w*\.h>\n", "", source)
    source = substitute(r"asm\(.*\);", "y = exp2f(x) < 1.17549435e-38f ? 0.0f : exp2f(x);", source)
    source = substitute(r"__shared__ ", "static ", source)
    source = substitute(
        r"(\w+<T, kAligned>)<<<(.*?), kWarp, 0, stream>>>(\(.*?\));", r"run_blocks(\2, [=] { \1\3; });", source
    )
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "kernels.cpp").write_text('#include "cuda_on_cpu.h"\n' + source + ENTRY_POINT)
    include = [f"-I{CSRC}", f"-I{Path(__file__).parent}"]
    command = [COMPILER, "-O1", "-std=c++17", "-w", "-fPIC", "-shared", *include, "-o", "kernels.so", "kernels.cpp"]
    done = subprocess.run([*command, "-lpthread"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


def run(library, logits_NV: Tensor, temperature_N=None, uniform_N=None, banned: tuple[int, ...] = ()) -> RowStatistics:
    rows, vocabulary = logits_NV.shape
    floats = (torch.full((rows,), 7.0) for _ in range(7))
    result = RowStatistics(torch.full((rows,), -7), *floats, torch.zeros(rows, dtype=torch.bool))
    inputs = (temperature_N, uniform_N if uniform_N is None else uniform_N.double(), torch.tensor(banned))
    arguments = Arguments(
        logits_NV.data_ptr(),
        DTYPES.index(logits_NV.dtype),
        rows,
        vocabulary,
        logits_NV.stride(0),
        *(None if tensor is None else tensor.data_ptr() for tensor in inputs),
        len(banned),
        *(field.data_ptr() for field in result),
    )
    library.run(ctypes.byref(arguments))
    return result


def assert_equals_reference(library, logits_NV: Tensor, temperature_N, uniform_N, banned: tuple[int, ...]) -> None:
    temperature = 0.0 if temperature_N is None else temperature_N
    expected = row_statistics(logits_NV, temperature, uniform_N, banned, backend="reference")
    result = run(library, logits_NV, temperature_N, uniform_N, banned)
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=3e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [1, 31, CHUNK - 1, CHUNK, CHUNK + 8, 2 * CHUNK + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(library, dtype: torch.dtype, vocabulary: int) -> None:
    logits_NV = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(vocabulary)).mul(4).to(dtype)
    uniform_N = torch.rand(3, generator=torch.Generator().manual_seed(0))
    banned = (3, vocabulary - 2) if vocabulary > 9 else ()
    assert_equals_reference(library, logits_NV, None, None, banned)
    assert_equals_reference(library, logits_NV, torch.tensor([0.0, 0.5, 1.0]), uniform_N, banned)


def test_rows_that_are_not_finite(library) -> None:
    logits_NV = torch.randn(6, CHUNK + 40, generator=torch.Generator().manual_seed(1))
    logits_NV[0, 7] = torch.nan
    logits_NV[1, CHUNK + 3] = torch.inf
    logits_NV[2] = -torch.inf
    logits_NV[3, :CHUNK] = -torch.inf
    logits_NV[4] = -3e38
    logits_NV[5, 9] = torch.nan  # banned
    for temperature_N in (None, torch.full((6,), 0.8)):
        uniform_N = None if temperature_N is None else torch.full((6,), 0.4)
        assert_equals_reference(library, logits_NV, temperature_N, uniform_N, (9,))


def test_ends_of_the_distribution(library) -> None:
    logits_NV = torch.randn(4, CHUNK + 40, generator=torch.Generator().manual_seed(6))
    logits_NV[:, :7] = -torch.inf
    logits_NV[:, -30:] = -torch.inf
    uniform_N = torch.tensor([0.0, 1 - 2**-24, 1 - 2**-53, 5e-324], dtype=torch.float64)
    token_N = run(library, logits_NV, torch.full((4,), 0.8), uniform_N, (7,)).token
    assert token_N[0] == token_N[3] == 8
    assert token_N[2] == CHUNK + 9
    assert 8 <= token_N[1] <= CHUNK + 9


def test_evenly_spaced_numbers_give_each_token_its_share(library) -> None:
    row_V = torch.randn(9, generator=torch.Generator().manual_seed(7))
    uniform_N = (torch.arange(60) + 0.5) / 60
    token_N = run(library, row_V.expand(60, 9), torch.full((60,), 1.3), uniform_N).token
    share_V = (row_V / 1.3).softmax(0) * 60
    assert ((torch.bincount(token_N, minlength=9) - share_V).abs() <= 1).all()
    assert (token_N.diff() >= 0).all()
