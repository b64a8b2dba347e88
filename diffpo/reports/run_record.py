"""A training's folder as it is: in progress, interrupted, finished or of an earlier version. Nothing is changed and no lock is taken."""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpo.runs.run_files import CONFIG, MARKER

_MOST_BYTES = 2**28  # of one file
_LARGEST = 1e300

Table = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """settings, base, summary: of config.json, base.json and summary.json, empty where there is none. lines: of metrics.jsonl, samples: of
    samples.jsonl, in order. inputs: digests of what was read. unreadable: what a file held that is no such thing, for the reader."""

    path: Path
    settings: Table
    lines: list[Table]
    samples: list[Table]
    base: Table
    summary: Table
    inputs: Table
    unreadable: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        name = self.settings.get("name")
        return name if isinstance(name, str) and name else self.path.resolve().name

    @property
    def updates(self) -> int:
        """That are done."""
        return int(number(self.lines[-1], "update") or 0) if self.lines else 0

    @property
    def planned(self) -> int:
        return int(number(self.settings, "updates") or 0)

    @property
    def finished(self) -> bool:
        """Whether the summary is of these updates: a run that was resumed for more has that of fewer."""
        return bool(self.summary) and number(self.summary, "updates") in (None, float(self.updates))


def read_run(path: Path) -> RunRecord:
    """ValueError for what is no folder of a training."""
    if not path.is_dir():
        raise ValueError(
            f"runs: {path} is {'no folder' if os.path.lexists(path) else 'not there'}: give the folder of a training"
        )
    notes: list[str] = []
    marker = _object(path / MARKER, [])
    command = marker.get("command", "train")  # versions before 0.2 wrote no marker
    if command != "train":
        raise ValueError(f"runs: {path} holds a run of diffpo.{command}: a report is of trainings")
    settings = _object(path / CONFIG, notes)
    if not isinstance(settings.get("algorithm"), dict):
        raise ValueError(
            f"runs: {path} holds no training: its {CONFIG} {'is not there' if not settings else 'names no algorithm'}"
        )
    lines = [line for line in _objects(path / "metrics.jsonl", notes) if number(line, "update") is not None]
    samples = [row for row in _objects(path / "samples.jsonl", notes) if number(row, "update") is not None]
    base, summary = _object(path / "base.json", notes), _object(path / "summary.json", notes)
    return RunRecord(path, settings, lines, samples, base, summary, table(marker, "inputs"), tuple(notes))


def number(values: Mapping[str, Any], *names: str) -> float | None:
    """A number in tables within tables, finite and no larger than a chart can take, else None."""
    value = _at(values, names)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if known and abs(value) < _LARGEST else None
    except OverflowError:
        return None


def table(values: Mapping[str, Any], *names: str) -> Table:
    value = _at(values, names)
    return value if isinstance(value, dict) else {}


def tables(values: Mapping[str, Any], *names: str) -> list[Table]:
    """The tables in a list."""
    value = _at(values, names)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text(values: Mapping[str, Any], *names: str) -> str:
    value = _at(values, names)
    return value if isinstance(value, str) else ""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tables within tables by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def _at(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    value: Any = values
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _object(path: Path, notes: list[str]) -> Table:
    content = _content(path, notes)
    if content is None:
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not readable")
        return {}
    return value


def _objects(path: Path, notes: list[str]) -> list[Table]:
    """Of a JSONL file; half a line at the end is being written, or was when the run was killed."""
    *lines, _ = (_content(path, notes) or b"").split(b"\n")
    found, bad = [], 0
    for line in filter(bytes.strip, lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} lines are not readable")
    return found


def _content(path: Path, notes: list[str]) -> bytes | None:
    """None without a file. A link, a pipe or a device is not read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{path.name}: {error.strerror}")
        return None
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST_BYTES:
        os.close(handle)
        notes.append(f"{path.name} is no file of a run")
        return None
    with os.fdopen(handle, "rb") as file:
        return file.read()
