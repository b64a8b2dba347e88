"""Sets of reals: unions of intervals, compared, and tried as solutions of inequalities."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from fractions import Fraction

from .kinds import Answer, Expression, Inequality, Interval, Many, Reals
from .nodes import Node, minus, number, substituted
from .values import UndefinedError, sign


def as_reals(answer: Answer) -> Reals | None:
    """The answer as a set of reals: (1, 2) is an open interval, {1, 2} two points. None if it is none."""
    if isinstance(answer, Reals):
        return answer
    if isinstance(answer, Many) and (nodes := numbers_in(answer.items)) is not None:
        if answer.kind == "set":
            return Reals(tuple(Interval(node, node, True, True) for node in nodes))
        if answer.kind in ("point", "square") and len(nodes) == 2:
            closed = answer.kind == "square"
            return Reals((Interval(nodes[0], nodes[1], closed, closed),))
    return None


def numbers_in(items: Sequence[Answer]) -> list[Node] | None:
    """The items, if all of them are numbers."""
    nodes = [item.node for item in items if isinstance(item, Expression) and not item.node.symbols()]
    return nodes if len(nodes) == len(items) else None


def common(a: Reals, b: Reals) -> Reals:
    """The reals in both."""
    return Reals(tuple(_common_part(x, y) for x in a.parts for y in b.parts))


def _common_part(a: Interval, b: Interval) -> Interval:
    """May be empty: its ends are then in the wrong order."""
    low, high = a, a
    if b.low is not None and (a.low is None or (order := _order(b.low, a.low)) > 0 or (order == 0 and not b.has_low)):
        low = b
    if b.high is not None and (
        a.high is None or (order := _order(b.high, a.high)) < 0 or (order == 0 and not b.has_high)
    ):
        high = b
    return Interval(low.low, high.high, low.has_low, high.has_high)


def without_points(points: list[Node]) -> Reals:
    """All reals but these."""
    points = sorted(points, key=functools.cmp_to_key(_order))
    return Reals(tuple(Interval(low, high, False, False) for low, high in itertools.pairwise([None, *points, None])))


def is_solution(inequality: Inequality, reals: Reals) -> bool | None:
    """Whether these reals solve an inequality of one letter: tried at their ends, and at points between and beyond them."""
    if len(names := inequality.positive.symbols()) != 1:
        return None
    (name,) = names
    parts = _merged(reals.parts)
    ends = [end for part in parts for end in (part.low, part.high) if end is not None]
    for low, high in itertools.pairwise([None, *ends, None]):
        for point in _points_between(low, high):
            inside = any(_contains(part, point) for part in parts)
            if inside != _holds(inequality, substituted(inequality.positive, {name: point})):
                return False
    return True


def _points_between(low: Node | None, high: Node | None) -> list[Node]:
    """The lower end, and some points up to the higher one."""
    if low is None:
        return [number(Fraction(k, 7)) for k in (-7000, -15, -1, 0, 3, 17, 7000)] if high is None else _beyond(high, -1)
    if high is None:
        return [low, *_beyond(low, 1)]
    inner = [Fraction(k, 1000) for k in (1, 143, 500, 857, 999)]
    return [low, *(Node("+", (low, Node("*", (number(k), minus(high, low))))) for k in inner)]


def _beyond(end: Node, direction: int) -> list[Node]:
    return [Node("+", (end, number(Fraction(direction * k, 1000)))) for k in (1, 500, 3000, 10**6)]


def _contains(part: Interval, point: Node) -> bool:
    below = part.low is None or (order := _order(part.low, point)) < 0 or (order == 0 and part.has_low)
    return below and (part.high is None or (order := _order(point, part.high)) < 0 or (order == 0 and part.has_high))


def _holds(inequality: Inequality, positive: Node) -> bool:
    try:
        return sign(positive) >= inequality.strict
    except UndefinedError:
        return False


def same_reals(gold: Reals | None, answer: Reals | None) -> bool:
    if gold is None or answer is None:
        return False
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False
    try:
        a, b = _merged(gold.parts), _merged(answer.parts)
        return len(a) == len(b) and all(_same_interval(x, y) for x, y in zip(a, b, strict=True))
    except UndefinedError:  # an end that is not real
        return False


def _same_interval(a: Interval, b: Interval) -> bool:
    return (a.has_low, a.has_high) == (b.has_low, b.has_high) and all(
        x is y if x is None or y is None else _order(x, y) == 0 for x, y in ((a.low, b.low), (a.high, b.high))
    )


def _order(a: Node, b: Node) -> int:
    return sign(minus(a, b))


def _merged(parts: Sequence[Interval]) -> list[Interval]:
    """The union as intervals that do not touch, from left to right, without empty ones."""
    kept = [part for part in parts if not _is_empty(part)]
    ordered: list[Interval] = []
    for part in kept:
        at = sum(_starts_before(other, part) for other in ordered)
        ordered.insert(at, part)
    merged: list[Interval] = []
    for part in ordered:
        if merged and _touch(merged[-1], part):
            merged[-1] = _joined(merged[-1], part)
        else:
            merged.append(part)
    return merged


def _is_empty(part: Interval) -> bool:
    if part.low is None or part.high is None:
        return False
    order = _order(part.low, part.high)
    return order > 0 or (order == 0 and not (part.has_low and part.has_high))


def _starts_before(a: Interval, b: Interval) -> bool:
    if a.low is None or b.low is None:
        return a.low is None
    order = _order(a.low, b.low)
    return order < 0 or (order == 0 and a.has_low >= b.has_low)


def _touch(a: Interval, b: Interval) -> bool:
    if a.high is None or b.low is None:
        return True
    order = _order(b.low, a.high)
    return order < 0 or (order == 0 and (a.has_high or b.has_low))


def _joined(a: Interval, b: Interval) -> Interval:
    if a.high is None or b.high is None:
        return Interval(a.low, None, a.has_low, False)
    order = _order(a.high, b.high)
    if order == 0:
        return Interval(a.low, a.high, a.has_low, a.has_high or b.has_high)
    end = a if order > 0 else b
    return Interval(a.low, end.high, a.has_low, end.has_high)
