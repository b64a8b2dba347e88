"""The number that an answer states, read from plain text and compared exactly."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from .answers import UNREADABLE
from .arithmetic import evaluate_decimal, last_place

_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "bn": 10**9, "B": 10**9}
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
]
_WORDS = {word: value for value, word in enumerate([*_ONES, "eighteen", "nineteen"])} | {
    word: 10 * value for value, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2)
}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A number or calculation in a text. value: None if it cannot be read, as in `3:2` or `1,23`; start, end: where it stands."""

    value: Fraction | None
    start: int
    end: int


def stated_number(text: str, *, first: bool, units: Iterable[str] = ()) -> Fraction | None:
    """The number that a plain text states as its result; None if there is none or no telling which.

    Of an equation the right side counts, and the number it begins with; `12 (3 * 4)` is 12 and `5 million` 5,000,000. An equation of plain numbers that does not
    hold states nothing. Of several numbers it is the one in front if the others only say what it is of (`72 of 100`), else with `first` there is no telling, and
    without it is the last, unless that is but an alternative (`12 or 13`) or denied (`not 13`).
    units: scale words that are units of the question, as in "how many dozen".
    """
    sides = [side for side in _tidied(text).split("=") if re.search(f"[0-9{UNREADABLE}]", side)]
    if not sides:
        return _spelt(text)
    if any(_contradict(*map(_joined, pair)) for pair in itertools.pairwise(sides)):
        return None
    side = _joined(sides[-1])
    quantities = _quantities(side, units)
    if len({quantity.value for quantity in quantities}) > 1:
        leads = not re.search("[A-Za-z]", side[: quantities[0].start])
        between = side[quantities[0].end : quantities[1].start]
        says_of_what = _FURTHER.match(between) is not None
        if (leads and (says_of_what or len(sides) > 1)) or (first and says_of_what):
            return quantities[0].value
        last_two = quantities[-2:]
        between = side[last_two[0].end : last_two[1].start]
        if first or (last_two[0].value != last_two[1].value and _ALTERNATIVE.fullmatch(between)):
            return None
    return None if _DENIED.search(side[: quantities[-1].start]) else quantities[-1].value


def _contradict(left: str, right: str) -> bool:
    """Whether two sides are plain numbers or calculations that differ, and not by rounding alone."""
    first, second = (_value(side.strip(" ;")) if _PLAIN.fullmatch(side) else None for side in (left, right))
    if first is None or second is None:
        return False
    unit = max(filter(None, map(last_place, (first, second))), default=Fraction(1, 100))
    return abs(first - second) > (unit if unit < 1 else unit / 2)


_PLAIN = re.compile(r"[-+*/^().0-9 ;]+")
_ALTERNATIVE = re.compile(r"\W*(?:[a-z]+\W+)?(?:to|or(?:\W+[a-z]+)?)\W*|\W*(?:and|nor)\W*| *, *", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:not|never|cannot be|isnt|arent|wasnt)\W*$", re.IGNORECASE)


_FURTHER = re.compile(
    r"[^,;:]*?\b(?:of|in|per|for|at|from|with|by|out|over|on|after|each|every|during|using)\b"
    r"|[^;:]*?\b(?:because|since|as|when|if|not)\b"
)
_ANNOUNCES = re.compile(r"answer(?: is| are|:| equals| would be| will be| must be| =)+|####", re.IGNORECASE)


def announced(text: str) -> str | None:
    """What follows "answer is", "answer:" or "####" in the last line with a digit; None if that line has no such words."""
    line = _last_line(text)
    said = [match.end() for match in _ANNOUNCES.finditer(line)]
    rest = line[said[-1] :] if said else ""
    return rest if _DIGIT.search(rest) else None


def last_statement(text: str) -> str:
    """What is `announced`, else the last line with a digit, else the whole text."""
    return announced(text) or _last_line(text)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.split("\n")) if _DIGIT.search(line)), text)


_DIGIT = re.compile(r"[0-9]")
_UNDERSCORED = re.compile(r"(?<![0-9_.,])[0-9]{1,3}(?:_[0-9]{3})+(?![0-9_])")
_TIDY = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"\b(?:minus|negative) +(?=[0-9.])", "-"),
        (r"\b([0-9]+)-? and (?:a|one)[ -]half\b", r"(\1+1/2)"),
        (r"\b([0-9]{1,2}):00\b", r"\1"),
        (r"(?<![0-9a-z.])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)e([-+]?[0-9]{1,3})(?![0-9a-z.])", r"(\1*10^(\2))"),
        (r"\b([cmk]?m|ft|in|yd|mi)[23]\b", r"\1"),  # units: cm2, cm^2
        (r"(?<=[a-z])\s*\^\s*\(?[-+]?[0-9]+\)?", " "),
        (r"(?<=[a-z]) +- +(?=[0-9.])|(?<=[a-z])-(?=[0-9])", " ; "),  # a dash
        (r"(?<=[a-z])(?=[0-9])", " "),
        (r"(?<=[0-9)])\s*x\s*(?=[0-9(])", "*"),
        (r"\.(?![0-9])", " ; "),
        (r"(?<![0-9.])(?:[0-9][0-9.]*(?:[,:_][0-9.]*[0-9])+|[0-9]+\.[0-9]+(?:\.[0-9]+)+)", UNREADABLE),
    )
]
_GROUPED = re.compile(r"[^0-9]*([0-9]{1,3}(?: [0-9]{3})+)(?:\.[0-9]+)?[^0-9]*")
_MIXED = re.compile(r"(?<![0-9./^*])([0-9]+) +([0-9]+)/([0-9]+)(?![0-9./])")
_REMARK = re.compile(r"(?<=[0-9a-zA-Z%]) +\([^()]*\)")


def _tidied(text: str) -> str:
    text = _UNDERSCORED.sub(lambda match: match[0].replace("_", ""), text)
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    bare = _REMARK.sub(" ", text)
    return bare if _DIGIT.search(bare) else text


def _joined(text: str) -> str:
    """`9 500` and `3 1/2` as one number each."""
    if grouped := _GROUPED.fullmatch(text):
        text = text.replace(grouped[1], grouped[1].replace(" ", ""))
    return _MIXED.sub(lambda m: f"({m[1]}+{m[2]}/{m[3]})" if int(m[2][:40]) < int(m[3][:40]) else m[0], text)


_RUN = re.compile(rf"[-+*/^().0-9 {UNREADABLE}]+")
_SCALE = re.compile(r"[ ;]*\b(" + "|".join(_SCALES) + r")s?\b", re.IGNORECASE)
_LETTER = re.compile(r"(k|K|M|bn|B)\b")


def _quantities(text: str, units: Iterable[str]) -> list[Quantity]:
    found = []
    for run in _RUN.finditer(text):
        if UNREADABLE in run[0] or _DIGIT.search(run[0]):
            value, end = _value(run[0]), run.end()
            while value is not None and (scale := _SCALE.match(text, end)):
                word, end = scale[1].lower(), scale.end()
                value *= 1 if word in units else _SCALES[word]
            if value is not None and run[0][-1] in "0123456789)" and (letter := _LETTER.match(text, end)):
                value, end = value * _LETTERS[letter[1]], letter.end()
            found.append(Quantity(value, run.start(), end))
    return found


def _value(run: str) -> Fraction | None:
    """Of a calculation, or of the one number in what is none, such as `(18` or `- 5 /`."""
    run = run.lstrip(" )*/^").rstrip(" (+-*/^")
    for candidate in (run, run.strip("() ")):
        try:
            return evaluate_decimal(candidate)
        except (ValueError, ZeroDivisionError):
            continue
    return None


def _spelt(text: str) -> Fraction | None:
    """The number in words that a text holds, such as "five million" or "a dozen"; None if there is none or more than one."""
    values, whole, part, counting = [], 0, 0, False
    for word in [*re.findall(r"[a-z]+", text.lower()), "."]:
        scale = _SCALES.get(word.removesuffix("s"))
        if word in _WORDS:
            part, counting = part + _WORDS[word], True
        elif scale and (counting or scale == 12):
            part = part * scale if counting else scale
            whole, part = (whole, part) if scale == 100 else (whole + part, 0)
            counting = True
        elif counting and word != "and":
            values.append(Fraction(whole + part))
            whole, part, counting = 0, 0, False
    return values[0] if len(values) == 1 else None
