"""Which implementation of an operator runs, and why.

    reference   plain torch, any device: the definition every other backend is tested against
    native      C++ on the CPU, compiled at install time
    triton      GPU kernels compiled when first used
    cuda        CUDA C++, compiled at install time where nvcc was found

`backend=None` takes the first available entry of `_PREFERENCE`. Triton stands in it because its kernels pass every test under Triton's
interpreter and compile within their budgets of registers and spills for every supported GPU, and because plain torch would not fit in
memory; "cuda" is taken only by name until a benchmark on a device shows where it wins.

Where the preferred one cannot run (no compiled extension; a machine on which Triton cannot build its launcher) plain torch does, and one
warning says why.

Environment: DIFFPO_KERNELS=require turns that warning into an error. DIFFPO_CPU=baseline or avx2
keeps the native backend from using a better instruction set than that (for tests and bug reports).
"""

import functools
import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

from diffpo_kernels import triton_probe

BACKENDS = ("reference", "native", "triton", "cuda")

_IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "row_statistics": ("reference", "native", "triton", "cuda"),
    "entropy_bounded_commit_": ("reference", "native", "triton", "cuda"),
    "linear_logprob": ("reference", "native", "triton"),
    "surrogate_loss": ("reference", "native", "triton"),
    "skinny_linear": ("reference", "native"),
}
OPERATORS = tuple(_IMPLEMENTED)

_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}
_DEVICE_OF = {"native": "cpu", "triton": "cuda", "cuda": "cuda"}


def implementations(operator: str) -> tuple[str, ...]:
    """The backends written for `operator`, whether or not they can run here."""
    return _IMPLEMENTED[operator]


def select(operator: str, device: torch.device, backend: str | None) -> str:
    """Name the backend that runs `operator` on `device`.

    Raises ValueError for an unknown name, RuntimeError for a known one that cannot run here, saying why and what can.
    """
    return _select(operator, device, backend, os.environ.get("DIFFPO_KERNELS", ""))


# A compiled graph keeps the choice made while it was traced. torch.compiler.assume_constant_result sets this mark and no more, but imports
# torch._dynamo for it, which takes as long as torch.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _select(operator: str, device: torch.device, backend: str | None, mode: str) -> str:
    if mode not in ("", "require"):
        raise ValueError(f"the environment variable DIFFPO_KERNELS must be unset or 'require', got {mode!r}")
    if backend is None:
        for name in _PREFERENCE.get(device.type, ()):
            reason = unavailable_reason(operator, name, device)
            if reason is None:
                return name
            if name in _IMPLEMENTED[operator]:
                _complain(device.type, reason, required=mode == "require")
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = unavailable_reason(operator, backend, device)
    if reason is not None:
        usable = ", ".join(name for name in BACKENDS if unavailable_reason(operator, name, device) is None)
        raise RuntimeError(
            f"backend {backend!r} of {operator} is not available for {device.type}: {reason}; available: {usable}"
        )
    return backend


def preferred(operator: str, device: str | torch.device) -> str:
    """The backend that None stands for: the first of the preference list that is available."""
    candidates = _PREFERENCE.get(torch.device(device).type, ("reference",))
    return next(name for name in candidates if unavailable_reason(operator, name, device) is None)


def unavailable_reason(operator: str, backend: str, device: str | torch.device) -> str | None:
    """Why `backend` cannot run `operator` on this device, or None if it can. "cuda" is the current one."""
    device = torch.device(device)
    if backend not in _IMPLEMENTED[operator]:
        return "not written for this operator"
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_unavailable_reason(device)
    if device.type != _DEVICE_OF[backend]:
        return f"it runs on {_DEVICE_OF[backend]} tensors only"
    if native_module() is None:
        return f"the compiled extension is missing ({missing_extension_reason()})"
    if backend == "cuda" and not compiled_extension().has_cuda:
        return f"built without CUDA ({build_report().get('cuda', 'no build report')})"
    return None


def _triton_unavailable_reason(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it once, when it is imported
    if device.type != ("cpu" if interpreted else "cuda"):
        return (
            "it runs on cuda tensors only"
            if not interpreted
            else "TRITON_INTERPRET=1 is set: it runs on cpu tensors only"
        )
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if interpreted or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None  # nothing to try it on, or not now
    return triton_probe.launch_failure(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache  # one warning for all operators
def _complain(device_type: str, reason: str, required: bool) -> None:
    message = f"diffpo_kernels runs in plain torch on {device_type}, many times slower: {reason}"
    if required:
        raise RuntimeError(f"{message} (DIFFPO_KERNELS=require)")
    warnings.warn(f"{message}. Run `python -m diffpo_kernels` for details.", RuntimeWarning, stacklevel=6)


@functools.cache
def native_module() -> ModuleType | None:
    """The compiled extension, or None where it is missing."""
    try:
        return importlib.import_module("diffpo_kernels._native")
    except ImportError:
        return None


def compiled_extension() -> ModuleType:
    """The compiled extension, for backends that were found available. RuntimeError where it is missing."""
    module = native_module()
    if module is None:
        raise RuntimeError(f"the compiled extension is missing ({missing_extension_reason()})")
    return module


def missing_extension_reason() -> str:
    """Why there is no compiled extension; empty if there is one."""
    try:
        importlib.import_module("diffpo_kernels._native")
    except ModuleNotFoundError:
        return build_report().get("native", "not compiled; run `pip install .` or `pip install -e .`")
    except ImportError as error:
        return f"compiled, but cannot be loaded: {error}"
    return ""


@functools.lru_cache(maxsize=1)
def build_report() -> dict[str, str]:
    """What setup.py recorded about the build; empty when run from a source tree that was never installed."""
    path = Path(__file__).with_name("_build_report.json")
    return json.loads(path.read_text()) if path.is_file() else {}
