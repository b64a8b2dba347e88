"""Trees of expressions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction


class UnreadableError(Exception):
    """Not an expression that this module knows."""


@dataclass(frozen=True)
class Node:
    """kind: "number" (value), "symbol" (name), a constant (pi, e, i), or an operation on args: + * inverse ^ root ! deg % mod abs floor
    ceil binom, or a function.
    """

    kind: str
    args: tuple[Node, ...] = ()
    value: Fraction = Fraction(0)
    name: str = ""

    def symbols(self) -> frozenset[str]:
        if self.kind == "symbol":
            return frozenset([self.name])
        return frozenset().union(*(arg.symbols() for arg in self.args))

    def kinds(self) -> frozenset[str]:
        return frozenset([self.kind]).union(*(arg.kinds() for arg in self.args))


def number(value: int | Fraction) -> Node:
    return Node("number", value=Fraction(value))


def symbol(name: str) -> Node:
    return Node("symbol", name=name)


def minus(a: Node, b: Node) -> Node:
    return Node("+", (a, Node("*", (number(-1), b))))


def substituted(node: Node, at: Mapping[str, Node]) -> Node:
    """With expressions for its symbols."""
    if node.kind == "symbol":
        return at[node.name]
    return replace(node, args=tuple(substituted(arg, at) for arg in node.args))
