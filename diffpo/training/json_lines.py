"""An append-only file of JSON objects, one a line: a line is whole or absent, whatever fails, and always valid JSON."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any


class JsonLines:
    """The rows of a file, and a way to add to them; ``what`` a row is, for messages. Half a line at the end, which a killed run leaves, is dropped.

    ValueError for a line that is no JSON object, and for a path that is no file of its own: a link's target, a pipe or a file that also
    has another name would be changed with it. OSError: the disk.
    """

    def __init__(self, path: Path, what: str):
        self._file = _open_own(path)
        try:
            content = self._file.read()
            lines = content.split(b"\n")[:-1]
            self.rows = [
                _row(line, f"{path}: line {number} is no {what}") for number, line in enumerate(lines, start=1)
            ]
        except BaseException:
            self._file.close()
            raise
        self._ends = [0]
        for line in lines:
            self._ends.append(self._ends[-1] + len(line) + 1)
        if len(content) > self._ends[-1]:
            self._file.truncate(self._ends[-1])

    def write(self, row: dict) -> None:
        """Add a row; on an OSError the file is as it was."""
        row = finite(row)
        line = json.dumps(row, default=str, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written < len(line):  # the disk is full: the next attempt says so
                self._file.write(line[written:])
        except OSError:
            self._file.truncate(self._ends[-1])
            raise
        self.rows.append(row)
        self._ends.append(self._ends[-1] + len(line))

    def keep(self, count: int) -> None:
        """Drop all rows but the first ``count``."""
        if count < len(self.rows):
            self._file.truncate(self._ends[count])
            del self.rows[count:], self._ends[count + 1 :]

    def close(self) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """The value with null for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def _open_own(path: Path):
    """The file, unbuffered, for reading and appending; made if it is not there."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"{path} is a link, which is not followed: remove it") from error
        raise
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(handle)
        raise ValueError(f"{path} is no file of its own, but a device, a pipe or a link to another file: remove it")
    return os.fdopen(handle, "rb+", buffering=0)


def _row(line: bytes, fault: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{fault} ({error}); start again with --overwrite") from error
    if not isinstance(row, dict):
        raise ValueError(f"{fault}, but {line[:40]!r}; start again with --overwrite")
    return row
