"""Bounds on numbers that are too large or too small to be computed: enough to tell them from an ordinary one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .nodes import Node

_ERROR = 1e-9  # relative, far above that of a float
_FARTHEST = 1e300  # bounds beyond are as good as none
_LOG_E, _LOG_2 = math.log10(math.e), math.log10(2)


class _UnknownError(Exception):
    """No simple bound is known."""


@dataclass(frozen=True)
class _Size:
    """low <= log10 |x| <= high, and the sign of x. Infinite: no bound, or zero."""

    sign: int
    low: float
    high: float


def certainly_differ(a: Node, b: Node) -> bool:
    """Whether bounds show that two numbers are not equal."""
    try:
        x, y = _size(a), _size(b)
    except (_UnknownError, OverflowError):
        return False
    return x.sign != y.sign or x.high < y.low or y.high < x.low


def _sized(sign: int, low: float, high: float) -> _Size:
    """With an allowance for rounding, within what floats can say."""
    low, high = low - _ERROR * (1 + abs(low)), high + _ERROR * (1 + abs(high))
    if not low <= high:
        raise _UnknownError("no number")
    return _Size(sign, min(low, _FARTHEST), high if high <= _FARTHEST else math.inf)


def _size(node: Node) -> _Size:
    if node.kind == "number":
        value = node.value
        if not value:
            return _Size(0, -math.inf, -math.inf)
        log = math.log10(abs(value.numerator)) - math.log10(value.denominator)
        return _sized(1 if value > 0 else -1, log, log)
    if node.kind in ("pi", "e"):
        log = math.log10(getattr(math, node.kind))
        return _sized(1, log, log)
    if node.kind not in _OPERATIONS:
        raise _UnknownError(node.kind)
    return _OPERATIONS[node.kind](*map(_size, node.args))


def _range(x: _Size) -> tuple[float, float]:
    """Bounds on a positive number itself."""
    if x.sign <= 0:
        raise _UnknownError("not positive")
    return (
        10.0 ** min(x.low, 300) if x.low > -300 else 0.0,
        math.inf if x.high > 300 else 10.0 ** max(x.high, -300),
    )


def _product(*factors: _Size) -> _Size:
    if not all(x.sign for x in factors):
        return _Size(0, -math.inf, -math.inf)
    return _sized(math.prod(x.sign for x in factors), sum(x.low for x in factors), sum(x.high for x in factors))


def _inverse(x: _Size) -> _Size:
    if not x.sign:
        raise _UnknownError("division by zero")
    return _sized(x.sign, -x.high, -x.low)


def _sum(*terms: _Size) -> _Size:
    """Terms of one sign; else those of one sign must be at least twice the others."""
    sides = [[x for x in terms if x.sign == sign] for sign in (1, -1)]
    sizes = [
        _sized(side[0].sign, max(x.low for x in side), max(x.high for x in side) + math.log10(len(side)))
        for side in sides
        if side
    ]
    if len(sizes) < 2:
        return sizes[0] if sizes else _Size(0, -math.inf, -math.inf)
    small, large = sorted(sizes, key=lambda x: x.high)
    if large.low < small.high + _LOG_2:
        raise _UnknownError("a difference")
    return _sized(large.sign, large.low - _LOG_2, large.high)


def _power(x: _Size, y: _Size) -> _Size:
    if x.sign <= 0:
        raise _UnknownError("a power of what is not positive")
    if not y.sign:
        return _sized(1, 0, 0)
    least, most = _range(_Size(1, y.low, y.high))
    logs = [y.sign * log * exponent for log in (x.low, x.high) for exponent in (least, most)]
    if any(map(math.isnan, logs)):
        raise _UnknownError("an interval without ends")
    return _sized(1, min(logs), max(logs))


def _factorial(n: _Size) -> _Size:
    """(n/e)^n <= n! <= n^n."""
    (least, most), low, high = _range(n), n.low, n.high
    if low < 0:
        raise _UnknownError("a small number")
    return _sized(1, max(least * (low - _LOG_E), 0), most * high)


def _binomial(n: _Size, k: _Size) -> _Size:
    """(n/k)^k <= C(n, k) <= (en/k)^k, from 1 to n."""
    (least, most), low, high = _range(k), n.low - k.high, n.high - k.low
    if k.low < 0.2 or low < 0:
        raise _UnknownError("not between 1 and n")
    return _sized(1, least * low, most * (high + _LOG_E))


_OPERATIONS: dict[str, Callable[..., _Size]] = {
    "+": _sum,
    "*": _product,
    "inverse": _inverse,
    "^": _power,
    "root": lambda x, n: _power(x, _inverse(n)),
    "!": _factorial,
    "binom": _binomial,
}
