"""The folders of a run's checkpoints: whole or absent under their names, newest first, each with a manifest of its files, old ones dropped."""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from diffpo.models.file_replacement import write_atomically
from diffpo.runs.run_files import names_of_model

KEPT = 2  # checkpoints; an older one survives a fault in the newest
STATE, MANIFEST = "state.json", "manifest.json"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; half-written ones carry another name and do not count."""
    found = (path for path in folder.glob("*") if re.fullmatch("[0-9]{6,}", path.name))
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=lambda p: int(p.name), reverse=True)


def completed(
    folder: Path, temporary: Path, texts: dict[str, dict], state: dict, digests: dict[str, str] | None = None
) -> None:
    """Give a checkpoint whose tensors are written its other files, among them ``texts``, and its name; then drop old ones. digests: of
    files, where they are known."""
    target, known = folder / f"{state['update']:06d}", digests or {}
    for name, values in texts.items():
        write_json(temporary / name, values)
    write_json(temporary / STATE, state)
    manifest = {path.name: known.get(path.name) or digest(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / MANIFEST, manifest)
    if target.is_dir():  # damaged, or it would have been resumed from
        _remove(target, [*_listed(target), *names_of_model(target)])
        if target.exists():
            raise OSError(f"{target} holds what no run wrote: move it away")
    os.replace(temporary, target)
    for old in [path for path in checkpoints(folder) if _listed(path)][KEPT:]:
        _remove(old, _listed(old))


def _remove(checkpoint: Path, names: Iterable[str]) -> None:
    """Delete these files, the manifest last, and the folder unless somebody else put anything into it."""
    with contextlib.suppress(OSError):
        for name in [*(set(names) - {MANIFEST}), MANIFEST]:
            (checkpoint / name).unlink(missing_ok=True)
        checkpoint.rmdir()


def _listed(checkpoint: Path) -> list[str]:
    """The files that its manifest names; none if it cannot be read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return [name for name in manifest if Path(name).name == name]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def digest(path: Path) -> str:
    """SHA-256 of a file; a link is not followed."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path.name} is no file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, allow_nan=False)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))
