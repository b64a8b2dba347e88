"""linear_logprob registered with torch: a forward and a backward operator, each one node for torch.compile, and autograd between them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffpo_kernels.linear_logprob import chunked
from diffpo_kernels.linear_logprob.chunked import GRADIENT_OF_HIDDEN, LOGITS, NOTHING
from diffpo_kernels.linear_logprob.rows import Rows
from diffpo_kernels.validation import as_row_tensor

_FORWARD = "diffpo_kernels::linear_logprob_forward"
_BACKWARD = "diffpo_kernels::linear_logprob_backward"

# Where a function below takes `*rest: Any`, the schemas give the types: torch checks them at each call.
torch.library.define(
    _FORWARD,
    "(Tensor[] hidden, Tensor head, Tensor target, Tensor temperature, Tensor? bias, int[] banned, Tensor? rows,"
    " int chunk_bytes, str keep, str backend)"
    " -> (Tensor logprob, Tensor entropy, Tensor max, Tensor log_sum, Tensor kept)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor by_logprob, Tensor? by_entropy, Tensor(a!)? kept, Tensor[] row_values, Tensor[] hidden, Tensor head, Tensor? bias,"
    " int[] banned, Tensor? rows, bool[] needs, int chunk_bytes, str keep, str backend)"
    " -> (Tensor hidden_gradient, Tensor head_gradient, Tensor bias_gradient)",
)


def linear_logprob(
    hidden: Sequence[Tensor],
    head_VD: Tensor,
    target_N: Tensor,
    temperature: float | Tensor,
    bias_V: Tensor | None,
    banned: tuple[int, ...],
    return_entropy: bool,
    rows_N: Tensor | None,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See the contract in the package; the arguments are checked already."""
    temperature_N = as_row_tensor(temperature, target_N.shape[0], target_N.device, torch.float32).contiguous()
    keep = _what_to_keep(hidden, head_VD, bias_V, return_entropy, target_N.shape[0], chunk_bytes)
    return _LinearLogprob.apply(
        head_VD, bias_V, target_N.contiguous(), temperature_N, banned, rows_N, chunk_bytes, keep, backend, *hidden
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """True if autograd will ask for the gradient of one of `tensors`."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _what_to_keep(
    hidden: Sequence[Tensor], head: Tensor, bias: Tensor | None, return_entropy: bool, rows: int, chunk_bytes: int
) -> str:
    if not wants_gradient(*hidden, head, bias):
        return NOTHING
    if not wants_gradient(head, bias) and not return_entropy:
        return GRADIENT_OF_HIDDEN
    return LOGITS if rows * head.shape[0] * head.element_size() <= chunk_bytes else NOTHING


@torch.library.impl(_FORWARD, ("cpu", "cuda"))
def _forward(hidden: Sequence[Tensor], head: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with _without_autocast(head.device):
        return chunked.forward(hidden, head, *rest)


@torch.library.register_fake(_FORWARD)
def _forward_outputs(
    hidden: Sequence[Tensor], head: Tensor, target: Tensor, temperature: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, keep, _ = rest
    N, (V, D) = target.shape[0], head.shape
    kept = {
        NOTHING: lambda: head.new_empty(0),
        LOGITS: lambda: head.new_empty(N, V),
        GRADIENT_OF_HIDDEN: lambda: head.new_empty(N, D, dtype=chunked.product_dtype(head)),
    }[keep]()
    return *(torch.empty_like(temperature) for _ in range(4)), kept


@torch.library.impl(_BACKWARD, ("cpu", "cuda"))
def _backward(
    by_logprob: Tensor,
    by_entropy: Tensor | None,
    kept: Tensor | None,
    row_values: Sequence[Tensor],
    hidden: Sequence[Tensor],
    head: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    by_entropy = None if by_entropy is None else by_entropy.contiguous()
    with _without_autocast(head.device):
        gradients = chunked.backward(by_logprob.contiguous(), by_entropy, kept, Rows(*row_values), hidden, head, *rest)
    return tuple(head.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake(_BACKWARD)
def _backward_outputs(
    by_logprob: Tensor,
    by_entropy: Tensor | None,
    kept: Tensor | None,
    row_values: Sequence[Tensor],
    hidden: Sequence[Tensor],
    head: Tensor,
    bias: Tensor | None,
    banned: Sequence[int],
    rows: Tensor | None,
    needs: Sequence[bool],
    *_: object,
) -> tuple[Tensor, ...]:
    nothing = (0,)
    return (
        head.new_empty((sum(source.shape[0] for source in hidden), head.shape[1]) if needs[0] else nothing),
        head.new_empty(head.shape if needs[1] else nothing),
        head.new_empty(nothing) if bias is None or not needs[2] else bias.new_empty(head.shape[:1]),
    )


class _LinearLogprob(torch.autograd.Function):
    """The two operators as one differentiable function (torch.library.register_autograd costs several times as much per call)."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: Tensor,
        banned: tuple[int, ...],
        rows: Tensor | None,
        chunk_bytes: int,
        keep: str,
        backend: str,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logprob, entropy, largest, log_sum, kept = torch.ops.diffpo_kernels.linear_logprob_forward.default(
            hidden, head, target, temperature, bias, banned, rows, chunk_bytes, keep, backend
        )
        product = kept if keep == GRADIENT_OF_HIDDEN else None
        ctx.save_for_backward(
            head, bias, rows, product, target, temperature, logprob, entropy, largest, log_sum, *hidden
        )
        ctx.set_materialize_grads(False)
        ctx.banned, ctx.chunk_bytes, ctx.keep, ctx.backend = banned, chunk_bytes, keep, backend
        ctx.logits = kept if keep == LOGITS else None  # not saved: backward overwrites them
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("linear_logprob can be differentiated once, not twice (create_graph=True)")
        head, bias, rows, product, *others = ctx.saved_tensors
        row_values, hidden = others[:6], others[6:]
        kept, keep = product if ctx.logits is None else ctx.logits, ctx.keep
        if keep == LOGITS:  # this call destroys them: after retain_graph=True another one forms them again
            ctx.logits, ctx.keep = None, NOTHING
        needs_head, needs_bias, *_ = ctx.needs_input_grad
        needs = [any(ctx.needs_input_grad[9:]), needs_head, needs_bias]
        d_hidden, d_head, d_bias = torch.ops.diffpo_kernels.linear_logprob_backward.default(
            torch.zeros_like(row_values[1]) if by_logprob is None else by_logprob,
            by_entropy,
            kept,
            row_values,
            hidden,
            head,
            bias,
            ctx.banned,
            rows,
            needs,
            ctx.chunk_bytes,
            keep,
            ctx.backend,
        )
        by_source = d_hidden.split([source.shape[0] for source in hidden]) if needs[0] else [None] * len(hidden)
        return d_head if needs_head else None, d_bias if needs_bias else None, *[None] * 7, *by_source


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """The contract fixes the dtype of the products; torch.autocast would change it."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
