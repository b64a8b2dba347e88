"""skinny_linear: a few rows of hidden states times the LM head, bound by one reading of the head."""

import torch
from torch import Tensor

from diffpo_kernels import backends, validation
from diffpo_kernels.skinny_linear import compiled, reference

# Where the native kernel is the faster one, or as fast, on a CPU; see benchmarks/notes/kernels.md.
ROWS = range(3, 65)
LEAST_WEIGHTS = 1 << 22  # 16 MB: smaller ones stay in the cache, where laying them out anew costs torch little


def skinny_linear(hidden: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """Logits hidden @ weight.T of few rows, for inference.

    "native" sums in float32, over D in order. A row's logits do not depend, to the last bit, on the number of rows, on the other rows,
    on the number of threads or on strides; torch's matmul ("reference") promises none of it. NaN and inf spread as in a matmul.

    Args:
        hidden: [N, D] float32, bfloat16, float16 or float64; any strides. N = 0 gives an empty result.
        weight: [V, D], device of `hidden`, and its dtype but under torch.autocast, which casts both; rows may be strided.
        backend: None, "reference" or "native". None takes "native" where it is the faster one (CPU, float32, N in `ROWS`, at least
            `LEAST_WEIGHTS` entries of weight) and can be used (no gradient asked for, no autocast, contiguous columns of weight), and
            torch's matmul everywhere else.

    Returns:
        [N, V] in the dtype of `hidden` (under autocast, in autocast's), contiguous. Differentiable through torch's matmul only.

    Raises:
        TypeError, ValueError: an argument is wrong, for "native" also: another dtype than float32, or strided columns of weight.
        RuntimeError: the backend asked for cannot run here, or "native" was asked for where a gradient is wanted.
    """
    hidden, weight = validation.as_autocast(hidden, weight)
    validation.check_tensor("hidden", hidden, ("N", "D"), validation.ANY_FLOAT)
    validation.check_tensor("weight", weight, ("V", hidden.shape[1]), (hidden.dtype,), hidden.device)
    if backend is None and not _native_is_faster(hidden, weight):
        return reference.skinny_linear(hidden, weight)
    if backends.select("skinny_linear", hidden.device, backend) == "reference":
        return reference.skinny_linear(hidden, weight)
    _check_native(hidden, weight)
    return compiled.skinny_linear(hidden, weight)


def _native_is_faster(hidden: Tensor, weight: Tensor) -> bool:
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == torch.float32
        and ROWS.start <= hidden.shape[0] < ROWS.stop
        and weight.shape[0] * weight.shape[1] >= LEAST_WEIGHTS
        and weight.stride(1) == 1
        and not _wants_gradient(hidden, weight)
        and not torch.is_autocast_enabled("cpu")
    )


def _check_native(hidden: Tensor, weight: Tensor) -> None:
    if hidden.dtype != torch.float32:
        raise TypeError(f"hidden must have dtype torch.float32 for backend 'native', got {hidden.dtype}")
    if weight.stride(1) != 1:
        raise ValueError(
            f"weight must have contiguous columns for backend 'native', got strides {list(weight.stride())}: pass weight.contiguous()"
        )
    if _wants_gradient(hidden, weight):
        raise RuntimeError(
            "backend 'native' of skinny_linear has no gradient, and hidden or weight requires one: use torch.no_grad() or backend=None"
        )


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
