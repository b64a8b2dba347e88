"""Counter-based randomness: a number depends on its key alone, never on batch layout, call order or world size."""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the increment of splitmix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def uniform(*key: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1), fp32, one per element of the broadcast key parts (ints or int64 tensors).

    A chain of splitmix64 finalisers (Steele, Lea, Flood 2014) over the key; multiplication wraps modulo 2^64.
    """
    # the top 23 bits, centred in their cell: exact in fp32, and never 0 or 1
    return (_shift_right(hashed(*key), 41).float() + 0.5) * 2.0**-23


def hashed(*key: int | Tensor) -> Tensor:
    """64 pseudo-random bits, int64, for each element of the broadcast key parts (ints or int64 tensors)."""
    state = torch.zeros((), dtype=torch.int64)
    for part in key:  # numbers are no tensors of a device: nothing is copied to it
        state = _mix(state + _mix(torch.as_tensor(part, dtype=torch.int64) + _GOLDEN) + _GOLDEN)
    return state


def derive(*key: int) -> int:
    """A 63-bit seed for another generator (numpy, torch) out of a key."""
    return int(_shift_right(hashed(*key), 1).item())


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
