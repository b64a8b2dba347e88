"""What expressions are worth: exactly where they are rational, else to as many digits as it takes to tell two of them apart."""

from __future__ import annotations

import math
import os
import random
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

from .nodes import Node, minus, number, substituted, symbol

MAX_BITS = 2**17  # of an exact number: 39,456 digits
MAX_WORK = 500_000  # about microseconds
_MAX_FACTORIAL = 10_000
_MAX_MODULUS, _MAX_EXPONENT_BITS = 2**256, 4096
_MAX_EXPONENT = 10**6  # of e, as a number
_DIGITS = (40, 120, 500, 1500)  # precisions at which a difference is looked at
_POINT_DIGITS = _DIGITS[:3]
_POINTS = 18

_context = MPContext()  # of our own: mpmath's global one belongs to whoever else uses it
_work = threading.local()
_lock = threading.Lock()  # a context has one precision at a time
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class UndefinedError(ArithmeticError):
    """No number: a division by zero, a logarithm of zero."""


class TooLargeError(ArithmeticError):
    """Beyond what is computed here."""


def start_work() -> None:
    """Allow MAX_WORK from here on, in this thread. What is spent is counted, not timed: the same answers get the same verdicts."""
    _work.left = MAX_WORK


def _spend(value: Any) -> None:
    if isinstance(value, Fraction):
        cost = 1 + ((value.numerator.bit_length() + value.denominator.bit_length()) / 1300) ** 2
    else:
        cost = 5 + (_context.dps / 40) ** 2
    _work.left = getattr(_work, "left", MAX_WORK) - cost
    if _work.left < 0:
        raise TooLargeError("too much work")


def equal_numbers(a: Node, b: Node) -> bool:
    """Whether two expressions without symbols are the same complex number. UndefinedError, TooLargeError.

    A difference that is the same at two precisions is none of rounding: the numbers differ. Below 10^-1500 nobody looks.
    """
    with _lock:
        return _is_zero_difference(a, b, {}, _DIGITS)


def equal_functions(a: Node, b: Node) -> bool | None:
    """Whether two expressions are the same function of their symbols; None where too few points are in both domains.

    Compared at fixed points: rational, of both signs, then whole. Where nothing is imaginary by its looks, a point counts only if all is real
    there, so that 2 log x equals log x^2. TooLargeError.
    """
    symbols = sorted(a.symbols() | b.symbols())
    with _lock:
        _work.real = not {"i", "cis"} & (a.kinds() | b.kinds())
        try:
            agreed = 0
            for trial in range(_POINTS):
                at = {name: _point(name, trial) for name in symbols}
                try:
                    if not _is_zero_difference(a, b, at, _POINT_DIGITS):
                        return False
                except UndefinedError:
                    continue
                agreed += 1
        finally:
            _work.real = False
    return True if agreed >= 2 else None


def constant_ratio(a: Node, b: Node, positive: bool = False) -> bool | None:
    """Whether a = c b for one number c other than 0 (or above it): whether a = 0 and b = 0 (a > 0 and b > 0) say the same, up to a factor."""
    anchor = {
        name: number(Fraction(random.Random(f"anchor/{name}").randint(200, 997), 499))
        for name in a.symbols() | b.symbols()
    }
    a_there, b_there = substituted(a, anchor), substituted(b, anchor)
    try:
        if equal_numbers(a_there, _ZERO) or equal_numbers(b_there, _ZERO):
            return None
        if positive and sign(Node("*", (a_there, b_there))) < 0:
            return False
    except UndefinedError:
        return None
    return equal_functions(Node("*", (a, b_there)), Node("*", (b, a_there)))


def linear_root(node: Node) -> tuple[Node, int] | None:
    """(root, sign of the slope) of an expression that is linear in its only symbol; None if it is not."""
    (name,) = node.symbols()
    at_zero, at_one = (substituted(node, {name: number(k)}) for k in (0, 1))
    slope = minus(at_one, at_zero)
    line = Node("+", (at_zero, Node("*", (slope, symbol(name)))))
    try:
        direction = sign(slope)
        if not direction or not equal_functions(node, line):
            return None
    except UndefinedError:
        return None
    return Node("*", (number(-1), at_zero, Node("inverse", (slope,)))), direction


def sign(node: Node) -> int:
    """-1, 0 or 1 for a real number. UndefinedError if it is not real."""
    with _lock:
        if _is_zero_difference(node, _ZERO, {}, _DIGITS):
            return 0
        value = _at_precision(node, {}, 60)
        if not _looks_real(value):
            raise UndefinedError("not real")
        return 1 if (value.real if hasattr(value, "real") else value) > 0 else -1


def exact(node: Node) -> Fraction | None:
    """The number if it is rational by rational arithmetic alone, else None. UndefinedError, TooLargeError."""
    with _lock:
        value = _at_precision(node, {}, 30)
    return value if isinstance(value, Fraction) else None


_ZERO = number(0)


def _point(name: str, trial: int) -> Fraction:
    rng = random.Random(f"{trial}/{name}")
    if trial >= _POINTS - 4:
        return Fraction(rng.randint(1, 9) + trial)
    scale = (1, 1, 1, 4, Fraction(1, 3), 30)[trial % 6]
    return Fraction(rng.randint(200, 997), 499) * scale * (-1 if trial % 4 in (1, 2) and rng.random() < 0.75 else 1)


def _is_zero_difference(a: Node, b: Node, at: Mapping[str, Fraction], precisions: tuple[int, ...]) -> bool:
    before = None
    for digits in precisions:
        x, y = _at_precision(a, at, digits), _at_precision(b, at, digits)
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x == y
        _context.dps = digits
        difference = _inexact(x) - _inexact(y)
        if before is not None:
            if difference and abs(difference - before) <= abs(difference) * _context.mpf("1e-6"):
                return False
            noise = abs(before) * _context.mpf(10) ** (-digits // 3)
            noise = max(noise, max(abs(_inexact(x)), abs(_inexact(y))) * _context.mpf(10) ** (-digits * 9 // 10))
            shrinks = abs(difference) <= noise
        before = difference
    if not shrinks:
        raise TooLargeError("more digits cancel than are computed")
    return True


def _looks_real(value: Any) -> bool:
    return isinstance(value, Fraction | _context.mpf) or abs(value.imag) <= abs(value) * _context.mpf("1e-25")


def _at_precision(node: Node, at: Mapping[str, Fraction], digits: int) -> Any:
    _context.dps = digits
    value = _value(node, at)
    if not isinstance(value, Fraction) and not _context.isfinite(value):
        raise UndefinedError(node.kind)
    return value


def _inexact(value: Any) -> Any:
    return _context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _bounded(value: Any) -> Any:
    _spend(value)
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise TooLargeError
    elif getattr(_work, "real", False) and not _looks_real(value):
        raise UndefinedError("not real")
    elif value and abs(_context.mag(value)) > 4 * MAX_BITS:
        raise TooLargeError("a number of too many digits")
    return value


def _value(node: Node, at: Mapping[str, Fraction]) -> Any:
    if node.kind == "number":
        return node.value
    if node.kind == "symbol":
        return at[node.name]
    if node.kind in _CONSTANTS:
        return _CONSTANTS[node.kind]()
    if node.kind == "mod":
        modulus = _whole(_value(node.args[1], at))
        if not 0 < modulus < _MAX_MODULUS:
            raise UndefinedError("a modulus that is not positive, or absurdly large")
        return Fraction(_residue(node.args[0], modulus, at))
    args = [_value(arg, at) for arg in node.args]
    if node.kind in ("+", "*"):
        total = args[0]
        for arg in args[1:]:
            if isinstance(total, Fraction) != isinstance(arg, Fraction):
                if node.kind == "*" and 0 in (total, arg):
                    total = Fraction(0)
                    continue
                total, arg = _inexact(total), _inexact(arg)
            total = _bounded(total + arg if node.kind == "+" else total * arg)
        return total
    return _bounded(_OPERATIONS[node.kind](*args))


def _residue(node: Node, modulus: int, at: Mapping[str, Fraction]) -> int:
    """Of sums, products and powers too, whose value may be far too large."""
    if node.kind in ("+", "*") and "inverse" not in node.kinds():
        residues = [_residue(arg, modulus, at) for arg in node.args]
        return (sum(residues) if node.kind == "+" else math.prod(residues)) % modulus
    if node.kind == "^":
        exponent = _whole(_value(node.args[1], at))
        if exponent >= 0 and exponent.bit_length() <= _MAX_EXPONENT_BITS:
            return pow(_residue(node.args[0], modulus, at), exponent, modulus)
    return _whole(_value(node, at)) % modulus


def _inverse(x: Any) -> Any:
    if not x:
        raise UndefinedError("division by zero")
    return 1 / x


def _power(x: Any, y: Any) -> Any:
    if isinstance(y, Fraction) and isinstance(x, Fraction):
        if y.denominator == 1:
            return _whole_power(x, int(y))
        if x < 0 and y.denominator % 2:  # the real root, as schools have it
            root = _power(-x, y)
            return root if y.numerator % 2 == 0 else -root
        root = _exact_root(x, y.denominator) if x >= 0 and y.denominator < 64 else None
        if root is not None:
            return _whole_power(root, y.numerator)
    if not x:
        if isinstance(y, Fraction | _context.mpf) and y > 0:
            return Fraction(0)
        raise UndefinedError("zero to a power that is not positive")
    x, y = _inexact(x), _inexact(y)
    if abs(_context.mag(x)) * abs(y) > 8 * MAX_BITS or abs(y) * 8 > 2**40:
        raise TooLargeError
    return _context.power(x, y)


def _whole_power(x: Fraction, n: int) -> Fraction:
    if x in (0, 1, -1):
        if x == 0 and n < 0:
            raise UndefinedError("division by zero")
        return Fraction(1) if n % 2 == 0 and (x or n == 0) else x
    if abs(n) * max(x.numerator.bit_length(), x.denominator.bit_length()) > 2 * MAX_BITS:
        raise TooLargeError
    return x**n


def _exact_root(x: Fraction, n: int) -> Fraction | None:
    parts = []
    for part in (x.numerator, x.denominator):
        root = math.isqrt(part) if n == 2 else _whole_root(part, n)
        if root**n != part:
            return None
        parts.append(root)
    return Fraction(*parts)


def _whole_root(x: int, n: int) -> int:
    if x < 2:
        return x
    root = 1 << -(-x.bit_length() // n)  # from above, by Newton
    while (smaller := ((n - 1) * root + x // root ** (n - 1)) // n) < root:
        root = smaller
    return root


def _root(x: Any, n: Any) -> Any:
    if not isinstance(n, Fraction) or n.denominator != 1 or not 0 < n < 10**4:
        return _power(x, _inverse(n))
    if not isinstance(x, Fraction):
        if isinstance(x, _context.mpf) and x < 0 and n % 2:
            return -_power(-x, 1 / n)
        return _power(x, 1 / n)
    if x < 0:
        return -_root(-x, n) if n % 2 else _context.mpc(0, 1) * _inexact(_root(-x, n)) if n == 2 else _power(x, 1 / n)
    return _power(x, 1 / n)


def _factorial(x: Any) -> Fraction:
    n = _whole(x)
    if n < 0:
        raise UndefinedError("factorial of a negative number")
    if n > _MAX_FACTORIAL:
        raise TooLargeError
    return Fraction(math.factorial(n))


def _binomial(x: Any, y: Any) -> Fraction:
    n, k = _whole(x), _whole(y)
    if n < 0 or k < 0:
        raise UndefinedError("binomial of a negative number")
    if min(k, n - k) * n.bit_length() > MAX_BITS:
        raise TooLargeError
    return Fraction(math.comb(n, k))


def _whole(x: Any) -> int:
    if not isinstance(x, Fraction) or x.denominator != 1:
        raise UndefinedError("needs a whole number")
    return int(x)


def _floor(x: Any) -> Fraction:
    if isinstance(x, Fraction):
        return Fraction(math.floor(x))
    if not _looks_real(x):
        raise UndefinedError("floor of a complex number")
    x = x.real
    nearest = _context.nint(x)
    if abs(x - nearest) < _context.mpf(10) ** (-_context.dps // 2):  # a whole number, but for rounding
        return Fraction(int(nearest))
    return Fraction(int(_context.floor(x)))


def _function(name: str) -> Callable[[Any], Any]:
    compute = getattr(_context, name)

    def apply(x: Any) -> Any:
        if isinstance(x, Fraction) and not x and name in ("sin", "tan", "sinh", "tanh", "asin", "atan"):
            return Fraction(0)
        x = _inexact(x)
        if _context.mag(x) > 4000 or (name in ("exp", "sinh", "cosh") and abs(x) > _MAX_EXPONENT):
            raise TooLargeError
        if isinstance(x, _context.mpc) and abs(x.imag) > _MAX_EXPONENT:
            raise TooLargeError
        try:
            value = compute(x)
        except (ValueError, ZeroDivisionError):
            raise UndefinedError(name) from None
        if name in _POLES and abs(value) > _context.mpf(10) ** (_context.dps // 2):
            raise UndefinedError(name)  # tan 90 degrees, but for rounding
        return value

    return apply


_POLES = ("tan", "cot", "sec", "csc")


def _logarithm(x: Any, base: Any = None) -> Any:
    if not x:
        raise UndefinedError("logarithm of zero")
    if base is None:
        base = Fraction(10)
    if not base or base == 1:
        raise UndefinedError("base of a logarithm")
    return _context.log(_inexact(x)) / _context.log(_inexact(base))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "pi": lambda: +_context.pi,
    "e": lambda: +_context.e,
    "i": lambda: _context.mpc(0, 1),
}
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "inverse": _inverse,
    "^": _power,
    "root": _root,
    "!": _factorial,
    "%": lambda x: x / 100,
    "deg": lambda x: _inexact(x) * _context.pi / 180,
    "abs": abs,
    "floor": _floor,
    "ceil": lambda x: -_floor(-x),
    "binom": _binomial,
    "log": _logarithm,
    "lg": _logarithm,
    "cis": lambda x: _context.mpc(_function("cos")(x), _inexact(_function("sin")(x))),
    "ln": lambda x: _logarithm(x, +_context.e),
    **{
        name: _function(name)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp")
    },
    **{f"arc{name}": _function(f"a{name}") for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
}
