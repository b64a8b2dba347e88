"""The folder of a run: who may write to it, what may be deleted, and what a resumed run must agree with.

- A run is known by its marker, which the run itself writes. A folder without one is never written to, unless it is empty.
- Only what a run writes is deleted; of the code beside a model, what the marker names. A folder that holds anything else as well is not cleared at all; the message names what it is.
- Where a run writes there is no link: it would be followed to somebody's file.
- The marker says whether a run has begun. What a start that was killed left behind, or half of a deletion, is nobody's work: the next
  start deletes it, under any flag.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpo.config import one_line
from diffpo.models.file_replacement import write_atomically
from diffpo.models.threshold_file import THRESHOLD
from diffpo.models.tokenizer_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from diffpo.evaluate import EvaluateConfig
    from diffpo.training.config import TrainConfig

MARKER, LOCK, CONFIG = ".diffpo-run", ".lock", "config.json"
_FORMAT = 1  # of the marker
_MARKER_BYTES = 2**16
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # of the machine, where others are a user's mistake

# Everything a run writes, as paths within its folder. The parts of _LEFTOVER are temporary: a run that ends by itself leaves none.
_TOP = r"(?:config\.json|base\.json|metrics\.jsonl|items\.jsonl|summary\.json|curves\.png|\.diffpo-run)"
_OF_MODEL = (
    r"(?:model[-\w]*\.safetensors(?:\.index\.json)?|optimizer\.safetensors|state\.json|manifest\.json|config\.json"
    r"|generation_config\.json|[^/]+\.py|" + "|".join(map(re.escape, (THRESHOLD, *TOKENIZER_FILES))) + ")"
)
_FOLDER = re.compile(r"checkpoints(/\d{6,})?|model|tensorboard")
_FILE = re.compile(rf"\.lock|{_TOP}|(model|checkpoints/\d{{6,}})/{_OF_MODEL}|tensorboard/events\.out\.tfevents\.[^/]+")
_LEFTOVER = re.compile(
    rf"\.{_TOP}\.[0-9a-f]{{8}}|checkpoints/\.\d{{6,}}\.partial|(model|checkpoints/\d{{6,}})/\.saving-\w+"
)
_CODE = re.compile(r"(?:model|checkpoints/\d{6,})/([^/]+\.py)")  # of any name: written only if it came with the model
_EMPTY = re.compile(
    r"\.lock|\.\.diffpo-run\.[0-9a-f]{8}"
)  # what a start leaves that was killed before its marker was whole

# Fields that say where or whether to run, not what the run computes. The content of model and data is compared instead of their names.
_FREE_ON_RESUME = {
    *("resume", "overwrite", "allow_config_change", "dry_run", "max_minutes", "save_every", "name", "runs"),
    *("batch_size", "device", "model", "revision", "data", "instruction"),
}
_NEVER_CHANGED = ("algorithm.name", "algorithm.train")  # a checkpoint holds the state of one algorithm


@dataclass(frozen=True)
class Marker:
    """command: that the run belongs to; begun: there is something to resume; inputs: digests of what it reads, by name; carried: names
    of the files that came with its model and are saved with it."""

    command: str
    begun: bool
    inputs: dict[str, str]
    carried: tuple[str, ...]


class RunFolder:
    """<runs>/<name>, claimed by one process of ``command`` as long as it lives. Nothing is written before ``begin`` but the lock.

    inputs: digests of the contents that the run reads, by name, such as the model's weights. carried: names of the files that came with
    the model and are saved with it.
    Raises ValueError when the folder is another's, in use, used without --resume or --overwrite, or when a run to resume had other
    settings or inputs; OSError when the disk is at fault.
    """

    def __init__(
        self,
        command: str,
        config: "TrainConfig | EvaluateConfig",
        inputs: dict[str, str],
        carried: Collection[str] = (),
    ):
        self.path = Path(config.runs) / config.name
        self.command, self.config, self.inputs, self._carried = command, config, inputs, set(carried)
        if config.resume and config.overwrite:
            raise ValueError("resume and overwrite exclude each other")
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
            self.resumes = config.resume and marker is not None and marker.begun
            self._changed = self.resumes and self._check_same(marker)

    def release(self) -> None:
        """Let another process claim the folder."""
        self._lock.close()

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

    def begin(self) -> None:
        """Make the folder that of this run: what an earlier one wrote is deleted, or, on a resume, what was left half-written."""
        if self.resumes:
            _delete(self.path, only=_LEFTOVER)
            if self._changed:
                (self.path / "base.json").unlink(missing_ok=True)  # it may have been made on other problems
        else:
            self._mark(begun=False)
            _delete(self.path)
            self._carried_before = set()
        self.write(CONFIG, self.config.model_dump_json(indent=2) + "\n")
        self._mark(begun=True)

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run; it is whole or as it was."""
        write_atomically(self.path / name, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def _mark(self, begun: bool) -> None:
        marker = Marker(self.command, begun, self.inputs, tuple(sorted(self._carried | self._carried_before)))
        self.write(MARKER, json.dumps({"format": _FORMAT} | asdict(marker), indent=2) + "\n")

    def _marker(self) -> Marker | None:
        """The marker in the folder, None where no run has been. ValueError unless this run may have the folder."""
        path, config = self.path, self.config
        if path.is_symlink():
            raise ValueError(f"output folder {path} is a link: give the folder itself, with --runs and --name")
        if not path.exists():
            if config.resume:
                raise ValueError(f"resume: {path} holds no run to continue")
            return None
        if not path.is_dir():
            raise ValueError(f"output folder {path} is a file")
        if not os.path.lexists(path / MARKER):
            if any(not _EMPTY.fullmatch(entry.name) for entry in path.iterdir()):
                raise ValueError(self._not_a_run())
            return None
        marker = _read_marker(path)
        if marker.command != self.command:
            raise ValueError(f"output folder {path} holds a run of diffpo.{marker.command}: --name picks another")
        if marker.begun and not (config.resume or config.overwrite):
            raise ValueError(
                f"output folder {path} is already used: --resume continues it, --overwrite deletes it, --name picks another"
            )
        foreign = _foreign(path, marker.carried)
        if foreign and not (config.resume and marker.begun):
            raise ValueError(
                f"output folder {path} also holds what no run wrote ({', '.join(foreign[:5])}), so it is not cleared: move that away "
                "or pick another --name"
            )
        return marker

    def _not_a_run(self) -> str:
        fix = "move it away or pick another --name"
        if self.config.resume:
            return f"resume: {self.path} holds no run to continue: it has no {MARKER}, which a run writes; {fix}"
        if self.config.overwrite:
            return f"overwrite: {self.path} holds files but no run of this command: it has no {MARKER}, which a run writes; {fix}"
        return f"output folder {self.path} is already used, and not by a run (--resume and --overwrite are for runs): {fix}"

    def _check_same(self, marker: Marker) -> bool:
        """Whether anything differs from the run to resume, and may. ValueError if it may not."""
        before, now = _config_before(self.path / CONFIG), json.loads(self.config.model_dump_json())
        settings = _differences(*({k: v for k, v in c.items() if k not in _FREE_ON_RESUME} for c in (before, now)))
        inputs = _differences(marker.inputs, self.inputs)
        may_change = getattr(self.config, "allow_config_change", False)
        fixed = [change for change in settings if change.startswith(_NEVER_CHANGED)]
        if may_change and fixed:
            raise ValueError(
                f"resume: {'; '.join(fixed)}: the checkpoints are of another algorithm, which --allow-config-change cannot "
                "change; begin a new run from this one's model"
            )
        if (settings or inputs) and not may_change:
            # rows of an evaluation under two configurations have no meaning together; a training may go on under another
            trained = hasattr(self.config, "allow_config_change")
            hint = " (--allow-config-change resumes all the same)" if trained else "; start again with --overwrite"
            found = [("the configuration changed", settings), ("the files changed", inputs)]
            raise ValueError(f"resume: {'; '.join(f'{what}: ' + '; '.join(by) for what, by in found if by)}{hint}")
        return bool(settings or inputs)


def stopped(reason: str) -> int:
    """Exit code 1, with the reason in one line: a fault of the machine, not of the user."""
    with contextlib.suppress(OSError):  # the output itself may go to the full disk
        print(f"stopped {one_line(reason)}", file=sys.stderr)
    return 1


def _locked(path: Path):
    """The lock of a folder, held until the process ends, however it does. The file is never written to or emptied."""
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    lock = os.fdopen(handle, "rb+", buffering=0)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise ValueError(f"output folder {path}: {LOCK} is no file: remove it")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"output folder {path} is in use by another run") from None
    return lock


def _read_marker(path: Path) -> Marker:
    try:
        handle = os.open(path / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            content = json.loads(file.read(_MARKER_BYTES))
        carried = content.get("carried", [])  # which older versions did not write
        marker = Marker(content["command"], content["begun"], content["inputs"], tuple(carried))
        known = content["format"] == _FORMAT and isinstance(marker.begun, bool) and isinstance(marker.inputs, dict)
        known = known and isinstance(carried, list) and all(isinstance(name, str) for name in carried)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ValueError(
            f"output folder {path}: {MARKER} is not of this version of diffpo: move the folder away or pick another --name"
        )
    return marker


def _entries(path: Path, within: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """What the folder holds, folders after their content, by the path within it. What is not the run's is not looked into.

    ValueError for a link or a special file where the run writes.
    """
    with os.scandir(path / within) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = within + entry.name
        is_folder, is_file = entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False)
        if (_FOLDER.fullmatch(name) and not is_folder) or (_FILE.fullmatch(name) and not is_file):
            raise ValueError(f"output folder {path}: {name} is a link or something else than the run writes: remove it")
        if is_folder and _FOLDER.fullmatch(name):
            yield from _entries(path, f"{name}/")
        yield name, entry


def _foreign(path: Path, carried: Collection[str]) -> list[str]:
    """What a run does not write. carried: names of the files that came with its model."""
    return [name for name, _ in _entries(path) if not _written(name, carried)]


def _written(name: str, carried: Collection[str]) -> bool:
    code = _CODE.fullmatch(name)
    return code[1] in carried if code else any(pattern.fullmatch(name) for pattern in (_FOLDER, _FILE, _LEFTOVER))


def _delete(path: Path, only: re.Pattern | None = None) -> None:
    """Delete what a run wrote, or what matches ``only``; the marker and the lock stay, so that the folder stays the run's."""
    for name, entry in list(_entries(path)):
        if name in (MARKER, LOCK) or (only is not None and not only.fullmatch(name)):
            continue
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        elif _LEFTOVER.fullmatch(name):
            shutil.rmtree(entry.path)
        else:
            os.rmdir(entry.path)


def _config_before(config_file: Path) -> dict:
    try:
        before = json.loads(config_file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"resume: {config_file} is not readable ({error}); start again with --overwrite") from error
    if not isinstance(before, dict):
        raise ValueError(f"resume: {config_file} is no configuration; start again with --overwrite")
    return before


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Values of nested tables that differ, as "name: old -> new"."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found
