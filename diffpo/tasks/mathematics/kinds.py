"""What an answer can be."""

from __future__ import annotations

from dataclasses import dataclass

from .nodes import Node


@dataclass(frozen=True)
class Expression:
    """A number, or a function of its symbols, perhaps with a unit ("cm", "dollar"; degrees and per cent are part of the node)."""

    node: Node
    unit: str | None = None


@dataclass(frozen=True)
class Words:
    """Text: its letters and digits, without case."""

    key: str


@dataclass(frozen=True)
class Many:
    """Several answers. kind: "list" (bare, in no order), "set", "point" (in order), "square" (in order, or a closed interval)."""

    kind: str
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Numeral:
    """Digits in a base, which are not their value: the question was how to write them."""

    digits: str
    base: int


@dataclass(frozen=True)
class Named:
    """name = value."""

    name: str
    value: Answer


@dataclass(frozen=True)
class Equation:
    """difference = 0. value: of the right side, if that alone is a number, as in x + y = 7."""

    difference: Node
    value: Node | None = None


@dataclass(frozen=True)
class Inequality:
    """positive > 0, or >= 0 where not strict."""

    positive: Node
    strict: bool


@dataclass(frozen=True)
class Interval:
    """End points (None: infinite) and whether they belong to it."""

    low: Node | None
    high: Node | None
    has_low: bool
    has_high: bool


@dataclass(frozen=True)
class Reals:
    """A union of intervals. variable: the letter that an inequality names."""

    parts: tuple[Interval, ...]
    variable: str | None = None


@dataclass(frozen=True)
class Ratio:
    terms: tuple[Node, ...]


@dataclass(frozen=True)
class Clock:
    """A time of day, if it is none of a ratio. half: "am", "pm", "noon", "midnight" or ""."""

    hour: int
    minute: int
    half: str

    def minutes(self) -> frozenset[int]:
        """What it can be in minutes after midnight."""
        hours = {"am": (0,), "midnight": (0,), "pm": (12,), "noon": (12,)}.get(self.half, (0, 12))
        if self.hour > 12:
            return frozenset([(60 * self.hour + self.minute) % 1440])
        return frozenset(60 * (self.hour % 12 + more) + self.minute for more in hours)


@dataclass(frozen=True)
class Falsehood:
    """5 = 6: wrong whatever the question."""


Answer = (
    Expression | Words | Many | Matrix | Numeral | Named | Equation | Inequality | Reals | Ratio | Clock | Falsehood
)
EVERYTHING = Reals((Interval(None, None, False, False),))
