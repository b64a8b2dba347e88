"""Words, units of measurement, and numerals in a base."""

from __future__ import annotations

import re

from .kinds import EVERYTHING, Answer, Expression, Many, Numeral, Words
from .nodes import UnreadableError, number
from .plain import plain

NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # noqa: SIM905
    )
} | {
    word: 10 * value
    for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)  # noqa: SIM905
}
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_UNITS = {
    **dict.fromkeys(("dollar", "usd", "buck"), "dollar"),
    **dict.fromkeys(("in", "inch", "inche"), "inch"),
    **dict.fromkeys(("ft", "feet", "foot"), "foot"),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("m", "meter", "metre"), "m"),
    **dict.fromkeys(("km", "kilometer", "kilometre"), "km"),
    **dict.fromkeys(("mi", "mile"), "mile"),
    **dict.fromkeys(("yd", "yard"), "yard"),
    **dict.fromkeys(("s", "sec", "second"), "second"),
    **dict.fromkeys(("min", "minute"), "minute"),
    **dict.fromkeys(("h", "hr", "hour"), "hour"),
    **dict.fromkeys(("kg", "kilogram"), "kg"),
    **dict.fromkeys(("g", "gram"), "g"),
    **dict.fromkeys(("lb", "pound"), "pound"),
    **dict.fromkeys(("oz", "ounce"), "ounce"),
    **dict.fromkeys(("l", "liter", "litre"), "liter"),
    **dict.fromkeys(("ml", "milliliter"), "ml"),
    **dict.fromkeys(("mph",), "mile/hour"),
    **dict.fromkeys(("rad", "radian"), "radian"),
    **dict.fromkeys(("unit",), "unit"),
}
BARE_UNITS = frozenset(_UNITS) | frozenset(
    "cent euro yen rupee inches day week month year way people am pm".split()  # noqa: SIM905
)
_SHORT_WORDS = frozenset(
    "yes odd all the red blue tie few six two one ten may sat sun mon tue wed thu fri".split()  # noqa: SIM905
)
_OPENED, _CLOSED = r"(?:[\s({\[]|\\text\s*\{)*", r"[\s)}\]]*"  # whatever stands around digits and base: only they count
_NUMERAL = re.compile(rf"{_OPENED}([0-9A-F]+){_CLOSED}_{_OPENED}(?:base\s)?\s*([a-z]+|\d+){_CLOSED}")
_NUMERAL_IN_WORDS = re.compile(r"([0-9A-F]+)\s*\(?(?:\\text\{\s*)?\(?(?:in )?base[ -]*\}?\s*_?([a-z]+|\d+)\s*\)?\}?\)?")
_UNIT_AT_END = re.compile(
    r"(?:\\text\{(?P<text>[^{}]*)\}|(?<=[\d}) ])(?P<bare>(?:(?:square|cubic|sq|cu)\.? )?[a-zA-Z]{1,12}(?:(?:\s*/\s*| per | )[a-zA-Z]{1,12})?)\.?)"
    r"\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?$"
)
_UNIT_IN_FRONT = re.compile(r"(-?)\s*\\text\{(dollars|euros|pounds|yen|rupees|cents|USD)\}\s*(?=[\d.\\(-])")


def words_of(text: str) -> str:
    """Letters and digits of an answer, in lower case, without articles: what it says."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", plain(text))
    text = text.replace(r"\land", "and").replace(r"\lor", "or").replace(r"^\circ", "degrees").lower()
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th|\s*\^\s*\{\s*(?:st|nd|rd|th)\s*\})(?![a-z])", "", text)  # June 20th
    text = re.sub(r"^(?:an?|the)\s+", "", text.strip(" .,;:!\"'*`()"))
    return re.sub(r"[^\w+\-/<>=^]|_", "", text)


def words(content: str) -> Answer:
    key = words_of(rf"\text{{{content}}}")
    choices = re.split(r"\s*(?:,|;|\band\b)\s*", content.replace("(", "").replace(")", "").strip(" ."))
    if len(choices) > 1 and all(len(choice) == 1 and choice.isalpha() for choice in choices):  # A, C
        return Many("list", tuple(Words(choice.lower()) for choice in choices))
    if key in NUMBER_WORDS:
        return Expression(number(NUMBER_WORDS[key]))
    if key in ("nosolution", "nosolutions", "emptyset", "nosuchnumber"):
        return Many("set", ())
    if key in ("allrealnumbers", "allreals", "allrealnumber"):
        return EVERYTHING
    if re.fullmatch(r"\d+", key):
        return Expression(number(int(key)))
    if not key:
        raise UnreadableError("no words")
    return Words(key)


def is_prose(text: str) -> bool:
    """Words that were typed without \\text: no operator, and letters in a run that no product of symbols has."""
    runs = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", re.sub(r"\\text\{[^{}]*\}", " word ", text))
    if not re.fullmatch(r"(?:[\w\s.,'!?\-:&/()\"]|\\text\{[^{}]*\})*", text) or "_" in text:
        return False
    return any(
        len(run) >= 4 or (run[0].isupper() and run[1:].islower()) or (len(run) == 3 and run.lower() in _SHORT_WORDS)
        for run in runs
    ) or (bool(re.fullmatch(r"(?i)no|yes", text.strip(" .!"))))


def numeral(text: str) -> Numeral | None:
    match = _NUMERAL.fullmatch(text) or _NUMERAL_IN_WORDS.fullmatch(text)
    if match is None:
        return None
    name = next(group for group in match.groups()[1:] if group)
    base = int(name) if name.isdigit() and len(name) < 4 else NUMBER_WORDS.get(name, 0)
    base = {"binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16}.get(name, base)
    if (
        not 2 <= base <= 36
        or not (match[1][0].isdigit() or base > 10)
        or any(int(digit, 36) >= base for digit in match[1])
    ):
        return None
    return Numeral(match[1].lstrip("0") or "0", base)


def without_unit(text: str) -> tuple[str, str | None]:
    """(the rest, unit or None): 5 cm, $5, 5 million dollars is (5) 1000000, dollar."""
    unit = None
    if match := _UNIT_IN_FRONT.match(text):
        unit, text = _unit_name(match[2], None), match[1] + text[match.end() :]
    while match := _UNIT_AT_END.search(text):
        rest = text[: match.start()].rstrip().removesuffix(r"\cdot").rstrip()
        if not re.search(r"[\d)}\]!%]$|\\pi$|\\circ$|[a-z]$", rest) or rest.endswith(("^", "_")):
            break
        if match["bare"] is not None and not _is_bare_unit(match["bare"], text[: match.start()]):
            break
        name = match["text"] if match["text"] is not None else match["bare"]
        first, _, others = name.strip().partition(" ")
        if first.lower().removesuffix("s") in SCALES and not match["power"]:
            text = rf"({rest})\cdot {SCALES[first.lower().removesuffix('s')]}"
            unit = _unit_name(others.removeprefix("of "), None) if others else unit
            continue
        unit, text = _unit_name(name, match["power"]), rest
    return text, unit


def _is_bare_unit(name: str, before: str) -> bool:
    words = [word for word in re.split(r"[\s/.]+", name.lower()) if word]
    known = all(
        singular(word) in BARE_UNITS or word in SCALES or word in ("square", "cubic", "sq", "cu", "per")
        for word in words
    )
    single = len(name) == 1
    if known and not single:
        return True
    return (
        not single
        and before.endswith(" ")
        and all(len(word) >= 4 for word in words)
        and re.search(r"\d\s*$", before) is not None
    )


def singular(word: str) -> str:
    return word if word in _UNITS or len(word) < 3 else word.removesuffix("s")


def _unit_name(name: str, power: str | None) -> str | None:
    """One spelling for a unit: `square inches`, `sq. in.` and `inches^2` are inch^2."""
    name = re.sub(r"[^a-z0-9/^ ]", " ", name.lower()).replace(" per ", "/")
    prefix = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
    words = [word for word in re.split(r"\s+|(/)|\^", name) if word]
    power = next((prefix[word] for word in words if word in prefix), power)
    kept = [
        _UNITS.get(singular(word), singular(word))
        for word in words
        if word not in prefix and word not in ("the", "of", "a", "an")
    ]
    if not kept or kept == ["unit"]:
        return None
    return "".join(kept) + (f"^{power}" if power else "")
