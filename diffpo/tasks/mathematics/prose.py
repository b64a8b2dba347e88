"""What is mathematics in an answer of words: `\\text{There are } 90 \\text{ ways}`."""

from __future__ import annotations

import re

from .plain import plain
from .scan import grouped
from .units import BARE_UNITS, NUMBER_WORDS, SCALES, singular

_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?<!\\begin\{)(?<!\\end\{)(?:[a-zA-Z]{2,}(?:'[a-z]+)?|[aAI](?=\s+[a-zA-Z]{2}))(?![a-zA-Z])"
)
_SPELLED = re.compile(rf"(?<![\\\w-])(?:{'|'.join(NUMBER_WORDS)})(?![\w-])", re.IGNORECASE)
_ORDINAL = r"thirds?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|hal(?:f|ves)|quarters?"
_CHANGES = re.compile(  # of what such words do to the number beside them nothing is known here
    rf"\b(?:{_ORDINAL}|not?|\w+n't|never|neither|negative|minus|plus|times|less|more|fewer|greater|smaller|larger|least|most|between|than"
    r"|over|under|above|below|up|twice|double|triple|squared|cubed|power|root|factorial|base|mod|modulo|percentage|divided|multiplied)\b",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"[a-zA-Z](?:_\s*(?:\w|\{\w+\}))?|\\(?:theta|alpha|beta|lambda|mu|phi)")
_AROUND = re.compile(r"^(?:[\s,;:!?'\"]|\.(?!\d))+|[\s.,;:!?'\"]+$")
_SIGNS = {"percent": "%", "degree": r"^\circ "}
_GAP, _NUMBER = "\ue002", "\ue003"


def values_among_words(text: str) -> list[str]:
    """The parts of an answer between its words, in LaTeX; [] if there are no words, or words that change what a number means.

    Units stay with their numbers. Of "the value of x is 5", x is not a value.
    """
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", plain(text)).replace("$", "")
    text = re.sub(r"\\l(?:and|or)(?![a-zA-Z])", " and ", text)
    text = _SPELLED.sub(lambda m: str(NUMBER_WORDS[m[0].lower()]), text)
    if _CHANGES.search(text) or not _WORD.search(text):
        return []
    text = _WORD.sub(_kept, grouped(text))
    if _NUMBER in text:
        return []
    values = [_AROUND.sub("", part) for part in text.split(_GAP)]
    values = [value for value in values if value]
    return [value for value in values if not _VARIABLE.fullmatch(value)] or values


def _kept(match: re.Match) -> str:
    """A sign, a unit or a million behind a number, in \\text; a mark for any other number; a gap for any other word."""
    before, after = match.string[: match.start()], match.string[match.end() :]
    name, has_number = singular(match[0].lower()), re.search(r"[\d)}]\s*$", before)
    if has_number and name in _SIGNS:
        return _SIGNS[name]
    is_unit = name in BARE_UNITS and not (name == "in" and re.match(r"\s*[a-zA-Z]", after))  # 90 in all
    if has_number and (name in SCALES or is_unit):
        return rf"\text{{{match[0]}}}"
    return _NUMBER if name in SCALES or name in NUMBER_WORDS else _GAP
