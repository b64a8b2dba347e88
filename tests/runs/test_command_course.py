"""However a command ends: its exit code, one line, and what it holds is given back."""

import errno
import os
import signal

import pytest

from diffpo.runs import command
from diffpo.runs.faults import described

FULL = OSError(errno.ENOSPC, "No space left on device")


class Run(command.Run):
    faults = (ArithmeticError,)

    def __init__(self, act=lambda run: None, kept="it is saved", report=lambda: None):
        super().__init__()
        self.act, self.words, self.done, self.closed, self.report = act, kept, 0, False, report

    def work(self):
        while self.done < 3 and not self.interruption.requested:
            self.act(self)
            self.done += 1

    def progress(self):
        return f"after {self.done} of 3"

    def kept(self):
        return self.words

    def close(self):
        self.closed = True


def raises(error):
    def act(run):
        raise error

    return act


def interrupts(number):
    return lambda run: os.kill(os.getpid(), number)


def at_once(run):
    with run.interruption.at_once():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("run", "code", "line"),
    [
        (Run(), 0, ""),
        (Run(interrupts(signal.SIGINT)), 0, "interrupted after 1 of 3; it is saved"),
        (Run(interrupts(signal.SIGTERM)), 0, "interrupted after 1 of 3; it is saved"),
        (Run(at_once), 0, "interrupted after 0 of 3; it is saved"),
        (Run(at_once, kept=""), 130, "interrupted after 0 of 3"),
        (Run(raises(FULL)), 1, "stopped after 0 of 3: No space left on device; it is saved"),
        (Run(raises(MemoryError())), 1, "stopped after 0 of 3: there is not enough memory; it is saved"),
        (Run(raises(ZeroDivisionError("one\ntwo")), kept=""), 1, "stopped after 0 of 3: one; two"),
        (Run(raises(BrokenPipeError())), 1, ""),
        (Run(interrupts(signal.SIGINT), report=lambda: raises(FULL)(None)), 1,
         "stopped after 1 of 3: No space left on device; it is saved"),
    ],
)  # fmt: skip
def test_how_a_run_ends(run, code, line, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert command.carry_out(lambda: run) == code
    assert capsys.readouterr().err == (f"{line}\n" if line else "")
    assert run.closed
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_fault_of_ours_is_not_hidden():
    run = Run(raises(KeyError("x")))
    with pytest.raises(KeyError):
        command.carry_out(lambda: run)
    assert run.closed


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("seed: too large"), 2, "error: seed: too large"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "error: x: File name too long"),
        (FULL, 1, "stopped before the start: No space left on device"),
        (MemoryError(), 1, "stopped before the start: there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1,
         "stopped before the start: DefaultCPUAllocator: can't allocate memory"),
        (KeyboardInterrupt(), 130, "stopped before the start: interrupted"),
        (BrokenPipeError(), 1, ""),
    ],
)  # fmt: skip
def test_what_is_found_before_the_start(error, code, line, capsys):
    def prepare():
        raise error

    try:
        found = command.carry_out(prepare)
    except SystemExit as stopped:
        found = stopped.code
    assert found == code
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


def test_nothing_to_do_is_done():
    assert command.carry_out(lambda: None) == 0


def test_errors_are_described_without_their_numbers():
    assert described(OSError(errno.EACCES, "Permission denied", "/x")) == "/x: Permission denied"
    assert described(FileNotFoundError("model 'x' is not there")) == "model 'x' is not there"
    assert described(MemoryError()) == "there is not enough memory"
