"""Whether a number and its approximation agree to the digits shown: 2\\sqrt2 \\approx 2.83."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ..arithmetic import last_place
from .kinds import Answer, Expression, Named
from .nodes import Node, minus, number
from .values import UndefinedError, exact, sign

_WITHOUT_END = Fraction(1, 100)  # of 22/7 and pi neither shows its digits


def agree(answers: Sequence[Answer]) -> bool:
    """Whether those that are numbers agree, rounded or cut after the last digit of the one with fewer digits."""
    values = [answer.value if isinstance(answer, Named) else answer for answer in answers]
    nodes = [value.node for value in values if isinstance(value, Expression) and not value.node.symbols()]
    return all(_agree(nodes[0], other) for other in nodes[1:])


def _agree(a: Node, b: Node) -> bool:
    unit = max(filter(None, (_unit(a), _unit(b))), default=_WITHOUT_END)
    tolerance, difference = number(unit if unit < 1 else unit / 2), minus(a, b)
    try:
        return all(sign(side) >= 0 for side in (minus(tolerance, difference), Node("+", (tolerance, difference))))
    except UndefinedError:  # 3 + 4i \approx 5
        return False


def _unit(node: Node) -> Fraction | None:
    """Of the last digit; the zeros at the end of 1200 are none, but of ten and a hundred they are. None without such a digit."""
    value = exact(node)
    if value is None:
        return None
    unit = last_place(value)
    while unit is not None and unit >= 1 and abs(value) >= 100 * unit and value % (10 * unit) == 0:
        unit *= 10
    return unit
