"""Completions as JSONL: one object per prompt, on disk as soon as its row is finished."""

import fcntl
import json
import math
import sys
from pathlib import Path

from diffpo.decoding.generation import Generation
from diffpo.prompt_file import Prompt
from diffpo.trajectory import Trajectory

_ROW_START = '{"index": '  # of every line that `completion_record` makes


def completion_record(index: int, prompt: Prompt, completion: Generation, statistics: bool) -> dict[str, object]:
    """One finished row as JSON values; ``completion`` holds exactly that row, as streamed.

    text: up to the first EOS. tokens, commit_step: all L positions, as in ``Trajectory``; ``length`` of them count (up to
    and including the first EOS). seconds: as in ``Generation``, the row's time in the batch; tokens_per_forward = length / nfe,
    tokens_per_second = length / seconds. gamma: nats, null for rules without one. ``statistics`` adds each token's logprob and entropy (nats).
    """
    row = completion.trajectory
    length, nfe, seconds = int(row.length), int(row.nfe), completion.seconds
    record = {
        "index": index,
        "prompt": prompt,
        "text": completion.text[0],
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
        sys.stdout.write(json.dumps(record, allow_nan=False) + "\n")
        sys.stdout.flush()

    def close(self) -> None:
        pass


class CompletionFile:
    """Rows to a file that this process alone writes. ``earlier``: the rows a resumed file already holds.

    An existing file is refused unless ``overwrite`` (emptied at the first new row, so a run that fails before loses nothing) or ``resume``
    (continued; half a line at its end is dropped). ValueError for every file that cannot be written or continued.
    """

    def __init__(self, path: Path, overwrite: bool = False, resume: bool = False):
        self.path = path
        check_target("output", path)
        self._new = not path.exists()
        if not self._new and path.stat().st_size and not (overwrite or resume):
            raise ValueError(f"output {path} exists: --resume continues it, --overwrite replaces it")
        try:
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"output {path} is not writable: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, however the process ends
        except BlockingIOError:
            raise ValueError(f"output {path} is being written by another process") from None
        self._empty_first = overwrite
        self.earlier = self._read_earlier() if resume else ()

    def _read_earlier(self) -> tuple[dict, ...]:
        self._file.seek(0)
        try:
            complete, end, rest = self._file.read().rpartition("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"output {self.path} is not UTF-8, so it cannot be resumed: {error}") from error
        rows = tuple(
            _read_row(line, f"output {self.path}, line {n}")
            for n, line in enumerate(complete.split("\n") if complete else (), 1)
        )
        if rest:  # a killed run may leave half a line; anything else is not ours to drop
            if not rest.startswith(_ROW_START[: len(rest)]):
                raise ValueError(f"output {self.path} ends in a line that is no completion, so it cannot be resumed")
            self._file.truncate(len((complete + end).encode()))
        return rows

    def write(self, record: dict) -> None:
        if self._empty_first:
            self._file.truncate(0)
            self._empty_first = False
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close; a file that this run created and wrote nothing into is removed again."""
        self._file.close()
        if self._new and self.path.exists() and self.path.stat().st_size == 0:
            self.path.unlink()


def _read_row(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON, so it cannot be resumed: {error}") from error
    known = isinstance(row, dict) and {"index", "prompt", "tokens", "commit_step"} <= row.keys()
    if not known or not isinstance(row["index"], int):
        raise ValueError(f"{place} is no completion of this command, so it cannot be resumed")
    return row


def check_target(name: str, path: Path) -> None:
    """ValueError unless a file can stand at ``path``."""
    if not path.parent.is_dir():
        raise ValueError(f"{name}: the folder {path.parent} does not exist: create it first")
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder: give a file")
