"""What belongs to a run: the files it writes, by name, and its marker. Links are not followed, and what is not the run's is not touched."""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffpo.models.threshold_file import THRESHOLD
from diffpo.models.tokenizer_files import TOKENIZER_FILES

MARKER, LOCK, CONFIG = ".diffpo-run", ".lock", "config.json"
FORMAT = 1  # of the marker
_MARKER_BYTES = 2**16

# Everything a run writes, as paths within its folder. The parts of LEFTOVER are temporary: a run that ends by itself leaves none.
_TOP = r"(?:config\.json|base\.json|metrics\.jsonl|items\.jsonl|samples\.jsonl|summary\.json|curves\.png|report\.html|\.diffpo-run)"
_OF_MODEL = (
    r"(?:model[-\w]*\.safetensors(?:\.index\.json)?|(?:optimizer|trained|adapter_model|shard-[-\w]+)\.safetensors"
    r"|adapter_config\.json|state\.json|manifest\.json|sharded\.json|config\.json"
    r"|generation_config\.json|[^/]+\.py|" + "|".join(map(re.escape, (THRESHOLD, *TOKENIZER_FILES))) + ")"
)
_FOLDER = re.compile(r"checkpoints(/\d{6,})?|model|tensorboard")
_FILE = re.compile(rf"\.lock|{_TOP}|(model|checkpoints/\d{{6,}})/{_OF_MODEL}|tensorboard/events\.out\.tfevents\.[^/]+")
LEFTOVER = re.compile(
    rf"\.{_TOP}\.[0-9a-f]{{8}}|checkpoints/\.\d{{6,}}\.partial|(model|checkpoints/\d{{6,}})/\.saving-\w+"
)
_CODE = re.compile(r"(?:model|checkpoints/\d{6,})/([^/]+\.py)")  # of any name: written only if it came with the model
_EMPTY = re.compile(r"\.lock|\.\.diffpo-run\.[0-9a-f]{8}")  # of a start that was killed before its marker was whole


@dataclass(frozen=True)
class Marker:
    """command: that the run belongs to; begun: there is something to resume; inputs: digests of what it reads, by name; carried: names
    of the files that came with its model and are saved with it; job: the start of torchrun that it is of, empty without one."""

    command: str
    begun: bool
    inputs: dict[str, str]
    carried: tuple[str, ...]
    job: str = ""


def read_marker(path: Path) -> Marker:
    """The marker of a run's folder; ValueError if it is none of this version."""
    try:
        handle = os.open(path / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            content = json.loads(file.read(_MARKER_BYTES))
        carried = content.get("carried", [])  # which older versions did not write
        marker = Marker(content["command"], content["begun"], content["inputs"], tuple(carried), content.get("job", ""))
        known = content["format"] == FORMAT and isinstance(marker.begun, bool) and isinstance(marker.inputs, dict)
        known = known and isinstance(carried, list) and all(isinstance(name, str) for name in carried)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ValueError(
            f"output folder {path}: {MARKER} is not of this version of diffpo: move the folder away or pick another --name"
        )
    return marker


def is_unused(path: Path) -> bool:
    """Whether the folder holds nothing but what a start leaves that was killed at once."""
    return all(_EMPTY.fullmatch(entry.name) for entry in path.iterdir())


def foreign(path: Path, carried: Collection[str]) -> list[str]:
    """What a run does not write. carried: names of the files that came with its model."""
    return [name for name, _ in _entries(path) if not _written(name, carried)]


def delete(path: Path, only: re.Pattern | None = None) -> None:
    """Delete what a run wrote, or what matches ``only``; the marker and the lock stay, so that the folder stays the run's."""
    for name, entry in list(_entries(path)):
        if name in (MARKER, LOCK) or (only is not None and not only.fullmatch(name)):
            continue
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        elif LEFTOVER.fullmatch(name):
            shutil.rmtree(entry.path)
        else:
            os.rmdir(entry.path)


def names_of_model(folder: Path) -> list[str]:
    """The files of a checkpoint that carry the names that a run gives, without code, whose name may be any."""
    return [path.name for path in folder.iterdir() if re.fullmatch(_OF_MODEL, path.name) and path.suffix != ".py"]


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


def _written(name: str, carried: Collection[str]) -> bool:
    code = _CODE.fullmatch(name)
    return code[1] in carried if code else any(pattern.fullmatch(name) for pattern in (_FOLDER, _FILE, LEFTOVER))
