"""The compiled backends of row_statistics, registered with torch as one operator, so that torch.compile takes it as it is."""

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from diffpo_kernels import backends
from diffpo_kernels.validation import as_row_tensor

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum class Dtype in csrc/row_statistics.h
_OPERATOR = "diffpo_kernels::row_statistics"

torch.library.define(
    _OPERATOR,
    "(Tensor logits, Tensor? temperature, Tensor? uniform, int[] banned, str backend)"
    " -> (Tensor token, Tensor logprob, Tensor entropy, Tensor confidence, Tensor top1, Tensor top2, Tensor odds, Tensor lse,"
    " Tensor valid)",
)


def row_statistics(
    logits_NV: Tensor, temperature: float | Tensor, uniform_N: Tensor | None, banned: tuple[int, ...], backend: str
) -> tuple[Tensor, ...]:
    """See the contract in the package; the arguments are checked already. backend: "native", "triton" or "cuda"."""
    if uniform_N is None or (isinstance(temperature, float) and temperature == 0):  # then T = 0 in every row
        temperature_N = uniform_N = None
    else:
        temperature_N = as_row_tensor(temperature, logits_NV.shape[0], logits_NV.device, torch.float32).contiguous()
        uniform_N = uniform_N.double().contiguous()
    if logits_NV.stride(1) != 1:  # rows may be strided, columns may not
        logits_NV = logits_NV.contiguous()
    return torch.ops.diffpo_kernels.row_statistics(logits_NV, temperature_N, uniform_N, banned, backend)


@torch.library.register_fake(_OPERATOR)
def _outputs(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        *(logits.new_empty(rows, dtype=torch.float32) for _ in range(7)),
        logits.new_empty(rows, dtype=torch.bool),
    )


@torch.library.impl(_OPERATOR, ("CPU", "CUDA"))
def _run(
    logits: Tensor, temperature: Tensor | None, uniform: Tensor | None, banned: Sequence[int], backend: str
) -> tuple[Tensor, ...]:
    outputs = _outputs(logits)
    addresses = [output.data_ptr() for output in outputs]
    with torch.cuda.device(logits.device) if logits.device.type == "cuda" else contextlib.nullcontext():
        if backend == "native":
            inputs, threads = _inputs(logits, temperature, uniform), torch.get_num_threads()
            backends.compiled_extension().row_statistics_cpu(*inputs, banned, addresses, threads)
        elif backend == "triton":
            # Not at the top: importing the package must not import triton.
            from diffpo_kernels.row_statistics import triton_kernels

            banned_ids = _banned_ids(tuple(banned), logits.device)
            triton_kernels.row_statistics(logits, temperature, uniform, banned_ids, outputs)
        else:
            _run_cuda(logits, temperature, uniform, _banned_ids(tuple(banned), logits.device), addresses)
    return outputs


def _run_cuda(
    logits: Tensor, temperature: Tensor | None, uniform: Tensor | None, banned_ids: Tensor, addresses: list[int]
) -> None:
    native, device = backends.compiled_extension(), logits.device
    workspace = torch.empty(native.row_statistics_cuda_workspace(*logits.shape), dtype=torch.uint8, device=device)
    native.row_statistics_cuda(
        *_inputs(logits, temperature, uniform),
        banned_ids.data_ptr(),
        len(banned_ids),
        addresses,
        workspace.data_ptr(),
        device.index,
        torch.cuda.current_stream().cuda_stream,
    )


def _banned_ids(banned: tuple[int, ...], device: torch.device) -> Tensor:
    """The ids as int64 on `device`, without the host waiting, and without a copy that a CUDA graph would refuse to capture.

    They are kept per stream, which orders their first use after their making. A graph under capture gets its own, made at each replay.
    """
    if device.type != "cuda":
        return torch.tensor(banned, dtype=torch.int64)
    if torch.cuda.is_current_stream_capturing():
        return _filled(banned, device)
    return _kept_ids(banned, device, torch.cuda.current_stream().cuda_stream)


@functools.lru_cache(maxsize=64)
def _kept_ids(banned: tuple[int, ...], device: torch.device, _stream: int) -> Tensor:
    return _filled(banned, device)


def _filled(banned: tuple[int, ...], device: torch.device) -> Tensor:
    ids = torch.empty(len(banned), dtype=torch.int64, device=device)
    for position, token in enumerate(banned):
        ids[position].fill_(token)
    return ids


def _inputs(logits: Tensor, temperature: Tensor | None, uniform: Tensor | None) -> tuple[int, ...]:
    rows, vocabulary = logits.shape
    return (
        logits.data_ptr(),
        _DTYPE_CODE[logits.dtype],
        rows,
        vocabulary,
        logits.stride(0),
        0 if temperature is None else temperature.data_ptr(),
        0 if uniform is None else uniform.data_ptr(),
    )
