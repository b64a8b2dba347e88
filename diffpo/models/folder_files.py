"""Reading the files of a checkpoint folder that somebody else may have made: only regular files of the folder, bounded, never followed
out of it."""

import json
import os
import reprlib
import stat
from pathlib import Path

JSON_BYTES = 4 * 2**20  # the index of an 8B model takes 30 kB; parsed, the worst content takes 100 MB
JSON_DEPTH = 64
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def find(folder: Path, name: str) -> Path | None:
    """The regular file ``name`` of a folder, or None when there is none.

    ValueError, before anything is opened: a folder, pipe or device of that name, or a link out of the folder. Links into the
    blobs beside a snapshot are the layout of the hub's cache, and pass. ValueError too for a file that cannot be read, or that
    git-lfs has not fetched.
    """
    path = folder / name
    try:
        status = os.stat(path)
        real = os.path.realpath(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"{shown(str(path))} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not any(real.startswith(root + os.sep) for root in _roots(folder)):
        raise ValueError(
            f"{path} is a link to {real}, outside of the folder; such links are not followed: put the file itself there"
        )
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file")
    if read_start(path, len(_LFS_POINTER)) == _LFS_POINTER:
        raise ValueError(f"{path} is a git-lfs pointer instead of the file: run 'git lfs pull' in the repository")
    return path


def read_start(path: Path, count: int) -> bytes:
    """At most the first ``count`` bytes of a regular file; ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file; ValueError if it is larger than ``limit`` bytes."""
    size = os.path.getsize(path)
    if size > limit:
        raise ValueError(f"{path} has {size} bytes; at most {limit} are read")
    return read_start(path, limit)


def read_json(path: Path, limit: int = JSON_BYTES) -> dict:
    """The JSON object in a file. FileNotFoundError: no such file. ValueError, naming the file: anything ``find`` refuses,
    more than ``limit`` bytes, no JSON object, a key that stands twice, or more than 64 levels."""
    if find(path.parent, path.name) is None:
        raise FileNotFoundError(f"{path} does not exist")
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(content: bytes | str, where: str) -> dict:
    """The JSON object in ``content``; ValueError that starts with ``where`` if it holds anything else."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        fields = json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError(f"{where} is nested more than {JSON_DEPTH} levels deep") from error
    except ValueError as error:  # bad JSON, bad UTF-8 or an integer of thousands of digits
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(fields).__name__}")
    _refuse_depth(fields, where)
    return fields


def shown(value: object) -> str:
    """repr, cut to a length that fits into one line of a message."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def _roots(folder: Path) -> list[str]:
    """The folders that the files of a checkpoint folder may lie in."""
    root = os.path.realpath(folder)
    repository, kind = os.path.split(os.path.dirname(root))
    return [root, os.path.join(repository, "blobs")] if kind == "snapshots" else [root]


def _without_repetition(pairs: list[tuple]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands there twice")
            seen.add(key)
    return fields


def _refuse_depth(fields: dict, where: str) -> None:
    level: list[dict | list] = [fields]
    depth = 0
    while level:
        depth += 1
        if depth > JSON_DEPTH:
            raise ValueError(f"{where} is nested more than {JSON_DEPTH} levels deep")
        inner = [value for part in level for value in (part.values() if isinstance(part, dict) else part)]
        level = [value for value in inner if isinstance(value, (dict, list))]
