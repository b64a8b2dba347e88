"""Argument checks shared by every operator.

Each error names the argument, what is allowed and what was given. A wrong type or dtype is a TypeError; a wrong shape, device or value
is a ValueError. Values inside tensors are looked at only where that is cheap: on the CPU and outside `torch.compile`, because on
another device it would make the host wait.
"""

import math
import operator
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (*HALF_OR_FLOAT, torch.float64)
_SMALLEST = torch.finfo(torch.float32).tiny


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Require a tensor with one of `dtypes`, on `device`, of `shape`: an int is an exact size, a string names a free one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {value.dtype}")
    fits = value.shape == shape or (
        value.dim() == len(shape)
        and all(isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True))
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the first argument, got {value.device}")


def as_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands of a matrix product as torch.nn.functional.linear takes them under torch.autocast: those of different dtypes in autocast's.

    Equal dtypes, and float64, which autocast never casts, are left alone; what then still differs is for `check_tensor` to refuse.
    """
    if not all(isinstance(operand, Tensor) and operand.is_floating_point() for operand in operands):
        return operands
    device_type = operands[0].device.type
    if len({operand.dtype for operand in operands}) == 1 or not torch.amp.is_autocast_available(device_type):
        return operands
    if not torch.is_autocast_enabled(device_type):
        return operands
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(operand if operand.dtype == torch.float64 else operand.to(dtype) for operand in operands)


def check_number(name: str, value: object, minimum: float, *, above: bool = False, finite: bool = False) -> float:
    """Require a real number of at least `minimum`, or strictly above it. NaN is never allowed, inf unless `finite`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    number = float(value)
    inside = number > minimum if above else number >= minimum  # False for NaN
    if not inside or (finite and number == math.inf):
        raise ValueError(f"{name} must be {_bounds(minimum, above, finite)}, got {number}")
    return number


def check_int(name: str, value: object) -> None:
    """Require a Python int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_row_values(
    name: str,
    value: float | Tensor,
    rows: int,
    device: torch.device,
    minimum: float,
    *,
    above: bool = False,
    finite: bool = False,
) -> float | Tensor:
    """Require one number for all rows, or a float tensor [rows] with one per row; the same bounds as `check_number`.

    Returns it with a positive number below 2^-126, the smallest normal float32, raised to that: float32 must not round it to 0.
    """
    if not isinstance(value, Tensor):
        number = check_number(name, value, minimum, above=above, finite=finite)
        return _SMALLEST if 0 < number < _SMALLEST else number
    check_tensor(name, value, (rows,), ANY_FLOAT, device)
    if values_are_cheap(value):
        good = value > minimum if above else value >= minimum
        if finite:
            good &= value < math.inf
        if not bool(good.all()):
            raise ValueError(
                f"{name} must be {_bounds(minimum, above, finite)} in every row, got {value[~good][0].item()}"
            )
    if value.dtype == torch.float64:
        return torch.where(value > 0, value.clamp(min=_SMALLEST), value)
    return value


def _bounds(minimum: float, above: bool, finite: bool) -> str:
    return f"a {'finite ' if finite else ''}number {'>' if above else '>='} {minimum:g}"


def check_index_range(name: str, index: Tensor, size: int) -> None:
    """Require every entry of `index` to lie in [0, size), where looking is cheap."""
    if not values_are_cheap(index) or index.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie in [0, {size}), got values from {low} to {high}")


def check_token_ids(name: str, ids: Sequence[int] | None, vocabulary: int) -> tuple[int, ...]:
    """Return `ids` sorted and without duplicates; they must lie in [0, vocabulary) and leave at least one other token."""
    if ids is None:
        return ()
    try:
        unique = tuple(sorted({operator.index(i) for i in ids}))
    except TypeError as error:
        raise TypeError(f"{name} must be a sequence of ints or None, got {ids!r}") from error
    if unique and (unique[0] < 0 or unique[-1] >= vocabulary):
        raise ValueError(f"{name} must lie in [0, {vocabulary}), got values from {unique[0]} to {unique[-1]}")
    if len(unique) >= vocabulary:
        raise ValueError(f"{name} must leave at least one of the {vocabulary} tokens, got all of them")
    return unique


def values_are_cheap(tensor: Tensor) -> bool:
    """True where reading a tensor's values neither waits for a device nor breaks a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def as_row_tensor(value: float | Tensor, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One number per row, [rows]: a scalar is repeated, a tensor is cast."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    # A product and not torch.full, for which torch.compile would make one graph per value.
    return torch.ones(rows, dtype=dtype, device=device) * value
