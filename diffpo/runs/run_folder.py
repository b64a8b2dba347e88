"""The folder of a run: who may write to it, what may be deleted, and what a resumed run must agree with.

- A run is known by its marker, which the run itself writes. A folder without one is never written to, unless it is empty.
- Only what a run writes is deleted; of the code beside a model, what the marker names. A folder that holds anything else as well is not cleared at all; the message names what it is.
- Where a run writes there is no link: it would be followed to somebody's file.
- The marker says whether a run has begun. What a start that was killed left behind, or half of a deletion, is nobody's work: the next
  start deletes it, under any flag.
"""

import contextlib
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from diffpo.models.file_replacement import write_atomically
from diffpo.runs.faults import DISK_FAULTS
from diffpo.runs.json_lines import claimed
from diffpo.runs.run_files import (
    CONFIG,
    FORMAT,
    LEFTOVER,
    LOCK,
    MARKER,
    Marker,
    delete,
    foreign,
    is_unused,
    read_marker,
)

_FREE = ("runs", "name", "resume", "overwrite", "dry_run")  # of every command


@dataclass(frozen=True)
class MayChange:
    """What may differ between a run and its continuation.

    free: settings that say where or whether to run, not what is computed, beside those of the folder itself. never: settings that
    cannot change, with the reason. others: all other settings and the inputs may, because the user said so. advice: what to do if not.
    renamed: what settings of earlier versions are called now, in any table.
    """

    free: Collection[str] = ()
    never: Mapping[str, str] = field(default_factory=dict)
    others: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    advice: str = "; start again with --overwrite"


class ClaimedFolder(ABC):
    """A folder that no other run can take until it is released."""

    path: Path

    @abstractmethod
    def release(self) -> None:
        """Let another run claim the folder."""

    @contextlib.contextmanager
    def released_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


class RunFolder(ClaimedFolder):
    """<runs>/<name>, claimed by one process of ``command`` as long as it lives. Nothing is written before ``begin`` but the lock.

    settings: of the run, as JSON values. inputs: digests of the contents that it reads, by name, such as the model's weights. carried:
    names of the files that came with the model and are saved with it. resume, overwrite: what the user wants. job: the start of torchrun;
    what the same one has begun is continued, after a restart, whatever the user wants.
    Raises ValueError when the folder is another's, in use, used without --resume or --overwrite, or when a run to resume had other
    settings or inputs; OSError when the disk is at fault.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        settings: dict[str, Any],
        inputs: dict[str, str],
        carried: Collection[str] = (),
        *,
        resume: bool = False,
        overwrite: bool = False,
        may_change: MayChange = MayChange(),
        job: str = "",
    ):
        self.path, self.command, self.settings, self.inputs, self._job = path, command, settings, inputs, job
        self._resume, self._overwrite, self._may_change, self._carried = resume, overwrite, may_change, set(carried)
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if self._restarted():
            self._resume, self._overwrite = resume, overwrite = True, False
        try:
            self._marker()  # before anything is touched
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
        except OSError as error:
            if error.errno in DISK_FAULTS:
                raise
            raise ValueError(f"output folder {self.path} is not writable: {error.strerror}") from error
        with self.released_on_error():
            marker = self._marker()  # another run may have come in between
            self._carried_before = set(marker.carried) if marker else set()
            self.resumes = resume and marker is not None and marker.begun
            self._changed = marker is not None and self.resumes and self._check_same(marker)

    def release(self) -> None:
        self._lock.close()

    def begin(self) -> None:
        """Make the folder that of this run: what an earlier one wrote is deleted, or, on a resume, what was left half-written."""
        if self.resumes:
            delete(self.path, only=LEFTOVER)
            if self._changed:
                (self.path / "base.json").unlink(missing_ok=True)  # it may have been made on other problems
        else:
            self._mark(begun=False)
            delete(self.path)
            self._carried_before = set()
        self.write(CONFIG, json.dumps(self.settings, indent=2) + "\n")
        self._mark(begun=True)

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run; it is whole or as it was."""
        write_atomically(self.path / name, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def _mark(self, begun: bool) -> None:
        marker = Marker(
            self.command, begun, self.inputs, tuple(sorted(self._carried | self._carried_before)), self._job
        )
        self.write(MARKER, json.dumps({"format": FORMAT} | asdict(marker), indent=2) + "\n")

    def _restarted(self) -> bool:
        """Whether the run in the folder was begun by the same start of torchrun."""
        if not self._job or not os.path.lexists(self.path / MARKER):
            return False
        marker = read_marker(self.path)
        return marker.begun and marker.job == self._job

    def _marker(self) -> Marker | None:
        """The marker in the folder, None where no run has been. ValueError unless this run may have the folder."""
        path = self.path
        if path.is_symlink():
            raise ValueError(f"output folder {path} is a link: give the folder itself, with --runs and --name")
        if not path.exists():
            if self._resume:
                raise ValueError(f"resume: {path} holds no run to continue")
            return None
        if not path.is_dir():
            raise ValueError(f"output folder {path} is a file")
        if not os.path.lexists(path / MARKER):
            if not is_unused(path):
                raise ValueError(self._not_a_run())
            return None
        marker = read_marker(path)
        if marker.command != self.command:
            raise ValueError(f"output folder {path} holds a run of diffpo.{marker.command}: --name picks another")
        if marker.begun and not (self._resume or self._overwrite):
            raise ValueError(
                f"output folder {path} is already used: --resume continues it, --overwrite deletes it, --name picks another"
            )
        others = foreign(path, marker.carried)
        if others and not (self._resume and marker.begun):
            raise ValueError(
                f"output folder {path} also holds what no run wrote ({', '.join(others[:5])}), so it is not cleared: move that away "
                "or pick another --name"
            )
        return marker

    def _not_a_run(self) -> str:
        fix = "move it away or pick another --name"
        if self._resume:
            return f"resume: {self.path} holds no run to continue: it has no {MARKER}, which a run writes; {fix}"
        if self._overwrite:
            return f"overwrite: {self.path} holds files but no run of this command: it has no {MARKER}, which a run writes; {fix}"
        return f"output folder {self.path} is already used, and not by a run (--resume and --overwrite are for runs): {fix}"

    def _check_same(self, marker: Marker) -> bool:
        """Whether anything differs from the run to resume, and may. ValueError if it may not."""
        may, free = self._may_change, {*_FREE, *self._may_change.free}
        changes = differences(_by_their_names(self._settings_before(), may.renamed), self.settings)
        settings = [
            change for change in changes if not any(change.startswith((f"{name}:", f"{name}.")) for name in free)
        ]
        inputs = differences(marker.inputs, self.inputs)
        reasons = {change: why for name, why in may.never.items() for change in settings if change.startswith(name)}
        if may.others and reasons:
            raise ValueError(f"resume: {'; '.join(reasons)}: {'; '.join(dict.fromkeys(reasons.values()))}")
        if (settings or inputs) and not may.others:
            found = [("the configuration changed", settings), ("the files changed", inputs)]
            raise ValueError(
                f"resume: {'; '.join(f'{what}: ' + '; '.join(by) for what, by in found if by)}{may.advice}"
            )
        return bool(settings or inputs)

    def _settings_before(self) -> dict:
        path = self.path / CONFIG
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"resume: {path} is not readable ({error}); start again with --overwrite") from error
        if not isinstance(before, dict):
            raise ValueError(f"resume: {path} is no configuration; start again with --overwrite")
        return before


def _locked(path: Path) -> FileIO:
    """The lock of a folder, held until the process ends, however it does. The file is never written to or emptied."""
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    lock = os.fdopen(handle, "rb+", buffering=0)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise ValueError(f"output folder {path}: {LOCK} is no file: remove it")
    return claimed(lock, f"output folder {path} is in use by another run")


def _by_their_names(settings: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    return {
        renamed.get(name, name): _by_their_names(value, renamed) if isinstance(value, dict) else value
        for name, value in settings.items()
    }


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Values of nested tables that differ, as "name: old -> new"."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found
