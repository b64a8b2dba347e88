"""The course of a command: prepare, work, and end with one line and the right exit code, whatever happens (``faults``)."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from diffpo.runs.faults import DISK_FAULTS, DONE, INTERRUPTED, STOPPED, ProcessError, described, fail, say, stopped
from diffpo.runs.interruption import Interruption

_OF_THE_MACHINE = (OSError, MemoryError, torch.OutOfMemoryError, ProcessError)
_NO_MEMORY_ON_THE_CPU = "can't allocate memory"


class Run(ABC):
    """A command at work. Everything that can be the user's mistake was found before it is made."""

    faults: tuple[type[Exception], ...] = ()
    """that end it with exit code 1, beside those of the machine"""

    def __init__(self) -> None:
        self.interruption = Interruption()

    @abstractmethod
    def work(self) -> None:
        """Do what is to do. Return early, or let a KeyboardInterrupt through, when it is interrupted; all that is done is then saved."""

    @abstractmethod
    def progress(self) -> str:
        """How far it is: "after update 3"."""

    @abstractmethod
    def kept(self) -> str:
        """Where that is and how to go on; empty if it is nowhere."""

    def report(self) -> None:  # noqa: B027
        """What was done, also after an interruption or a fault."""

    def close(self) -> None:  # noqa: B027
        """Give back what is held."""


def carry_out(prepare: Callable[[], Run | None]) -> int:
    """The exit code of the run that ``prepare`` makes, 0 if it makes none.

    prepare: raises ValueError or OSError for a user's mistake, before anything is changed.
    """
    try:
        run = prepare()
    except KeyboardInterrupt:
        return stopped("before the start: interrupted", INTERRUPTED)
    except BrokenPipeError:
        return STOPPED
    except Exception as error:
        if _is_of_the_machine(error):
            return stopped(f"before the start: {described(error)}")
        if isinstance(error, ValueError | OSError):
            fail(described(error))
        raise
    if run is None:
        return DONE
    try:
        with run.interruption:
            return _carried_out(run)
    finally:
        run.close()


def _carried_out(run: Run) -> int:
    interrupted, fault = _ending(run.work, run.faults)
    interrupted = interrupted or run.interruption.requested
    fault = _ending(run.report, ())[1] or fault
    kept = "".join(f"; {words}" for words in [run.kept()] if words)
    if isinstance(fault, BrokenPipeError):  # the reader of standard output is gone, e.g. head: nobody asks why
        return STOPPED
    if fault is not None:
        return stopped(f"{run.progress()}: {described(fault)}{kept}")
    if not interrupted:
        return DONE
    say(f"interrupted {run.progress()}{kept}")
    return DONE if kept else INTERRUPTED


def _ending(act: Callable[[], None], faults: tuple[type[Exception], ...]) -> tuple[bool, Exception | None]:
    """Whether it was interrupted, and the fault that ended it."""
    try:
        act()
    except KeyboardInterrupt:
        return True, None
    except Exception as error:
        if isinstance(error, (*_OF_THE_MACHINE, *faults)) or _lacks_memory(error):
            return False, error
        raise
    return False, None


def _is_of_the_machine(error: Exception) -> bool:
    """Before a run has begun: what no other flag would have avoided."""
    if isinstance(error, OSError):
        return error.errno in DISK_FAULTS
    if isinstance(error, ValueError):
        return False
    return isinstance(error, MemoryError | torch.OutOfMemoryError | ProcessError) or _lacks_memory(error)


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and _NO_MEMORY_ON_THE_CPU in str(error)
