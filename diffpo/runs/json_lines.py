"""An append-only file of JSON objects, one a line: a line is whole or absent, whatever fails, and always valid JSON."""

import contextlib
import fcntl
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from diffpo.text_input import decode, parse_json

FileT = TypeVar("FileT", bound=BinaryIO)
_BOM = "\ufeff"


class JsonLines:
    """The rows of a file, and a way to add to them. Nothing is changed before the first new row, or `keep`.

    file: open for reading and appending, unbuffered, see `own_file`. name, what: of the file and of a row, and advice: what to do about a
    damaged one, for messages. start: the first bytes of a row. Half a row at the end, which a killed run leaves, gives way to the next one.
    fresh: so do all rows.
    ValueError for any other line that is no JSON object.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        what: str,
        advice: str = "start again with --overwrite",
        start: bytes = b'{"',
        fresh: bool = False,
    ):
        self._file, self._name, self._what, self._advice = file, name, what, advice
        self.rows: list[dict] = []
        self._ends = [0]  # in bytes, of nothing and of each row
        self._numbers: list[int] = []  # of the rows' lines
        self._next = 1  # the number of the line that is written next
        self._cut = fresh and os.fstat(file.fileno()).st_size > 0
        try:
            if not fresh:
                self._read(start)
        except BaseException:
            self.close()
            raise

    def _read(self, start: bytes) -> None:
        self._file.seek(0)
        complete, newline, rest = self._file.read().rpartition(b"\n")
        lines = complete.split(b"\n") if newline else []
        end = 0
        try:
            decode(complete, self._name)
            for number, line in enumerate(lines, start=1):
                end += len(line) + 1
                text = line.decode().removeprefix(_BOM)
                if text.strip():
                    self.rows.append(self._row(text, number))
                    self._ends.append(end)
                    self._numbers.append(number)
        except ValueError as error:
            raise ValueError(f"{error}; {self._advice}") from error
        if rest and not rest.startswith(start[: len(rest)]):
            raise ValueError(f"{self._name} ends in a line that is no {self._what}; {self._advice}")
        self._cut, self._next = bool(rest), len(lines) + 1
        self._ends[-1] = end  # with blank lines behind it

    def _row(self, text: str, number: int) -> dict:
        row = parse_json(text, self._name, number)
        if not isinstance(row, dict):
            raise ValueError(f"{self._name}, line {number} is no {self._what}, but {text[:40]!r}")
        return row

    def refused(self, place: int, reason: str = "") -> ValueError:
        """The error, after closing, for the row at this place, counted from 0."""
        self.close()
        return ValueError(f"{self._name}, line {self._numbers[place]} is no {self._what}{reason}; {self._advice}")

    def write(self, row: dict) -> None:
        """Add a row; on an OSError the file is as it was. A number that JSON does not have is null."""
        row = finite(row)
        line = json.dumps(row, default=str, allow_nan=False).encode() + b"\n"
        if self._cut:
            self._truncate()
        try:
            left = line
            while left:  # a disk that is nearly full takes a part: the next attempt says so
                left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # a device has no length
                self._truncate()
            raise
        self.rows.append(row)
        self._ends.append(self._ends[-1] + len(line))
        self._numbers.append(self._next)
        self._next += 1

    def keep(self, count: int) -> None:
        """Drop all rows but the first ``count``, and what stands behind them."""
        if count < len(self.rows):
            self._next = self._numbers[count - 1] + 1 if count else 1
        del self.rows[count:], self._ends[count + 1 :], self._numbers[count:]
        self._truncate()

    def _truncate(self) -> None:
        self._file.truncate(self._ends[-1])
        self._cut = False

    def close(self) -> None:
        self._file.close()


def own_file(path: Path) -> BinaryIO:
    """A file for `JsonLines`, made if it is not there.

    ValueError for a path that is no file of its own: a link's target, a pipe or a file that also has another name would be changed with it.
    OSError: the disk.
    """
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


def claimed(file: FileT, taken: str) -> FileT:
    """An open file, locked for this process until it is closed or the process ends, however it does. ValueError if another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(taken) from None
    return file


def finite(value: Any) -> Any:
    """The value with null for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
