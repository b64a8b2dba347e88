"""Whether two LaTeX answers are mathematically equal: math-verify in a process of its own, with limits on time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

_WORKER = Path(__file__).with_name("math_worker.py")
_START_SECONDS = 120.0  # to import sympy on a busy machine


class MathEquivalence:
    """equal = equivalence(gold, answer): True, False, or None where math-verify raised, or went over a limit.

    seconds: time for one pair; memory_gib: address space of the process. A process that goes over a limit is killed and another one
    is started for the next pair. RuntimeError if no process can be started at all.
    """

    def __init__(self, seconds: float = 5.0, memory_gib: float = 1.0) -> None:
        self.seconds, self.memory_bytes = seconds, int(memory_gib * 2**30)
        self._process: subprocess.Popen | None = None
        self._last: tuple[tuple[str, str], bool | None] | None = None

    def __call__(self, gold: str, answer: str) -> bool | None:
        if gold == answer:
            return True
        if self._last is None or self._last[0] != (gold, answer):  # a reward asks again what correctness has asked
            self._last = (gold, answer), self._ask(gold, answer)
        return self._last[1]

    def _ask(self, gold: str, answer: str) -> bool | None:
        process = self._running()
        try:
            process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            process.stdin.flush()
            reply = _read_reply(process, self.seconds)
        except OSError:  # it died, out of memory perhaps
            reply = None
        except BaseException:  # an interrupt: the reply still to come must not answer the next pair
            self._stop()
            raise
        if reply is None:
            self._stop()
        return reply if isinstance(reply, bool) else None

    def _running(self) -> subprocess.Popen:
        if self._process is None:
            # -P keeps this folder, with its math.py, off the import path; a session of its own keeps Ctrl-C from the process
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), str(self.memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            weakref.finalize(self, _kill, self._process)
            if _read_reply(self._process, _START_SECONDS) != "ready":
                self._stop()
                raise RuntimeError("math-verify does not start: check with python -c 'import math_verify'")
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None


def _read_reply(process: subprocess.Popen, seconds: float) -> bool | str | None:
    """One line of the worker, decoded; None at its end or when the time is over."""
    deadline, line = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return None
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                return None
            line += part
    return json.loads(line)


def _kill(process: subprocess.Popen) -> None:
    """End the process, and whatever it started, and release its pipes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # an unsent request
            pipe.close()
