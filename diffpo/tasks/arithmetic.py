"""Exact value of an arithmetic expression written by a model, that is, by nobody we trust."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 256  # characters
MAX_DEPTH = 32  # nested parentheses
MAX_BITS = 4096  # of a power

# A number has at most 9 digits and no leading zero; any other character becomes a token that no rule accepts.
_INTEGER = re.compile(r"0|[1-9][0-9]{0,8}|\S")
_DECIMAL = re.compile(r"(?:[0-9]{1,40}(?![0-9]))(?:\.[0-9]{1,40})?|\.[0-9]{1,40}|\S")


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Value of an expression of integers, + - * /, unary signs and parentheses, and the integers in it, in order.

    Precedence and associativity are Python's, division is exact. Time and memory are bounded by `MAX_LENGTH` and
    `MAX_DEPTH`: without powers, a value has hardly more digits than the text.
    ValueError if the text is no such expression or too long or deep, ZeroDivisionError for a division by zero.
    """
    value, numbers = _parsed(expression, _INTEGER, powers=False)
    return value, [int(number) for number in numbers]


def evaluate_decimal(expression: str) -> Fraction:
    """Value of an expression as `evaluate` reads it, of decimals such as 1.5 or .5 and with powers `^` to integers.

    ValueError and ZeroDivisionError as there; also ValueError for a power of more than `MAX_BITS` bits.
    """
    return _parsed(expression, _DECIMAL, powers=True)[0]


def last_place(value: Fraction) -> Fraction | None:
    """The unit of a number's last decimal digit, 1 of a whole number; None if its digits never end."""
    rest, digits = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        digits = max(digits, count)
    return Fraction(1, 10**digits) if rest == 1 else None


def _parsed(expression: str, token: re.Pattern, powers: bool) -> tuple[Fraction, list[Fraction]]:
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"expression of {len(expression)} characters, at most {MAX_LENGTH} are read")
    parser = _Parser(token.findall(expression), powers)
    value = parser.sum(depth=0)
    if parser.tokens:
        raise ValueError(f"unexpected {parser.tokens[-1]!r}")
    return value, parser.numbers


class _Parser:
    """Recursive descent over the grammar

    sum = product {("+" | "-") product}
    product = power {("*" | "/") power}
    power = {"+" | "-"} atom ["^" power]
    atom = number | "(" sum ")"
    """

    def __init__(self, tokens: list[str], powers: bool) -> None:
        self.tokens = tokens[::-1]  # the next token is the last
        self.powers = powers
        self.numbers: list[Fraction] = []

    def next_is(self, choices: str) -> bool:
        return bool(self.tokens) and self.tokens[-1] in choices

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next_is("+-"):
            sign = self.tokens.pop()
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.power(depth)
        while self.next_is("*/"):
            sign = self.tokens.pop()
            factor = self.power(depth)
            value = value * factor if sign == "*" else value / factor
        return value

    def power(self, depth: int) -> Fraction:
        negative = False
        while self.next_is("+-"):
            negative ^= self.tokens.pop() == "-"
        value = self.atom(depth)
        if self.powers and self.next_is("^") and depth < MAX_DEPTH:
            self.tokens.pop()
            value = _power(value, self.power(depth + 1))
        return -value if negative else value

    def atom(self, depth: int) -> Fraction:
        token = self.tokens.pop() if self.tokens else "end of expression"
        if token == "(" and depth < MAX_DEPTH:
            value = self.sum(depth + 1)
            if not self.next_is(")"):
                raise ValueError("missing ')'")
            self.tokens.pop()
            return value
        if token[0] in ".0123456789" and token != ".":
            self.numbers.append(Fraction(token))
            return self.numbers[-1]
        raise ValueError(f"unexpected {token!r}")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) * size > MAX_BITS:
        raise ValueError(f"a power must have an integer exponent and at most {MAX_BITS} bits")
    return base**exponent.numerator
