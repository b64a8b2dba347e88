"""Trees of expressions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


class UnreadableError(Exception):
    """Not an expression that this module knows."""


@dataclass(frozen=True)
class Node:
    """kind: "number" (value), "symbol" (name) or a constant (pi, e, i), or an operation on args: + * inverse ^ root ! deg % mod abs floor
    ceil binom, or a function.
    """

    kind: str
    args: tuple[Node, ...] = ()
    value: Fraction | str | None = None

    def symbols(self) -> frozenset[str]:
        if self.kind == "symbol":
            return frozenset([self.value])
        return frozenset().union(*(arg.symbols() for arg in self.args))

    def kinds(self) -> frozenset[str]:
        return frozenset([self.kind]).union(*(arg.kinds() for arg in self.args))


def number(value: int | Fraction) -> Node:
    return Node("number", value=Fraction(value))


def minus(a: Node, b: Node) -> Node:
    return Node("+", (a, Node("*", (number(-1), b))))


def substituted(node: Node, at: Mapping[str, Node]) -> Node:
    """With expressions for its symbols."""
    if node.kind == "symbol":
        return at[node.value]
    return Node(node.kind, tuple(substituted(arg, at) for arg in node.args), node.value)
