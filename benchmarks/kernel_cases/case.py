"""A case is data: inputs of one size, everyone who computes the same thing from them, and what the issue asks of our backends."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffpo_kernels import backends

Call = Callable[[], Any]
SEED = 0


@dataclass(frozen=True)
class Contestant:
    """Someone who computes a case.

    call: computes it once and returns the results. errors: computes it once and returns its errors against float64 by output, the root
    mean square and under names that begin with "max" the largest, and under names that begin with "wrong" the number of wrong entries;
    None for baselines, which are not checked.
    compiles: the first call takes torch.compile's time.
    """

    name: str
    call: Call
    errors: Callable[[], dict[str, float]] | None = None
    compiles: bool = False


@dataclass(frozen=True)
class Workload:
    """A case on a device. bytes, flops: the least that must be moved and computed. missing: name -> why it does not take part.

    torch_errors: the errors of plain torch in the working precision, which every backend is measured by.
    """

    contestants: Sequence[Contestant]
    missing: Mapping[str, str]
    torch_errors: Callable[[], dict[str, float]]
    bytes: int
    flops: int = 0
    dtype: torch.dtype = torch.float32


@dataclass
class Result:
    """One contestant in one case. status: "ok" or why there is no time. Times in seconds, sizes in bytes.

    share: the time that the `ceiling` (bytes/s or FLOP/s) named by `bound` allows at least, as a fraction of the measured time.
    host_bound, wall_seconds: see measure.py; None on a CPU, where `seconds` are wall-clock.
    ratios, wall_ratios: baseline -> how many times longer it takes. extra_bytes: peak beyond inputs and results. peak_bytes: on a
    GPU, beyond inputs alone.
    """

    contestant: str
    backend: bool
    status: str = "ok"
    errors: dict[str, float] | None = None
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    graph_seconds: float | None = None
    host_bound: bool | None = None
    wall_seconds: float | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    bound: str | None = None
    ceiling: float | None = None
    share: float | None = None
    extra_bytes: int | None = None
    peak_bytes: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    wall_ratios: dict[str, float] = field(default_factory=dict)
    targets: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """What the issue asks of a backend: `measure` of it at least (or at most) `bound`; None where a part of it is missing."""

    text: str
    measure: Callable[[Result, Mapping[str, Result]], float | None]
    bound: float
    at_most: bool = False

    def judge(self, result: Result, by_name: Mapping[str, Result]) -> dict:
        value = self.measure(result, by_name)
        met = None if value is None else (value <= self.bound if self.at_most else value >= self.bound)
        return {"target": self.text, "measured": value, "met": met}


@dataclass(frozen=True)
class Case:
    """One size of one operator. graph: also time it inside a CUDA graph. quick: part of --quick."""

    name: str
    build: Callable[[torch.device], Workload]
    targets: tuple[Target, ...] = ()
    graph: bool = False
    quick: bool = False


def time_ratio(of: Result | None, to: Result | None) -> float | None:
    """How many times longer `of` takes than `to`."""
    if of is None or to is None or not of.seconds or not to.seconds:
        return None
    return of.seconds / to.seconds


def faster_than(baseline: str, factor: float, text: str | None = None) -> Target:
    text = text or f"{factor:g}x faster than {baseline}"
    return Target(text, lambda mine, others: time_ratio(others.get(baseline), mine), factor)


def at_most_times(baseline: str, factor: float) -> Target:
    return Target(
        f"within {factor:g}x of {baseline}",
        lambda mine, others: time_ratio(mine, others.get(baseline)),
        factor,
        at_most=True,
    )


def share_at_least(share: float) -> Target:
    return Target(f"{share:.0%} of the measured ceiling", lambda mine, _: mine.share, share)


def extra_memory_at_most(size: int, text: str) -> Target:
    return Target(f"at most {text} extra", lambda mine, _: mine.extra_bytes, size, at_most=True)


def available_backends(operator: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Backends that run here, and why the others for this kind of device do not."""
    reasons = {name: backends.unavailable_reason(operator, name, device.type) for name in backends.BACKENDS}
    usable = [name for name, reason in reasons.items() if reason is None]
    foreign = {"cpu": ("triton", "cuda"), "cuda": ("native",)}[device.type]
    return usable, {name: why for name, why in reasons.items() if why is not None and name not in foreign}


def import_or_reason(module: str) -> tuple[Any, str | None]:
    """A module that need not be installed, or why it is missing."""
    try:
        return importlib.import_module(module), None
    except ImportError as error:
        return None, f"not importable: {error}"


def generator(device: torch.device, seed: int = SEED) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def sample(size: int, count: int, device: torch.device) -> Tensor:
    """`count` indices spread over [0, size), the first and the last among them: offsets beyond 2^31 are at the end."""
    return torch.linspace(0, size - 1, min(size, count), device=device, dtype=torch.float64).round().long()


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def errors_of(name: str, difference: Tensor, unit: float = 1.0) -> dict[str, float]:
    """Root mean square and largest, in `unit`."""
    return {name: rms(difference) / unit, f"max {name}": difference.abs().max().item() / unit}


def relative_errors_of(name: str, got: Tensor, truth: Tensor) -> dict[str, float]:
    """In units of the truth's root mean square."""
    return errors_of(name, got.double() - truth, max(rms(truth), math.ulp(0.0)))


def too_large(errors: Mapping[str, float], torch_errors: Mapping[str, float]) -> list[str]:
    """The outputs with a larger error than this, each as one readable line; NaN is larger than anything.

    Against float64, on the benchmark's own inputs, with gradients relative to their root mean square: a backend's root mean square error
    may be 1.1 times that of plain torch in the working precision (2 times for gradients, whose sums are formed in another order)
    plus 1e-5, its largest error 8 times torch's largest plus 1e-4. Tokens, flags, counts and commits must all be right.
    """
    bad = []
    for name, error in errors.items():
        if name.startswith("wrong"):
            allowed = 0.0
        elif name.startswith("max"):
            allowed = 8 * torch_errors[name] + 1e-4
        else:
            allowed = (2.0 if "gradient" in name else 1.1) * torch_errors[name] + 1e-5
        if not error <= allowed:
            bad.append(f"{name}: {error:.3g}, allowed {allowed:.3g}")
    return bad
