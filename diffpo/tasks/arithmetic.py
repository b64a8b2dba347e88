"""Exact value of an arithmetic expression written by a model, that is, by nobody we trust."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 256  # characters
MAX_DEPTH = 32  # nested parentheses

# A number has at most 9 digits and no leading zero; any other character becomes a token that no rule accepts.
_TOKEN = re.compile(r"0|[1-9][0-9]{0,8}|\S")


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Value of an expression of integers, + - * /, unary signs and parentheses, and the integers in it, in order.

    Precedence and associativity are Python's, division is exact. Time and memory are bounded by `MAX_LENGTH` and
    `MAX_DEPTH`: without powers, a value has hardly more digits than the text.
    ValueError if the text is no such expression or too long or deep, ZeroDivisionError for a division by zero.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"expression of {len(expression)} characters, at most {MAX_LENGTH} are read")
    parser = _Parser(_TOKEN.findall(expression))
    value = parser.sum(depth=0)
    if parser.tokens:
        raise ValueError(f"unexpected {parser.tokens[-1]!r}")
    return value, parser.numbers


class _Parser:
    """Recursive descent over the grammar

    sum = product {("+" | "-") product}
    product = atom {("*" | "/") atom}
    atom = {"+" | "-"} (number | "(" sum ")")
    """

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens[::-1]  # the next token is the last
        self.numbers: list[int] = []

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
        value = self.atom(depth)
        while self.next_is("*/"):
            sign = self.tokens.pop()
            factor = self.atom(depth)
            value = value * factor if sign == "*" else value / factor
        return value

    def atom(self, depth: int) -> Fraction:
        negative = False
        while self.next_is("+-"):
            negative ^= self.tokens.pop() == "-"
        token = self.tokens.pop() if self.tokens else "end of expression"
        if token == "(" and depth < MAX_DEPTH:
            value = self.sum(depth + 1)
            if not self.next_is(")"):
                raise ValueError("missing ')'")
            self.tokens.pop()
        elif token[0] in "0123456789":
            self.numbers.append(int(token))
            value = Fraction(int(token))
        else:
            raise ValueError(f"unexpected {token!r}")
        return -value if negative else value
