"""Completions as JSONL: one object per prompt, on disk as soon as its row is finished."""

import json
import math
import os
import sys
from collections.abc import Collection
from pathlib import Path

from diffpo.decoding.generation import Generation
from diffpo.prompt_file import Prompt
from diffpo.runs.json_lines import JsonLines, claimed
from diffpo.runs.run_folder import differences
from diffpo.trajectory import Trajectory

_ROW_START = b'{"index": '  # of every line that `completion_record` makes


def completion_record(index: int, prompt: Prompt, completion: Generation, statistics: bool) -> dict[str, object]:
    """One finished row as JSON values; ``completion`` holds exactly that row, as streamed.

    text: up to the first EOS or stop string. tokens, commit_step: all L positions, as in ``Trajectory``; ``length`` of them count (up to
    and including the first EOS). seconds: as in ``Generation``, the row's time in the batch; tokens_per_forward = length / nfe,
    tokens_per_second = length / seconds. gamma: nats, null for rules without one. ``statistics`` adds each token's logprob and entropy (nats).
    """
    row = completion.trajectory
    length, nfe, text, seconds = int(row.length), int(row.nfe), completion.text, completion.seconds
    assert text is not None
    assert seconds is not None
    record: dict[str, object] = {
        "index": index,
        "prompt": prompt,
        "text": text[0],
        "length": length,
        "nfe": nfe,
        "tokens_per_forward": round(length / nfe, 4),
        "seconds": round(seconds, 6),
        "tokens_per_second": round(length / seconds, 2),
        "gamma": gamma_value(row),
        "tokens": row.tokens[0].tolist(),
        "commit_step": row.commit_step[0].tolist(),
    }
    if statistics:
        record["logprob"] = [round(value, 5) for value in row.logprob[0].tolist()]
        record["entropy"] = [round(value, 5) for value in row.entropy[0].tolist()]
    return record


def gamma_value(row: Trajectory) -> float | str | None:
    """The entropy bound of one row in nats as a JSON value: "inf" for no bound, null for rules without one."""
    gamma = float(f"{float(row.gamma):.6g}")  # fp32 0.1 as 0.1
    return None if math.isnan(gamma) else gamma if math.isfinite(gamma) else "inf"


class StandardOutput:
    """Rows to standard output."""

    earlier: tuple[dict, ...] = ()

    def write(self, record: dict) -> None:
        try:
            sys.stdout.write(json.dumps(record, allow_nan=False) + "\n")
            sys.stdout.flush()
        except OSError:  # what is still in its buffer must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise

    def close(self) -> None:
        pass


class CompletionFile:
    """Rows to a file that this process alone writes. ``earlier``: the rows a resumed file already holds.

    Each row says in ``settings`` what it was made with (model, rule, seed, ...), so that a file never holds rows of two kinds. The first
    that a process writes says in ``provenance`` by which command, where and when: it and the rows behind it, up to the next that does.
    An existing file is refused unless ``overwrite`` or ``resume`` (continued; half a line at its end is dropped). Nothing is changed
    before the first new row, so a run that fails before loses nothing. ValueError for every file that cannot be written or continued.
    """

    def __init__(self, path: Path, overwrite: bool = False, resume: bool = False):
        self.path = path
        check_target("output", path)
        self._new = not path.exists()
        if not self._new and path.stat().st_size and not (overwrite or resume):
            raise ValueError(f"output {path} exists: --resume continues it, --overwrite replaces it")
        try:
            file = path.open("ab+", buffering=0)  # nothing is left to fail when it is closed
        except OSError as error:
            raise ValueError(f"output {path} is not writable: {error.strerror}") from error
        claimed(file, f"output {path} is being written by another process")
        self._settings: dict[str, object] = {}
        self._provenance: dict[str, object] = {}
        fresh = self._new or not resume
        self._lines = JsonLines(
            file, f"output {path}", "completion of this command", "it cannot be resumed", _ROW_START, fresh
        )
        seen: set[int] = set()
        for place, row in enumerate(self._lines.rows):
            if reason := _fault(row, seen):
                raise self._lines.refused(place, reason)
            seen.add(row["index"])
        self.earlier = tuple(self._lines.rows)

    def begin(self, settings: dict[str, object], provenance: dict[str, object]) -> None:
        """What the rows to come are made with, and where, as JSON values. ValueError if the rows before them were made with other settings."""
        self._settings, self._provenance = settings, {"provenance": provenance}
        for row in self.earlier:
            if "settings" not in row:
                raise ValueError(
                    f"resume: {self.path} does not say what its rows were made with, as an older version wrote it: give another output, or "
                    "--overwrite"
                )
            before = row["settings"]
            before = before | {"rule": str(before.get("rule")).replace("proxy=", "order=")}  # which was its name
            if changes := differences(before, settings):
                raise ValueError(
                    f"resume: {self.path} was made with other settings: {'; '.join(changes)}; give another output, or the same settings"
                )

    def write(self, record: dict) -> None:
        self._lines.write(record | {"settings": self._settings} | self._provenance)
        self._provenance = {}

    def close(self) -> None:
        """Close; a file that this run created and wrote nothing into is removed again."""
        self._lines.close()
        if self._new and self.path.exists() and self.path.stat().st_size == 0:
            self.path.unlink()


def _fault(row: dict, seen: Collection[int]) -> str | None:
    """Why a row behind those of the indices ``seen`` is none of this command, for the end of a sentence; None if it is one."""
    if not {"index", "prompt", "tokens", "commit_step"} <= row.keys():
        return ": it lacks a field"
    if type(row["index"]) is not int or not isinstance(row.get("settings", {}), dict):
        return ": index must be an integer, settings an object"
    for name in ("tokens", "commit_step"):
        if not isinstance(row[name], list) or any(type(value) is not int for value in row[name]):
            return f": {name} must be a list of integers"
    return f": it holds index {row['index']} twice" if row["index"] in seen else None


def check_target(name: str, path: Path) -> None:
    """ValueError unless a file can stand at ``path``."""
    if not os.path.isdir(path.parent):
        raise ValueError(f"{name}: the folder {path.parent} does not exist: create it first")
    if os.path.isdir(path):
        raise ValueError(f"{name}: {path} is a folder: give a file")
    try:
        path.stat()
    except FileNotFoundError:
        pass  # it is to be made
    except OSError as error:  # its name is too long, it is a link to itself, ...
        raise ValueError(f"{name} {path}: {error.strerror}: give another file") from error
