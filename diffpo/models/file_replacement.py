"""Replacing files so that a fault on the way leaves the old ones."""

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def replace_files(new: Path, folder: Path, backup: Path, stale: Iterable[str], last: str) -> None:
    """Move the files of ``new`` into ``folder``, ``last`` last, then remove the ``stale`` ones. An error restores all.

    The three folders share a file system; ``backup`` is empty.
    """
    arriving = sorted((path.name for path in new.iterdir()), key=lambda name: (name == last, name))
    stale = sorted(set(stale) - set(arriving))
    mode = create(backup / ".mode")
    (backup / ".mode").unlink()
    for name in arriving:
        with open(new / name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(new / name, mode)
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


def write_atomically(target: Path, write: Callable[[str], object]) -> None:
    """Call ``write(path)`` on a temporary file beside ``target``, flush it to disk, then rename it over ``target``.

    OSError, with nothing changed, when the disk cannot take it.
    """
    start = target.name[:50]  # a long name and more would be longer than a file's name may be
    temporary = target.with_name(f".{start}.{secrets.token_hex(4)}")
    mode = create(temporary)
    try:
        with disk_faults(target):
            write(str(temporary))
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """A fault of the disk within is an OSError that names ``path``, or what it named itself.

    safetensors and tokenizers, which are written in Rust, raise other types for it: only the text says which error of the system it was.
    """
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if code is None or getattr(error, "filename", None):
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def create(path: Path) -> int:
    """Make an empty file that is not there yet, and return its mode: what the umask leaves.

    Only a new file tells the umask without changing it for other threads. safetensors gives its files 0600 whatever the umask.
    """
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
