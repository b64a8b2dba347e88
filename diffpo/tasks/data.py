"""Problems in the published format of their dataset: a local file, or the hub."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from diffpo.chats import as_messages, as_text
from diffpo.text_input import decode, json_rows

FORMATS = (".jsonl", ".csv", ".parquet")
_EXACT = 2.0**53  # below, every integer is a float
_JSON_ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".json")
_NumberedRow = tuple[str, Any]  # the words that name the row in a message, and the row


class Rows(Protocol):
    """What the rows of a published dataset are; see `PublishedTask`."""

    name: str
    columns: tuple[str, ...]
    hub_file: tuple[str, str] | None

    def problem_from_row(self, row: Mapping[str, Any]) -> Any: ...


def local_problems(task: Rows, path: str | Path) -> tuple[list, str]:
    """The problems of a jsonl, csv or parquet file, in its order, and the file's revision ("sha256:..."). "-": JSONL of standard input.

    FileNotFoundError without the file, ValueError for another format or rows that are not the task's.
    """
    if str(path) == "-":
        path, ending, content = Path("standard input"), ".jsonl", sys.stdin.buffer.read()
    else:
        path = Path(path)
        ending, content = path.suffix.lower(), _content(path)
    return _problems(
        task, _numbered_rows(path, ending, content), path.name
    ), f"sha256:{hashlib.sha256(content).hexdigest()}"


def _content(path: Path) -> bytes:
    if not os.path.exists(path):  # no error for a name that is too long
        raise FileNotFoundError(f"data: there is no file {path}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise ValueError(f"data: {path} is {kind}: give a file, or - and the rows on standard input")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: {path} is not readable: {error.strerror}") from error


def hub_problems(task: Rows) -> tuple[list, str]:
    """The published test split, from the hub's cache or the network, and its revision ("owner/name@commit").

    FileNotFoundError if it cannot be fetched, ValueError if the task is published nowhere or pyarrow is needed and missing.
    """
    if task.hub_file is None:
        raise ValueError(f"task {task.name} has no dataset on the hub: give a file of the published format with --data")
    dataset, file = task.hub_file
    if file.endswith(".parquet"):
        _parquet_module()  # before anything is fetched
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(dataset, file, repo_type="dataset"))
    except Exception as error:
        raise FileNotFoundError(
            f"data: {dataset} could not be fetched from the hub ({type(error).__name__}); give a local copy with --data: {error}"
        ) from error
    commit = path.parts[path.parts.index("snapshots") + 1] if "snapshots" in path.parts else "unknown"
    return _problems(task, _numbered_rows(path, path.suffix.lower(), path.read_bytes()), dataset), f"{dataset}@{commit}"


def _numbered_rows(path: Path, ending: str, content: bytes) -> list[_NumberedRow]:
    """The rows of a file by its ending: .jsonl (also .ndjson and .json: lines or one array), .csv (every value a string) or .parquet.

    ValueError, naming the line, if it is not what it says.
    """
    if ending == ".parquet":
        rows = _read_parquet(path)
        return [(f"row {number} of {path.name}", row) for number, row in enumerate(rows, 1)]
    if ending not in (*_JSON_ENDINGS, ".csv"):
        decode(content, f"data: {path}")  # a packed file is told apart from one of another format
        raise ValueError(f"data: {path} must be one of {', '.join(FORMATS)}")
    text = decode(content, f"data: {path}")
    if ending == ".csv":
        return _read_csv(text, path)
    prefix = f"data: {path}, "
    values = json_rows(text, f"data: {path}")
    return [(f"{place.removeprefix(prefix)}, row {i} of {path.name}", row) for i, (place, row) in enumerate(values, 1)]


def _read_csv(text: str, path: Path) -> list[_NumberedRow]:
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            lines = [(reader.line_num, values) for values in reader if values]
        except csv.Error as error:
            raise ValueError(f"data: {path}, line {reader.line_num} is not valid csv: {error}") from error
    if not lines:
        return []
    (_, header), *lines = lines
    twice = {column for column in header if column and header.count(column) > 1}
    if twice:
        raise ValueError(f"data: {path}: the header names {', '.join(sorted(twice))} more than once")
    rows = []
    for number, (line, values) in enumerate(lines, 1):
        if len(values) != len(header):
            raise ValueError(
                f"data: {path}, line {line} (row {number}) has {len(values)} values, the header {len(header)}: put values that hold a "
                "comma into quotes"
            )
        rows.append((f"line {line}, row {number} of {path.name}", dict(zip(header, values, strict=True))))
    return rows


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields of more than 128 KiB; a limit of the process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    parquet = _parquet_module()
    import pyarrow

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: {path} is not valid parquet: {error}") from error


def _parquet_module() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading parquet files needs pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def _problems(task: Rows, rows: Sequence[_NumberedRow], source: str) -> list:
    problems = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"data: {place} must be an object with columns, got {type(row).__name__}")
        try:
            row = _as_published(row, task.columns)
        except ValueError as error:
            raise ValueError(f"data: {place}: {error}") from error
        missing = [column for column in task.columns if row.get(column) is None]
        if missing:
            raise ValueError(
                f"data: {place} has no {', '.join(missing)}: task {task.name} needs the columns "
                f"{', '.join(task.columns)}, found {', '.join(map(str, row))}{_separator_hint(row)}"
            )
        unusable = [column for column in task.columns if not _is_finite(row[column])]
        if unusable:
            raise ValueError(f"data: {place}: {', '.join(unusable)} is no number: {row[unusable[0]]!r}")
        try:
            problems.append(task.problem_from_row(row))
        except ValueError as error:
            raise ValueError(f"data: {place}: {error}") from error
    if not problems:
        raise ValueError(f"data: {source} holds no rows")
    return problems


def _as_published(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """A row with the task's columns. Whole numbers that a table has made floats, 44.0, are integers again. The first column may be content parts; without it, a conversational row (TRL) stands for one: the user's
    message of ``prompt`` or ``messages`` is the question, and the assistant's, if there is one, the answer. ValueError for other chats."""
    row = whole_numbers(row)
    if not columns:
        return row
    question, *others = columns
    if isinstance(row.get(question), list) and any(isinstance(part, dict) for part in row[question]):
        return row | {question: as_text(row[question], question)}
    chat = row.get("messages", row.get("prompt"))
    if row.get(question) is not None or not isinstance(chat, list):
        return row
    completion = row.get("completion")
    messages = as_messages([*chat, *(completion if isinstance(completion, list) else [])])
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f"a chat must be one message of the user, and perhaps the assistant's answer, got {', '.join(roles)}: the task writes its own "
            "instruction"
        )
    answer = others[0] if others else "solution"  # math500 also reads a whole solution
    found = {question: messages[0]["content"]}
    if len(messages) == 2 and row.get(answer) is None:
        found[answer] = messages[1]["content"]
    return row | found


def whole_numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with integers where a table made floats of them: 44.0 is 44 again."""
    return {column: _whole(value) for column, value in row.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    exact = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    return int(value) if exact else value


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _separator_hint(row: dict[str, Any]) -> str:
    """For a csv of one column whose name holds another separator."""
    names = list(map(str, row))
    separators = {";": "semicolons", "\t": "tabs", "|": "bars"}
    used = [name for mark, name in separators.items() if len(names) == 1 and mark in names[0]]
    return f"; it seems to be separated by {used[0]}: separate it by commas" if used else ""
