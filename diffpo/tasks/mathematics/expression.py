"""Expressions: from plain LaTeX to a tree. What is not understood is refused, never guessed."""

from __future__ import annotations

import re
from fractions import Fraction

from .nodes import Node, UnreadableError, number, symbol

MAX_DEPTH = 40
_MAX_DIGITS = 2_000
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth ln log lg exp cis".split()  # noqa: SIM905
)
_INVERSE = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
_NAMES = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "omicron",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
        "ell",
        "hbar",
    ]
)
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+|\\[a-zA-Z]+|\\.|[^\s])", re.DOTALL)
_REPEATED = re.compile(r"(\d*)\.(\d*?)(\d+?)\3+(\d*)$")


def parse(text: str) -> Node:
    """The tree of an expression in plain LaTeX. UnreadableError if any of it is not understood."""
    parser = _Parser(text)
    node = parser.sum(0)
    if parser.peek() is not None:
        raise UnreadableError(text)
    return node


class _Parser:
    """Recursive descent; every method takes the depth of nesting and returns a node."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.in_bars = text, 0, False

    def peek(self) -> str | None:
        match = _TOKEN.match(self.text, self.at)
        return match[1] if match else None

    def take(self) -> str:
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise UnreadableError("ends too early")
        self.at = match.end()
        return match[1]

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise UnreadableError(f"needs {token}")

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        terms, negative = [], False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        while True:
            term = self.product(depth)
            terms.append(Node("*", (number(-1), term)) if negative else term)
            if self.peek() not in ("+", "-"):
                node = terms[0] if len(terms) == 1 else Node("+", tuple(terms))
                return self._remainder(node, depth)
            negative = False
            while self.peek() in ("+", "-"):
                negative ^= self.take() == "-"

    def _remainder(self, node: Node, depth: int) -> Node:
        if self.peek() not in (r"\bmod", r"\mod"):
            return node
        self.take()
        return Node("mod", (node, self.product(depth)))

    def product(self, depth: int) -> Node:
        factors = [self.power(depth)]
        while (token := self.peek()) is not None:
            if token in ("*", r"\cdot", "/"):
                self.take()
                negative = False
                while self.peek() in ("+", "-"):
                    negative ^= self.take() == "-"
                factor = self.power(depth)
                factors.append(Node("inverse", (factor,)) if token == "/" else factor)
                if negative:
                    factors.append(number(-1))
            elif self._starts_factor(token):
                if _is_number(token) and factors[-1].kind in ("number", "^"):  # "2 3" is no product
                    raise UnreadableError("two numbers in a row")
                factors.append(self.power(depth))
            else:
                break
        return factors[0] if len(factors) == 1 else Node("*", tuple(factors))

    def _starts_factor(self, token: str) -> bool:
        if token.startswith("\\"):
            name = token[1:]
            return (
                name in FUNCTIONS or name in _NAMES or token in (r"\frac", r"\sqrt", r"\pi", r"\binom", r"\overline", r"\bar", r"\dot")
                or token in (r"\lfloor", r"\lceil", r"\vec", r"\hat")
            )  # fmt: skip
        return _is_number(token) or token.isalnum() or token in "({[" or (token == "|" and not self.in_bars)

    def power(self, depth: int) -> Node:
        node = self.atom(depth)
        while (token := self.peek()) in ("^", "!", "%", "'"):
            self.take()
            if token == "!":
                if self.peek() == "!":
                    raise UnreadableError("double factorial")
                node = Node("!", (node,))
            elif token == "%":
                node = Node("%", (node,))
            elif token == "'":
                if node.kind != "symbol":
                    raise UnreadableError("prime")
                node = symbol(node.name + "'")
            elif self.peek() == r"\circ":
                self.take()
                node = Node("deg", (node,))
            else:
                node = Node("^", (node, self.exponent(depth)))
        return node

    def exponent(self, depth: int) -> Node:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        node = self.atom(depth + 1, mixed=False)
        if self.peek() == "^":  # 9^9^9 is 9^(9^9)
            self.take()
            node = Node("^", (node, self.exponent(depth + 1)))
        return node if sign > 0 else Node("*", (number(-1), node))

    def atom(self, depth: int, mixed: bool = True) -> Node:
        if depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        token = self.take()
        if _is_number(token):
            return self._number(token, mixed)
        if token in _CLOSING:
            return self._group(token, depth)
        if token.isalpha() and token.isascii():
            return self._symbol(token)
        if token.startswith("\\"):
            return self._command(token[1:], depth)
        raise UnreadableError(token)

    def _group(self, token: str, depth: int) -> Node:
        if token == r"\{" or (token == "|" and self.in_bars):
            raise UnreadableError("a set, or bars within bars")
        outer, self.in_bars = self.in_bars, token == "|"
        node = self.sum(depth + 1)
        self.expect(_CLOSING[token])
        self.in_bars = outer
        kind = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}.get(token)
        return Node(kind, (node,)) if kind else node

    def _number(self, token: str, mixed: bool) -> Node:
        if len(token) > _MAX_DIGITS:
            raise UnreadableError("too many digits")
        repeating = self._repeating(token)
        if repeating is not None:
            return repeating
        value = Fraction(token.removesuffix("."))
        if mixed and "." not in token and (part := _MIXED.match(self.text, self.at)):
            numerator, denominator = (int(group) for group in part.groups() if group)
            if 0 < numerator < denominator:
                self.at = part.end()
                return number(value + Fraction(numerator, denominator))
        return number(value)

    def _repeating(self, token: str) -> Node | None:
        """0.1\\overline{36}, 0.\\dot{1}2\\dot{3}, 0.(36), 0.333\\ldots; None if the number does not repeat."""
        if "." not in token:
            return None
        whole, _, fixed = token.partition(".")
        for pattern in (_OVERLINE, _DOTS, _PERIOD):
            if match := pattern.match(self.text, self.at):
                block = "".join(group for group in match.groups() if group)
                self.at = match.end()
                break
        else:
            if not (dots := _LDOTS.match(self.text, self.at)):
                return None
            match = _REPEATED.match(token)
            if not match or not match[3].startswith(match[4]):
                raise UnreadableError("decimals that go on, nobody knows how")
            self.at = dots.end()
            whole, fixed, block = match[1], match[2], match[3]
        if dots := _LDOTS.match(self.text, self.at):
            self.at = dots.end()
        value = Fraction(int(whole or "0")) + Fraction(int(fixed or "0"), 10 ** len(fixed))
        return number(value + Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(fixed)))

    def _symbol(self, name: str) -> Node:
        if name in ("e", "i") and self.peek() != "_":
            return Node(name)
        if self.peek() == "_":
            self.take()
            name += "_" + self._subscript()
        return symbol(name)

    def _subscript(self) -> str:
        if self.peek() != "{":
            return self.take()
        self.take()
        parts = []
        while (token := self.take()) != "}":
            if not token.isalnum():
                raise UnreadableError("subscript")
            parts.append(token)
        return "".join(parts)

    def _command(self, name: str, depth: int) -> Node:
        if name == "pi":
            return Node("pi")
        if name in _NAMES:
            return self._symbol("\\" + name)
        if name == "frac":
            return Node("*", (self.argument(depth), Node("inverse", (self.argument(depth),))))
        if name == "binom":
            return Node("binom", (self.argument(depth), self.argument(depth)))
        if name == "sqrt":
            return self._root(depth)
        if name in ("overline", "bar", "vec", "hat"):
            node = self.argument(depth)
            if node.kind != "symbol" or name in ("overline", "bar"):
                raise UnreadableError(name)
            return symbol(f"\\{name} {node.name}")
        if name in FUNCTIONS:
            return self._function(name, depth)
        raise UnreadableError(name)

    def argument(self, depth: int) -> Node:
        """What TeX takes as an argument: a group, a command or a single digit or letter."""
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise UnreadableError("ends too early")
        if _is_number(match[1]) and match[1][0] != ".":
            self.at = match.start(1) + 1
            return number(int(match[1][0]))
        return self.atom(depth + 1)

    def _root(self, depth: int) -> Node:
        index = number(2)
        if self.peek() == "[":
            self.take()
            index = self.sum(depth + 1)
            self.expect("]")
        token = self.peek()
        radicand = self.atom(depth + 1, mixed=False) if token and _is_number(token) else self.argument(depth)
        return Node("root", (radicand, index))

    def _function(self, name: str, depth: int) -> Node:
        power, base = None, None
        while self.peek() in ("^", "_"):
            if self.take() == "_":
                if name != "log" or base is not None:
                    raise UnreadableError("subscript of a function")
                base = self._base_of_log(depth)
            elif power is None:
                power = self.exponent_of_function(depth)
            else:
                raise UnreadableError("two exponents")
        if _is_minus_one(power):
            name, power = _INVERSE.get(name) or _unreadable(name), None
        args = (self._function_argument(depth),) + ((base,) if base is not None else ())
        node = Node(name, args)
        return node if power is None else Node("^", (node, power))

    def _base_of_log(self, depth: int) -> Node:
        token = self.peek()
        if token and token[0].isdigit():  # \log_10 100 as a model writes it
            return number(Fraction(self.take()))
        return self.argument(depth)

    def exponent_of_function(self, depth: int) -> Node:
        if self.peek() == "-":
            self.take()
            return Node("*", (number(-1), self.argument(depth)))
        return self.argument(depth)

    def _function_argument(self, depth: int) -> Node:
        token = self.peek()
        if token in ("(", "{", "[", "|"):
            node = self.atom(depth + 1)
            if degrees := _DEGREES.match(self.text, self.at):
                self.at, node = degrees.end(), Node("deg", (node,))
            return node
        sign = -1 if token == "-" and self.take() else 1
        factors = [self.power(depth + 1)]
        while (token := self.peek()) is not None and token not in ("(", "[", "/") and self._starts_factor(token):
            if token[1:] in FUNCTIONS or token[0].isdigit():
                break
            factors.append(self.power(depth + 1))
        if self.peek() == "/":  # \sin \pi/3; but \ln 2/3 is (\ln 2)/3
            saved = self.at
            self.take()
            token = self.peek()
            if token and token[0].isdigit() and any(node.kind == "pi" for node in factors):
                factors.append(Node("inverse", (self.power(depth + 1),)))
            else:
                self.at = saved
        node = factors[0] if len(factors) == 1 else Node("*", tuple(factors))
        return node if sign > 0 else Node("*", (number(-1), node))


def _is_number(token: str) -> bool:
    return (token.isascii() and token[0].isdigit()) or (token[0] == "." and len(token) > 1)


def _is_minus_one(node: Node | None) -> bool:
    return node is not None and node.kind == "*" and node.args == (number(-1), number(1))


def _unreadable(name: str) -> str:
    raise UnreadableError(f"inverse of {name}")


_MIXED = re.compile(
    r"\s*(?:\\frac\s*(?:(\d)|\{\s*(\d+)\s*\})\s*(?:(\d)|\{\s*(\d+)\s*\})|(?<=\s)(\d+)\s*/\s*(\d+)(?![\d.]))"
)
_OVERLINE = re.compile(r"\s*\\(?:overline|bar|overbar)\s*(?:\{\s*(\d+)\s*\}|(\d))")
_DOTS = re.compile(r"\s*\\dot\s*\{?(\d)\}?(?:(\d*)\s*\\dot\s*\{?(\d)\}?)?")
_PERIOD = re.compile(r"\((\d+)\)")
_DEGREES = re.compile(r"\s*\^\s*\\circ")
_LDOTS = re.compile(r"\s*\\ldots")
