"""Choosing a backend, also where the compiled extension is missing."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffpo_kernels import __main__ as report
from diffpo_kernels import backends, linear_logprob, triton_probe

HIDE_EXTENSION = "import sys; sys.modules['diffpo_kernels._native'] = None; import torch, diffpo_kernels as k; "
CALL_TWICE = "k.row_statistics(torch.zeros(1, 2)); k.row_statistics(torch.zeros(1, 2))"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


def test_without_the_extension_there_is_one_warning_and_the_reference_runs() -> None:
    done = run_python(HIDE_EXTENSION + CALL_TWICE, DIFFPO_KERNELS="")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: diffpo_kernels runs in plain torch") == 1


def test_require_makes_a_missing_extension_an_error() -> None:
    done = run_python(HIDE_EXTENSION + CALL_TWICE, DIFFPO_KERNELS="require")
    assert done.returncode != 0
    assert "DIFFPO_KERNELS=require" in done.stderr


def test_asking_for_native_without_the_extension_says_why() -> None:
    done = run_python(HIDE_EXTENSION + "k.row_statistics(torch.zeros(1, 2), backend='native')")
    assert (
        "RuntimeError: backend 'native' of row_statistics is not available for cpu: the compiled extension"
        in done.stderr
    )
    assert "available: reference" in done.stderr


def test_report_names_every_operator() -> None:
    for width in ("80", "160"):
        done = run_python("import runpy; runpy.run_module('diffpo_kernels', run_name='__main__')", COLUMNS=width)
        assert done.returncode == 0, done.stderr
        assert all(f" {operator} " in done.stdout for operator in backends.OPERATORS), width


def test_report_has_a_help_and_takes_no_other_argument(capsys) -> None:
    for arguments, code in ((["--help"], 0), (["--device"], 2)):
        with pytest.raises(SystemExit) as stopped:
            report.main(arguments)
        assert stopped.value.code == code
        said = capsys.readouterr()
        assert "usage: python -m diffpo_kernels" in said.out + said.err
        assert "compiled extension" not in said.out


@pytest.mark.parametrize("has_cuda", [False, True])
def test_report_says_that_no_gpu_kernel_ran_where_there_are_some(monkeypatch, capsys, has_cuda: bool) -> None:
    native = SimpleNamespace(instruction_set="avx2", has_cuda=has_cuda)
    monkeypatch.setattr(backends, "native_module", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report.main()
    closing = " ".join(capsys.readouterr().out.split())
    assert ("No GPU kernel" in closing) == has_cuda
    assert ("written for row_statistics, entropy_bounded_commit_)" in closing) == has_cuda


def test_none_picks_triton_on_a_gpu_and_never_cuda_cpp() -> None:
    """Importing triton takes no GPU; CUDA C++ waits for a benchmark that shows where it wins."""
    picked = {operator: backends.preferred(operator, "cuda") for operator in backends.OPERATORS}
    usable = backends.unavailable_reason("row_statistics", "triton", "cuda") is None
    assert picked["row_statistics"] == ("triton" if usable else "reference")
    assert "cuda" not in picked.values()


@pytest.fixture
def gpu_without_launches(monkeypatch):
    """What torch and Triton look like on a machine with two GPUs and no C compiler. Yields the devices a launch was tried on."""
    tried = []

    def launch(device_index: int) -> None:
        tried.append(device_index)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    caches = (backends._select, backends._complain, triton_probe.launch_failure)
    monkeypatch.delenv("DIFFPO_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_probe, "_launch", launch)
    for cached in caches:
        cached.cache_clear()
    yield tried
    for cached in caches:
        cached.cache_clear()


needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton, not interpreted"
)


@needs_triton
def test_where_triton_cannot_launch_the_reference_runs_and_one_warning_says_why(gpu_without_launches) -> None:
    device = torch.device("cuda", 1)
    with pytest.warns(
        RuntimeWarning, match=r"plain torch on cuda.*Triton cannot launch.*Failed to find C compiler"
    ) as caught:
        chosen = {operator: backends.select(operator, device, None) for operator in backends.OPERATORS}
    assert set(chosen.values()) == {"reference"}
    assert len(caught) == 1
    assert gpu_without_launches == [1], "one try for a device"
    assert "\n" not in str(caught[0].message)


@needs_triton
def test_where_triton_cannot_launch_asking_for_it_or_requiring_kernels_is_an_error(
    gpu_without_launches, monkeypatch
) -> None:
    device = torch.device("cuda", 0)
    with pytest.raises(
        RuntimeError, match=r"backend 'triton' of surrogate_loss.*cuda: Triton cannot launch.*available: reference"
    ):
        backends.select("surrogate_loss", device, "triton")
    monkeypatch.setenv("DIFFPO_KERNELS", "require")
    with pytest.raises(RuntimeError, match=r"Failed to find C compiler.*DIFFPO_KERNELS=require"):
        backends.select("surrogate_loss", device, None)
    assert backends.select("skinny_linear", device, None) == "reference", "which has no kernel for a GPU"
    assert gpu_without_launches == [0]


@needs_triton
def test_nothing_is_launched_into_a_capture(gpu_without_launches, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.select("row_statistics", torch.device("cuda", 0), None) == "triton"
    assert gpu_without_launches == []


@needs_triton
def test_the_report_says_that_triton_cannot_launch(gpu_without_launches, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    report.main()
    assert "Triton: Triton cannot launch a kernel: RuntimeError: Failed to find C compiler." in capsys.readouterr().out


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_real_probe_fails_in_one_line() -> None:
    reason = triton_probe.launch_failure.__wrapped__(0)
    assert reason.startswith("Triton cannot launch a kernel: ")
    assert "\n" not in reason


@needs_triton
def test_the_probe_is_a_kernel_that_compiles() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(triton.jit(triton_probe._nothing), {"number": "i32"}, {}, {})
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


def test_linear_logprob_is_compiled_once_for_all_temperatures() -> None:
    """Once for a first number that is taken for a constant, and once more for every other. row_statistics has the same test."""
    hidden, head, target = torch.eye(3, 8), torch.eye(5, 8), torch.arange(3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_logprob, fullgraph=True, backend=counter)
    for temperature in (0.5, 0.7, 0.9, 1.0, 1.3):
        expected = linear_logprob(hidden, head, target, temperature)
        torch.testing.assert_close(compiled(hidden, head, target, temperature), expected)
    assert counter.frame_count <= 2


def test_importing_the_package_does_not_need_triton() -> None:
    done = run_python("import torch, sys; sys.modules['triton'] = None; import diffpo_kernels")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_cpp_without_a_driver_says_so() -> None:
    native = backends.native_module()
    if native is None or not native.has_cuda:
        pytest.skip("built without CUDA")
    with pytest.raises(RuntimeError, match=r"row_statistics: device: .*(driver|device)"):
        native.row_statistics_cuda(0, 0, 1, 1, 1, 0, 0, 0, 0, [0] * 9, 0, 0, 0)
