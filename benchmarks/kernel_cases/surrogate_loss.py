"""surrogate_loss: loss, gradient and all diagnostics of one inner update, as training runs it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffpo_kernels import surrogate_loss
from kernel_cases.case import Case, Contestant, Workload, available_backends, generator, relative_errors_of

_OPERATOR = "surrogate_loss"
_BINS = 4  # the quarters of the denoising steps that training reports
_BYTES_PER_TOKEN = 4 * 4 + 1 + 8 + 4  # four log-probabilities, the mask and the bin are read, one gradient is written


def cases(device: str) -> list[Case]:
    return [
        Case(f"{rows} x {length}", functools.partial(build, rows, length), quick=rows == 64)
        for rows, length in ((512, 13), (64, 256), (512, 1024))
    ]


def build(rows: int, length: int, device: torch.device) -> Workload:
    random = generator(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    logprob_BL = -1 - normal(rows, length).abs()
    old_BL, behaviour_BL, reference_BL = (logprob_BL + 0.3 * normal(rows, length) for _ in range(3))
    advantage_B = normal(rows)
    mask_BL = torch.rand(rows, length, generator=random, device=device) < 0.9
    bin_BL = torch.randint(_BINS, (rows, length), generator=random, device=device)
    logprob_BL.requires_grad_()

    def step(backend: str, function: Callable = surrogate_loss, dtype: torch.dtype = torch.float32) -> Any:
        def cast(values: Tensor) -> Tensor:
            return values.to(dtype)

        loss, diagnostics = function(
            cast(logprob_BL),
            cast(old_BL),
            cast(advantage_B),
            mask_BL,
            cast(behaviour_BL),
            cast(reference_BL),
            kl_coefficient=0.04,
            step_bin=bin_BL,
            bins=_BINS,
            backend=backend,
        )
        return loss.detach(), torch.autograd.grad(loss, logprob_BL)[0], diagnostics

    loss, gradient_BL, diagnostics = step("reference", dtype=torch.float64)

    def errors(backend: str) -> dict[str, float]:
        got_loss, got_gradient_BL, got_diagnostics = step(backend)
        # Counts are compared as fractions: float32 may put a token on the other side of an edge.
        gaps = [
            ((got_diagnostics[name] - value).abs().max() / value.abs().max().clamp(min=1)).item()
            for name, value in diagnostics.items()
        ]
        return {
            "loss": abs(got_loss.item() - loss.item()),
            "diagnostics": max(gaps),
        } | relative_errors_of("gradient", got_gradient_BL, gradient_BL)

    usable, missing = available_backends(_OPERATOR, device)
    compiled = torch.compile(surrogate_loss, dynamic=False)
    contestants = [Contestant(name, functools.partial(step, name), functools.partial(errors, name)) for name in usable]
    contestants.append(Contestant("torch.compile", lambda: step("reference", compiled), compiles=True))
    return Workload(contestants, missing, lambda: errors("reference"), bytes=_BYTES_PER_TOKEN * rows * length)
