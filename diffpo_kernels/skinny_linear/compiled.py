"""The native backend of skinny_linear, registered with torch as one operator, so that torch.compile takes it as it is."""

import torch
from torch import Tensor

from diffpo_kernels import backends

_OPERATOR = "diffpo_kernels::skinny_linear"

torch.library.define(_OPERATOR, "(Tensor hidden, Tensor weight) -> Tensor")


def skinny_linear(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """See the contract in the package; the arguments are checked already."""
    return torch.ops.diffpo_kernels.skinny_linear(hidden_ND, weight_VD)


@torch.library.register_fake(_OPERATOR)
def _output(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


@torch.library.impl(_OPERATOR, "CPU")
def _run(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = _output(hidden, weight)
    backends.compiled_extension().skinny_linear_cpu(
        hidden.data_ptr(),
        weight.data_ptr(),
        logits.data_ptr(),
        *hidden.shape,
        weight.shape[0],
        (*hidden.stride(), weight.stride(0)),
        torch.get_num_threads(),
    )
    return logits
