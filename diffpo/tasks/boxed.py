"""Where a text holds `\\boxed{...}`, found in one pass: texts come from a model and may nest or never close anything."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # "\\." skips escaped braces


def boxed_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the content of every closed `\\boxed{...}`, by start."""
    spans, opened = [], []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if opened and (start := opened.pop()) is not None:
                spans.append((start, match.start()))
        elif token.endswith("{") and token != r"\{":
            opened.append(match.end() if token.startswith("\\boxed") else None)
    return sorted(spans)


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}`, stripped; None if there is none."""
    spans = boxed_spans(text)
    return text[slice(*spans[-1])].strip() if spans else None
