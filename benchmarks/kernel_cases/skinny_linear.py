"""skinny_linear: the LM head at the masked positions of a block, against torch's matmul, which "reference" is."""

import functools

import torch
from torch import Tensor

from diffpo_kernels import skinny_linear
from kernel_cases.case import (
    Case,
    Contestant,
    Workload,
    at_most_times,
    available_backends,
    generator,
    relative_errors_of,
    sample,
)

_OPERATOR = "skinny_linear"
_ITEM = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [case(device, n, 126464, d, torch.float32) for d in (256, 1024) for n in (1, 16, 32, 64)]
    return [case(device, 32, 126464, 4096, torch.bfloat16)]  # torch's matmul, which None is there


def case(device: str, rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> Case:
    return Case(
        f"{rows} x {vocabulary}, D = {width}, {_ITEM[dtype]}",
        functools.partial(build, rows, vocabulary, width, dtype),
        (at_most_times("reference", 1),) if device == "cpu" and rows in (16, 32) else (),
        quick=rows == 32 and width == (256 if device == "cpu" else 4096),
    )


def build(rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Workload:
    random = generator(device)
    hidden_ND = torch.randn(rows, width, generator=random, device=device).to(dtype)
    weight_VD = (torch.randn(vocabulary, width, generator=random, device=device) * (3 / width**0.5)).to(dtype)
    checked_v = sample(vocabulary, 512, device)
    truth_Nv = hidden_ND.double() @ weight_VD[checked_v].double().T

    def errors(backend: str) -> dict[str, float]:
        logits_NV: Tensor = skinny_linear(hidden_ND, weight_VD, backend=backend)
        return relative_errors_of("logits", logits_NV[:, checked_v], truth_Nv)

    usable, missing = available_backends(_OPERATOR, device)
    compiled = torch.compile(skinny_linear, dynamic=False)
    contestants = [
        Contestant(
            name,
            functools.partial(skinny_linear, hidden_ND, weight_VD, backend=name),
            functools.partial(errors, name),
        )
        for name in usable
    ]
    contestants.append(
        Contestant("torch.compile", lambda: compiled(hidden_ND, weight_VD, backend="reference"), compiles=True)
    )
    return Workload(
        contestants,
        missing,
        functools.partial(errors, "reference"),
        bytes=(weight_VD.numel() + rows * vocabulary) * weight_VD.element_size(),  # weights read, logits written
        flops=2 * rows * vocabulary * width,
        dtype=dtype,
    )
