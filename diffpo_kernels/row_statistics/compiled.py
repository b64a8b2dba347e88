"""row_statistics in C++ (CPU tensors) and CUDA (GPU tensors), registered with torch so that torch.compile treats it as one operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpo_kernels import backends
from diffpo_kernels.validation import as_row_tensor

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum class Dtype in csrc/row_statistics.h
_OPERATOR = "diffpo_kernels::row_statistics"

torch.library.define(
    _OPERATOR,
    "(Tensor logits, Tensor? temperature, Tensor? uniform, int[] banned)"
    " -> (Tensor token, Tensor logprob, Tensor entropy, Tensor top1, Tensor top2, Tensor lse, Tensor valid)",
)


def row_statistics(
    logits_NV: Tensor, temperature: float | Tensor, uniform_N: Tensor | None, banned: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """See the contract in the package; the arguments are checked already."""
    if uniform_N is None or (isinstance(temperature, float) and temperature == 0):  # then T = 0 in every row
        temperature_N = uniform_N = None
    else:
        temperature_N = as_row_tensor(temperature, logits_NV.shape[0], logits_NV.device, torch.float32).contiguous()
        uniform_N = uniform_N.double().contiguous()
    if logits_NV.stride(1) != 1:  # rows may be strided, columns may not
        logits_NV = logits_NV.contiguous()
    return torch.ops.diffpo_kernels.row_statistics(logits_NV, temperature_N, uniform_N, banned)


@torch.library.register_fake(_OPERATOR)
def _outputs(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        *(logits.new_empty(rows, dtype=torch.float32) for _ in range(5)),
        logits.new_empty(rows, dtype=torch.bool),
    )


@torch.library.impl(_OPERATOR, "CPU")
def _on_cpu(
    logits: Tensor, temperature: Tensor | None, uniform: Tensor | None, banned: Sequence[int]
) -> tuple[Tensor, ...]:
    outputs = _outputs(logits)
    backends.native_module().row_statistics_cpu(
        *_inputs(logits, temperature, uniform), banned, [out.data_ptr() for out in outputs], torch.get_num_threads()
    )
    return outputs


@torch.library.impl(_OPERATOR, "CUDA")
def _on_cuda(
    logits: Tensor, temperature: Tensor | None, uniform: Tensor | None, banned: Sequence[int]
) -> tuple[Tensor, ...]:
    native, device = backends.native_module(), logits.device
    outputs = _outputs(logits)
    with torch.cuda.device(device):
        banned_ids = torch.tensor(banned, dtype=torch.int64).to(device, non_blocking=True)
        workspace = torch.empty(native.row_statistics_cuda_workspace(*logits.shape), dtype=torch.uint8, device=device)
        native.row_statistics_cuda(
            *_inputs(logits, temperature, uniform),
            banned_ids.data_ptr(),
            len(banned),
            [out.data_ptr() for out in outputs],
            workspace.data_ptr(),
            device.index,
            torch.cuda.current_stream().cuda_stream,
        )
    return outputs


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
