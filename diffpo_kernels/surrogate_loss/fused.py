"""surrogate_loss with its gradient in one pass, in C++ or Triton, registered with torch so that torch.compile treats it as one operator.

The operator returns the loss, the gradient of the loss up to a factor, that factor, and all diagnostics in one vector. The factor is a
tensor because under "token" normalisation it holds the number of tokens, which the host must not wait for.
"""

from typing import Any

import torch
from torch import Tensor

from diffpo_kernels import backends
from diffpo_kernels.surrogate_loss.diagnostics import packed_size, unpack

_OPERATOR = "diffpo_kernels::surrogate_loss"

# Where a function below takes `*arguments: Any`, the schema gives the types: torch checks them at each call.
torch.library.define(
    _OPERATOR,
    "(Tensor logprob, Tensor old, Tensor advantage, Tensor mask, Tensor? behaviour, Tensor? reference, Tensor? step_bin, int bins,"
    " float clip, float weight_cap, float kl_coefficient, bool importance_correction, str normalisation, str backend)"
    " -> (Tensor loss, Tensor gradient, Tensor factor, Tensor diagnostics)",
)


def surrogate_loss(logprob_BL: Tensor, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """See the contract in the package; the arguments are those of the reference, checked already, and the backend."""
    loss, packed = _Loss.apply(logprob_BL, *arguments)
    bins = arguments[6]
    return loss, unpack(packed, bins)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprob_BL: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, gradient_BL, factor, packed = torch.ops.diffpo_kernels.surrogate_loss(logprob_BL, *arguments)
        ctx.save_for_backward(logprob_BL, gradient_BL, factor)
        ctx.others = len(arguments)
        ctx.mark_non_differentiable(packed)
        return loss, packed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _Gradient.apply(*ctx.saved_tensors, upstream), *[None] * ctx.others


class _Gradient(torch.autograd.Function):
    """upstream * dloss / dlogprob. A function of logprob too, so that a second derivative is an error and not silently zero."""

    @staticmethod
    def forward(ctx: Any, logprob_BL: Tensor, gradient_BL: Tensor, factor: Tensor, upstream: Tensor) -> Tensor:
        return (gradient_BL * (upstream * factor)).to(logprob_BL.dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        raise RuntimeError("surrogate_loss can be differentiated only once, except with backend='reference'")


@torch.library.register_fake(_OPERATOR)
def _outputs(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    behaviour: Tensor | None,
    reference: Tensor | None,
    step_bin: Tensor | None,
    bins: int,
    *_: object,
) -> tuple[Tensor, ...]:
    precise = torch.promote_types(logprob.dtype, torch.float32)
    return (
        logprob.new_empty((), dtype=precise),
        logprob.new_empty(logprob.shape, dtype=precise),
        logprob.new_empty((), dtype=precise),
        logprob.new_empty(packed_size(bins), dtype=precise),
    )


@torch.library.impl(_OPERATOR, "CPU")
def _on_cpu(logprob: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *rest, backend = arguments
    return (_native if backend == "native" else _triton)(logprob, *rest)


@torch.library.impl(_OPERATOR, "CUDA")
def _on_cuda(logprob: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *rest, _ = arguments
    return _triton(logprob, *rest)


def _triton(logprob: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from diffpo_kernels.surrogate_loss import triton_kernels  # triton is imported only where it is used

    outputs = _outputs(logprob, *arguments)
    triton_kernels.launch(outputs, logprob, *arguments)
    return outputs


def _native(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    behaviour: Tensor | None,
    reference: Tensor | None,
    step_bin: Tensor | None,
    bins: int,
    clip: float,
    weight_cap: float,
    kl_coefficient: float,
    importance_correction: bool,
    normalisation: str,
) -> tuple[Tensor, ...]:
    outputs = _outputs(logprob, old, advantage, mask, behaviour, reference, step_bin, bins)
    precise = outputs[0].dtype
    floats = [x if x is None else x.to(precise) for x in (logprob, old, advantage, behaviour, reference)]
    inputs = [x if x is None else x.contiguous() for x in (*floats, mask, step_bin)]
    native = backends.compiled_extension()
    run = native.surrogate_loss_cpu_float64 if precise == torch.float64 else native.surrogate_loss_cpu_float32
    run(
        [0 if x is None else x.data_ptr() for x in inputs],
        *logprob.shape,
        bins,
        clip,
        weight_cap,
        kl_coefficient,
        importance_correction,
        normalisation == "sequence",
        advantage.dim() == 2,
        [out.data_ptr() for out in outputs],
        torch.get_num_threads(),
    )
    return outputs
