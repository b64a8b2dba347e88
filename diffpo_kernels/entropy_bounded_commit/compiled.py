"""entropy_bounded_commit_ in C++, CUDA C++ and Triton, registered with torch so that torch.compile treats it as one operator."""

import struct
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpo_kernels import backends

_OPERATOR = "diffpo_kernels::entropy_bounded_commit_"
_TYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # FloatType in csrc
_WRITTEN = ("tokens", "start", "end", "logprob", "commit_step", "nfe")
_MAX_GPU_WINDOW = 2048  # kMaxCudaWindow in csrc; a Triton program that holds more spills registers

torch.library.define(
    _OPERATOR,
    "(Tensor(a!) tokens, Tensor proposal, Tensor proxy, Tensor entropy, Tensor? gamma, float gamma_of_all, int mask_id,"
    " Tensor(b!)? start, int start_of_all, Tensor(c!)? end, int end_of_all, str rule,"
    " Tensor? proposal_logprob, Tensor(d!)? logprob, Tensor(e!)? commit_step, Tensor(f!)? nfe,"
    " bool advance, int max_window, str backend) -> Tensor",
)


def refusal(proxy_dtype: torch.dtype, max_window: int) -> str | None:
    """Why a GPU kernel cannot take these arguments, or None if it can."""
    if proxy_dtype == torch.float64:
        return "proxy must not be torch.float64, which the kernel would round,"
    if max_window > _MAX_GPU_WINDOW:
        return f"windows must have at most {_MAX_GPU_WINDOW} positions, got max_window {max_window},"
    return None


def entropy_bounded_commit_(
    tokens_BL: Tensor,
    proposal_BL: Tensor,
    proxy_BL: Tensor,
    entropy_BL: Tensor,
    gamma: float | Tensor,
    mask_id: int,
    start: int | Tensor,
    end: int | Tensor,
    rule: str,
    proposal_logprob_BL: Tensor | None,
    logprob_BL: Tensor | None,
    commit_step_BL: Tensor | None,
    nfe_B: Tensor | None,
    advance: bool,
    max_window: int,
    backend: str,
) -> Tensor:
    """See the contract in the package; the arguments are checked already."""
    gamma_B, gamma_of_all = (gamma, 0.0) if isinstance(gamma, Tensor) else (None, gamma)
    start_B, start_of_all = (start, 0) if isinstance(start, Tensor) else (None, start)
    end_B, end_of_all = (end, 0) if isinstance(end, Tensor) else (None, end)
    return torch.ops.diffpo_kernels.entropy_bounded_commit_.default(
        tokens_BL, proposal_BL, proxy_BL, entropy_BL, gamma_B, gamma_of_all, mask_id, start_B, start_of_all, end_B, end_of_all,
        rule, proposal_logprob_BL, logprob_BL, commit_step_BL, nfe_B, advance, max_window, backend,
    )  # fmt: skip


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema. *_of_all: the number that stands for a missing per-row tensor."""

    tokens: Tensor
    proposal: Tensor
    proxy: Tensor
    entropy: Tensor
    gamma: Tensor | None
    gamma_of_all: float
    mask_id: int
    start: Tensor | None
    start_of_all: int
    end: Tensor | None
    end_of_all: int
    rule: str
    proposal_logprob: Tensor | None
    logprob: Tensor | None
    commit_step: Tensor | None
    nfe: Tensor | None
    advance: bool
    max_window: int
    backend: str


@torch.library.register_fake(_OPERATOR)
def _committed(tokens: Tensor, *_: object) -> Tensor:
    return torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device)


@torch.library.impl(_OPERATOR, ("CPU", "CUDA"))
def _run(*values: object) -> Tensor:
    given = Arguments._make(values)
    arguments = Arguments._make(
        value.contiguous() if isinstance(value, Tensor) and value.stride(-1) != 1 else value for value in values
    )
    committed = _committed(arguments.tokens)
    if committed.shape[0] > 0:
        _LAUNCH[arguments.backend](arguments, committed)
    for field in _WRITTEN:
        of_caller, used = getattr(given, field), getattr(arguments, field)
        if used is not of_caller:
            of_caller.copy_(used)
    return committed


def _launch_native(a: Arguments, committed: Tensor) -> None:
    floats = {"proxy": a.proxy, "entropy": a.entropy, "gamma": a.gamma}
    wide: dict[str, Any] = {name: x.float() for name, x in floats.items() if x is not None and x.itemsize == 2}
    a = a._replace(**wide)
    backends.compiled_extension().entropy_bounded_commit_cpu(*_native_arguments(a, committed), torch.get_num_threads())


def _launch_cuda(a: Arguments, committed: Tensor) -> None:
    device = committed.device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        backends.compiled_extension().entropy_bounded_commit_cuda(
            *_native_arguments(a, committed), device.index, stream
        )


def _launch_triton(a: Arguments, committed: Tensor) -> None:
    from diffpo_kernels.entropy_bounded_commit import triton_kernels  # importing this package must not import triton

    block = triton_kernels.block_of(a.max_window)
    gamma_bits = struct.unpack("<q", struct.pack("<d", a.gamma_of_all))[0]
    with torch.cuda.device(committed.device) if committed.is_cuda else nullcontext():
        triton_kernels.entropy_bounded_commit_kernel[(len(committed),)](
            *_matrices(a), committed, a.gamma, a.start, a.end, a.nfe,
            *(0 if matrix is None else matrix.stride(0) for matrix in _matrices(a)),
            gamma_bits, a.mask_id, a.start_of_all, a.end_of_all, triton_kernels.RULE_CODE[a.rule], committed.shape[1], a.max_window,
            ADVANCE=a.advance, BLOCK=block, num_warps=triton_kernels.WARPS.get(block, 1),
        )  # fmt: skip


_LAUNCH = {"native": _launch_native, "cuda": _launch_cuda, "triton": _launch_triton}


def _matrices(a: Arguments) -> tuple[Tensor | None, ...]:
    return a.tokens, a.proposal, a.proxy, a.entropy, a.proposal_logprob, a.logprob, a.commit_step


def _native_arguments(a: Arguments, committed: Tensor) -> tuple:
    """What entropy_bounded_commit_arguments in csrc/bindings.cpp takes."""
    matrices = _matrices(a)
    return (
        committed.shape,
        [
            0 if tensor is None else tensor.data_ptr()
            for tensor in (*matrices, committed, a.gamma, a.start, a.end, a.nfe)
        ],
        [0 if matrix is None else matrix.stride(0) for matrix in matrices],
        [_TYPE_CODE[tensor.dtype] for tensor in (a.proxy, a.entropy, a.proxy if a.gamma is None else a.gamma)],
        0 if a.logprob is None else a.logprob.element_size(),
        (a.mask_id, a.start_of_all, a.end_of_all, a.max_window),
        a.gamma_of_all,
        a.rule == "ranked",
        a.advance,
    )
