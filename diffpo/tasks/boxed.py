"""Where a text holds `\\boxed{...}`, found in one pass: texts come from a model and may nest or never close anything.

A box is `\\boxed{2}`, `\\boxed {2}`, `\\fbox{2}`, `\\framebox{2}`, or, without braces, `\\boxed` and what TeX would take as its
argument: one command with its arguments (`\\boxed\\frac12`), one letter, or, more generous than TeX, a whole number (`\\boxed 12`) or `(...)`.
"""

from __future__ import annotations

import re

_COMMAND = r"\\{1,2}(?:boxed|fbox|framebox(?:\[[^\[\]]{0,20}\]){0,2})(?![a-zA-Z])"
# "\\." skips escaped braces; a backslash too many, as in a text that was escaped twice, is no reason not to see a box
_TOKEN = re.compile(rf"{_COMMAND}\s*(?P<open>\{{)?|\\.|[{{}}]", re.DOTALL)

_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # nested twice is enough for what stands in a box without braces
_ONE = rf"\s*(?:{_GROUP}|\\[a-zA-Z]+|[0-9a-zA-Z])"
_WITHOUT_BRACES = re.compile(
    rf"\\[dtc]?frac{_ONE}{_ONE}|\\sqrt(?:\[[^\[\]]*\])?{_ONE}|\\[a-zA-Z]+(?:{_GROUP})*"
    r"|[-+\u2212]?\\?\$?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)|\([^()]*\)|[a-zA-Z](?![a-zA-Z])"
)
_LONGEST_WITHOUT_BRACES = 200

_JOINT = r"[\s,;$&]|\\[(),;\s]|\\q?quad(?![a-zA-Z])|\\(?:text|mbox)\s*\{[\s,]*(?:and|or)?\s*\}|(?:and|or)(?![a-zA-Z])|[a-zA-Z](?:_\w)?\s*="
_BETWEEN = re.compile(rf"\}}?(?:{_JOINT})*{_COMMAND}\s*\{{?")
_LONGEST_BETWEEN = 60


def boxed_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the content of every box that is closed, by start."""
    spans: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the content of a box begins, None of another brace
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "}":
            if opened and (start := opened.pop()) is not None:
                spans.append((start, match.start()))
        elif token == "{":
            opened.append(None)
        elif match["open"]:
            opened.append(match.end())
        elif token.lstrip("\\").startswith(("boxed", "fbox", "framebox")):
            end = match.end() + _LONGEST_WITHOUT_BRACES
            if content := _WITHOUT_BRACES.match(text, match.end(), end):
                spans.append(content.span())
    return sorted(spans)


def last_boxed(text: str) -> str | None:
    """Content of the last box, stripped; None if there is none."""
    spans = boxed_spans(text)
    return text[slice(*spans[-1])].strip() if spans else None


def last_boxes(text: str) -> list[str]:
    """Contents of the last box and of those before it that only commas, "and", "or" or a name and "=" part from one another, stripped."""
    spans = boxed_spans(text)
    first = len(spans) - 1
    while first > 0 and _is_joined(text, spans[first - 1][1], spans[first][0]):
        first -= 1
    return [text[slice(*span)].strip() for span in spans[max(first, 0) :]]


def _is_joined(text: str, end: int, start: int) -> bool:
    return end < start <= end + _LONGEST_BETWEEN and _BETWEEN.fullmatch(text, end, start) is not None
