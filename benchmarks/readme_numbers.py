"""``python benchmarks/readme_numbers.py [--write]``: do the README's tables and paragraphs say what the result files say?

A table is checked when a comment stands right above it that names its files and repeats its rows, with a field for each number; a paragraph alike, with
``text`` for ``table`` (either ends at the next empty line):

    <!-- table s=benchmarks/results/experiments/sampler.json
    | arm | accuracy |
    |---|---|
    | joint | {s[tasks][countdown][arms][joint][accuracy][mean]:.1%} |
    -->
    | arm | accuracy |
    |---|---|
    | joint | 45.4% |

The lines are Python format strings over the files' JSON: write the comment, run with --write, and the lines below it are filled in. Run without,
it exits with 1 and names the first line that differs; a test does the same.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CHECKED = re.compile(
    r"^<!-- (?:table|text)(?P<files>( \w+=\S+)+)\n(?P<template>(?:(?:(?!-->).)+\n)+)-->\n(?P<block>(?:(?![ \t]*(?:<!--|#)).*\S.*(?:\n|\Z))*)",
    re.MULTILINE,
)
_BEGIN = re.compile(r"^\s*<!--\s*(?:table|text)\b", re.MULTILINE)


def checked(text: str) -> list[re.Match]:
    """Every checked table and paragraph. ValueError for a comment that begins as one and is not of the form above."""
    matches, begun = list(_CHECKED.finditer(text)), len(_BEGIN.findall(text))
    if len(matches) != begun:
        raise ValueError(f"{begun} comments begin with <!-- table or <!-- text, {len(matches)} are well-formed")
    return matches


def expected(files: str, template: str, root: Path = ROOT) -> str:
    """The lines, filled in. ValueError naming the line whose field is not in the files, FileNotFoundError for a missing file."""
    pairs = (pair.split("=", 1) for pair in files.split())
    values = {name: json.loads((root / path).read_text()) for name, path in pairs}
    rows = []
    for row in template.splitlines():
        try:
            rows.append(row.format(**values))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"a field of the line {row!r} is not in {files.strip()}: {error!r}") from error
    return "\n".join(rows) + "\n"


def differences(text: str, root: Path = ROOT) -> list[tuple[str, str]]:
    """(line as it stands, line as the results have it) of all that is checked. ValueError as `checked` and `expected`."""
    found = []
    for match in checked(text):
        have, want = match["block"].splitlines(), expected(match["files"], match["template"], root).splitlines()
        length = max(len(have), len(want))
        lines = zip(have + [""] * (length - len(have)), want + [""] * (length - len(want)), strict=True)
        found += [(old, new) for old, new in lines if old != new]
    return found


def filled(text: str, root: Path = ROOT) -> str:
    """The text with all that is checked filled in. ValueError as `checked` and `expected`."""
    checked(text)

    def fill(match: re.Match) -> str:
        head = match[0][: len(match[0]) - len(match["block"])]
        return head + expected(match["files"], match["template"], root)

    return _CHECKED.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="fill the numbers in")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_args()
    text = given.readme.read_text()
    try:
        if given.write:
            given.readme.write_text(filled(text))
            return 0
        wrong = differences(text)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for old, new in wrong[:1]:
        print(f"{given.readme.name} says  {old}\nthe results  {new}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
