"""Plain LaTeX cut where no bracket is open, without the commas of thousands, with the choices of its signs."""

from __future__ import annotations

import itertools
import re

from .nodes import UnreadableError

_OPEN, _CLOSE = ("(", "[", r"\{", r"\langle", "{"), (")", "]", r"\}", r"\rangle", "}")
_PIECE = re.compile(r"\\begin\{[a-z*]+\}|\\end\{[a-z*]+\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_LEADING_ZERO = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})*,0\d{2}(?:,\d{3})*(?![\d,])")


def grouped(text: str) -> str:
    """Without the commas of 1,234 outside of brackets, and of 1,050 inside of them, where nobody lists 1 and 050."""
    text = _LEADING_ZERO.sub(lambda m: m[0].replace(",", ""), text)
    out, depth = [], 0
    for chunk in re.split(r"(\\\{|\\\}|[()\[\]])", text):
        if chunk in ("(", "[", r"\{"):
            depth += 1
        elif chunk in (")", "]", r"\}"):
            depth -= 1
        elif depth == 0:
            chunk = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), chunk)
        out.append(chunk)
    return "".join(out)


def split(text: str, separators: tuple[str, ...]) -> list[tuple[str, str]]:
    """(separator in front, piece) of the text, cut where no bracket is open."""
    pieces, depth, separator, start = [], 0, "", 0
    for match in _PIECE.finditer(text):
        token = match.group()
        if token in _OPEN or token.startswith(r"\begin"):
            depth += 1
        elif token in _CLOSE or token.startswith(r"\end"):
            depth -= 1
        elif depth == 0 and token in separators:
            pieces.append((separator, text[start : match.start()].strip()))
            separator, start = token, match.end()
    if depth != 0:
        raise UnreadableError("brackets do not match")
    return [*pieces, (separator, text[start:].strip())]


def signed(text: str) -> list[str]:
    """The text with every choice of its signs; with minus-plus among them, all signs go together."""
    count = text.count(r"\pm") + text.count(r"\mp")
    if count > 3:
        raise UnreadableError("too many signs")
    together = r"\mp" in text
    choices = [(first,) * count for first in "+-"] if together else list(itertools.product("+-", repeat=count))
    results = []
    for choice in choices:
        signs = iter(choice)
        results.append(re.sub(r"\\(pm|mp)(?![a-zA-Z])", lambda m: _sign(m[1], next(signs)), text))  # noqa: B023
    return results


def _sign(command: str, choice: str) -> str:
    return choice if command == "pm" else {"+": "-", "-": "+"}[choice]
