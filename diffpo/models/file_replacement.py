"""Replacing files so that a fault on the way leaves the old ones."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def replace_files(new: Path, folder: Path, backup: Path, stale: Iterable[str], last: str) -> None:
    """Move the files of ``new`` into ``folder``, ``last`` last, then remove the ``stale`` ones. An error restores all.

    The three folders share a file system; ``backup`` is empty.
    """
    arriving = sorted((path.name for path in new.iterdir()), key=lambda name: (name == last, name))
    stale = sorted(set(stale) - set(arriving))
    for name in arriving:
        with open(new / name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(new / name, _permissions())
    for name in [*arriving, *stale]:
        if os.path.lexists(folder / name):
            os.link(folder / name, backup / name, follow_symlinks=False)
    try:
        for name in arriving:
            os.replace(new / name, folder / name)
        for name in stale:
            (folder / name).unlink()
    except BaseException:
        for name in [*arriving, *stale]:
            if os.path.lexists(backup / name):
                os.rename(backup / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise


def write_atomically(target: Path, write) -> None:
    """Call ``write(path)`` on a temporary file beside ``target``, flush it to disk, then rename it over ``target``."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, _permissions())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _permissions() -> int:
    """Those of a new file under the process's umask, which can be read only by setting it: for a moment, to the strictest."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask
