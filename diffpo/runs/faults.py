"""How a command ends. Its exit code says the same in every command; unless it is 0, one line on standard error says why.

Of several processes, which torchrun has started, all end alike, and the first says why.

0    done; or interrupted by Ctrl-C or SIGTERM, with all that was done saved
1    stopped by a fault that is not the user's: no space on the disk, no memory, numbers that are not finite, a task without a grade. What
     was done is whole and saved. Also, without a word, when the reader of standard output is gone, as head is after its lines
2    a user's mistake, found before anything was changed
130  interrupted when there was nothing to keep
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

DONE, STOPPED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # of the machine, where others are a user's mistake


class ProcessError(RuntimeError):
    """Another process of the same run has failed."""


def fail(message: str) -> NoReturn:
    """Report a user's mistake, in one line, and leave with exit code 2."""
    line = f"error: {one_line(message)}"
    say(line)
    error = SystemExit(MISTAKE)
    error.add_note(line)  # for the other processes of the run
    raise error


def stopped(reason: str, code: int = STOPPED) -> int:
    """The exit code, after the reason in one line."""
    say(f"stopped {one_line(reason)}")
    return code


@contextlib.contextmanager
def output_may_fail() -> Iterator[None]:
    """Around a whole program: exit code 1 where standard output cannot be written. Quietly where its reader is gone, in one line where the
    disk is full. A stream that is closed from the start, as by ``>&-``, is /dev/null."""
    _open_closed_streams()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # what was printed last may still be on its way
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno not in DISK_FAULTS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        before = error.__context__  # how the program was ending, if the flush failed
        if isinstance(before, SystemExit) and before.code:
            raise before from None
        if not isinstance(error, BrokenPipeError):
            stopped(f"at the end: {described(error)}")
        raise SystemExit(STOPPED) from None


def _open_closed_streams() -> None:
    """Before anything else is opened: it would take the number of the closed stream, and with it what is printed from C."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the program


def described(error: BaseException) -> str:
    """What happened, without Python's own notation for errors of the system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return str(error) or type(error).__name__


def one_line(message: str) -> str:
    return "; ".join(line.strip() for line in str(message).splitlines() if line.strip())


def say(line: str) -> None:
    """On standard error, if it can be written."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        return  # of several processes the first speaks
    with contextlib.suppress(OSError):  # the output itself may go to the full disk
        print(line, file=sys.stderr)
