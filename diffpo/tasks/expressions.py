"""Whether an answer is an arithmetic expression of given numbers that makes a target."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction

from .answers import MAX_LENGTH, UNREADABLE, plain
from .arithmetic import evaluate

_WORDS = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"\((?=[^()0-9]*[a-z]|\s*=)[^()]*\)", " "),  # a remark
        (r"(?<=[0-9)])\s*x\s*(?=[0-9(])|\btimes\b|\bmultiplied by\b", "*"),
        (r"\bplus\b", "+"),
        (r"\bminus\b", "-"),
        (r"\bdivided by\b", "/"),
        (
            r"[a-z](?=\()|(?<=[a-z0-9])_|(?<=[0-9)])(?:st|nd|rd|th|[a-z])\b|\b(?:mod|power|root|squared|cubed|factorial|choose)\b",
            UNREADABLE,
        ),
        (r"(?<![0-9.])([0-9]+)\.0+(?!\.?[0-9])", r"\1"),  # 30.0
        (r"\.(?![0-9])", " ; "),
        (r"(?<=[0-9)])(?=\s*\()|(?<=\))(?=\s*[0-9])", "*"),  # 2(3 + 4)
    )
]
_SKIN_TONES = "".join(map(chr, range(0x1F3FB, 0x1F400)))
_SEPARATORS = re.compile(r"[a-z,;:#?]+", re.IGNORECASE)
_OPERATION = re.compile(r"[0-9)]\s*[-+*/]\s*[-+(]*[0-9]")


def makes_target(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Whether an answer gives an expression of + - * / that uses each of the numbers exactly once and equals the target exactly.

    It may be written in LaTeX, Markdown or Unicode, with words around it, and as one side of an equation, whose other sides do not count
    unless they use each number once as well. Of several lines the last one with an operation counts, or all as one expression.
    """
    if len(answer) > MAX_LENGTH:
        return False
    text = plain(answer)
    for pattern, replacement in _WORDS:
        text = pattern.sub(replacement, text)
    last_line = next((line for line in reversed(text.split("\n")) if _OPERATION.search(line)), "")
    values = _values(last_line, numbers) or _values(text.replace("\n", " "), numbers)
    return bool(values) and all(value == target for value in values)


def _values(text: str, numbers: Sequence[int]) -> list[Fraction]:
    """Values of the sides that use each number once, in the last equation or expression with such a side."""
    for statement in reversed(_SEPARATORS.split(text)):
        values = [value for value, used in _expressions(statement.split("=")) if sorted(used) == sorted(numbers)]
        if values:
            return values
    return []


def _bare(side: str) -> str:
    """A side without check marks, emoji and spaces around it."""
    marks = {mark for mark in side if unicodedata.category(mark) == "So"}
    return side.strip("".join(marks) + _SKIN_TONES + " \n\t")


def _expressions(sides: list[str]) -> Iterator[tuple[Fraction, list[int]]]:
    for side in sides:
        try:
            yield evaluate(_bare(side).lstrip("*/>").strip())
        except (ValueError, ZeroDivisionError):
            continue
