"""Text files that others wrote: bytes to lines to JSON. Whatever is wrong is one ValueError that names the line."""

import json
import re
import sys
from pathlib import Path

_NOT_TEXT = {  # the first bytes of what is often taken for a text file
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\x1f\x8b": "gzip: unpack it first, gunzip FILE",
    b"\x28\xb5\x2f\xfd": "zstandard: unpack it first, zstd -d FILE",
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack it, or export it as text",
    b"PAR1": "parquet",
}
_BOM = "\ufeff"
MOST_BYTES = 2**28  # of one file; a device or a pipe may have no end
_LOOKS_LIKE_JSON = re.compile(rf"""^[ \t{_BOM}]*(\{{\s*["'}}]|\[\s*\{{)""", re.MULTILINE)


def read(source: str, name: str) -> bytes:
    """The content of a file, or of standard input ("-"). ValueError if it cannot be read, or holds more than 256 MiB."""
    try:
        if source == "-":
            content = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{name} holds more than {MOST_BYTES // 2**20} MiB, or has no end: give smaller files")
    return content


def decode(content: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark. ``name``: what the ValueError's message starts with."""
    for mark, kind in _NOT_TEXT.items():
        if content.startswith(mark):
            raise ValueError(f"{name} is not UTF-8 text but {kind}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise ValueError(
            f"{name}, line {line} is not UTF-8 (byte 0x{content[error.start]:02x}): save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = 1 + text[: text.index("\0")].count("\n")
        raise ValueError(f"{name}, line {line} holds a NUL byte: if the file is UTF-16, save it as UTF-8")
    return text


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """(number from 1, line) of the lines that are not blank. They end in LF, CRLF or CR; files put together may hold more marks."""
    lines = re.split("\r\n|\r|\n", text)
    return [(number, line.removeprefix(_BOM)) for number, line in enumerate(lines, 1) if line.replace(_BOM, "").strip()]


def looks_like_json(text: str) -> bool:
    """Whether some line begins as an object, or an array of objects, does."""
    return _LOOKS_LIKE_JSON.search(text) is not None


def json_rows(text: str, name: str) -> list[tuple[str, object]]:
    """(place, value) of each row: one value per line (JSONL), or the items of one array, or one object over several lines."""
    lines = numbered_lines(text)
    if lines and lines[0][1].lstrip().startswith("["):
        items = parse_json(text, name)
        assert isinstance(items, list)  # by its first character
        return [(f"{name}, item {number}", item) for number, item in enumerate(items, 1)]
    try:
        return [(f"{name}, line {number}", parse_json(line, name, number)) for number, line in lines]
    except ValueError:
        if not lines[0][1].rstrip().endswith("}"):  # perhaps one object, printed over several lines
            try:
                return [(f"{name}, line {lines[0][0]}", parse_json(text, name))]
            except ValueError:
                pass  # it is not: what is wrong with the line says more
        raise


def parse_json(text: str, name: str, line: int = 1) -> object:
    """The JSON value in ``text``, which begins at this line. Stricter than json.loads: no key twice, no half characters."""
    place = f"{name}, line {line}"
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"{name}, line {line + error.lineno - 1}"
        raise ValueError(f"{place} is not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError(f"{place} is not valid JSON: it is nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: not valid Unicode: {_half_character(error)}") from None
    except _RefusedError as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    return value


class _RefusedError(Exception):
    """What json.loads would have let pass, or put into other words."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"key {key!r} stands twice")
            seen.add(key)
    return fields


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python's limit on the digits of an integer
        raise _RefusedError(f"a number of {len(digits)} digits") from None


def check_unicode(text: str) -> None:
    """ValueError for a string that no file could hold, such as half of an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: {_half_character(error)}") from None


def _half_character(error: UnicodeEncodeError) -> str:
    return f"\\u{ord(error.object[error.start]):04x} is half of a character, without its other half"
