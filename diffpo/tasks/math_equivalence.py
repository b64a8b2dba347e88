"""Whether two LaTeX answers are mathematically equal: exactly where that is possible, else by math-verify in processes of their own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .mathematics import UndecidedError, decide, typeset

Pair = tuple[str, str]

_WORKER = Path(__file__).with_name("math_worker.py")
_START_SECONDS = 120.0  # to import sympy on a busy machine
_GRACE_SECONDS = 10.0  # for the last replies after the budget
_HASTY_SECONDS = 0.25
_MOST_WORKERS = 8
_REMEMBERED = 10_000
_instances: weakref.WeakSet[MathEquivalence] = weakref.WeakSet()


class MathEquivalence:
    """equal = equivalence(gold, answer), or equivalence.many(pairs): True, False, or None where it could not be decided.

    What `mathematics.decide` reads is decided here, exactly. Anything else is asked of math-verify, in a pool of processes. None means that
    math-verify raised, that a number is too large for what bounds can tell, or that a limit was reached: for one pair seconds of processor
    time, or of the clock and one more; for all pairs of one call budget, in seconds of the clock (within it every pair is tried for a
    little, then those that need it for longer). Undecided pairs use up a budget of the same size that all calls share, and calls without
    any give their time back to it. A pair has no more than what is left of it, and at least a quarter of a second.
    workers: pairs at a time, by default the processors, at most 8. memory_gib: address space of each process.

    Where math-verify is missing or does not start, whatever needs it is None, and one RuntimeWarning says so.
    One instance may be used from several threads, and after a fork: the child starts a pool of its own.
    """

    def __init__(
        self, seconds: float = 5.0, memory_gib: float = 1.0, *, budget: float = 40.0, workers: int | None = None
    ) -> None:
        self.seconds, self.budget, self.memory_bytes = seconds, budget, int(memory_gib * 2**30)
        self.workers = workers or min(os.cpu_count() or 1, _MOST_WORKERS)
        self._patience = budget
        self._is_missing = False
        self._remembered: OrderedDict[Pair, bool | None] = OrderedDict()
        self._process: subprocess.Popen | None = None
        self._finalizer: weakref.finalize | None = None
        self._lock = threading.Lock()
        _instances.add(self)

    def __call__(self, gold: str, answer: str) -> bool | None:
        return self.many([(gold, answer)])[0]

    def many(self, pairs: Iterable[Pair]) -> list[bool | None]:
        """A verdict for every (gold, answer). Equal pairs are asked once."""
        pairs = list(pairs)
        verdicts: dict[Pair, bool | None] = {}
        hard = []
        for pair in dict.fromkeys(pairs):
            try:
                verdicts[pair] = pair[0] == pair[1] or decide(*pair)
            except UndecidedError:
                verdicts[pair] = None
            else:
                if verdicts[pair] is None:
                    hard.append(pair)
        if hard:
            with self._lock:
                verdicts |= self._asked(hard)
        return [verdicts[pair] for pair in pairs]

    def _asked(self, pairs: Sequence[Pair]) -> dict[Pair, bool | None]:
        new = [pair for pair in pairs if pair not in self._remembered]
        final = self._ask(new) if new else {}
        known = {pair: self._remembered[pair] for pair in pairs if pair in self._remembered}
        self._remembered |= final
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return dict.fromkeys(pairs) | known | final

    def _ask(self, pairs: Sequence[Pair]) -> dict[Pair, bool | None]:
        """What the pool says, without the pairs for which the budget was too short."""
        process = self._running()
        if process is None:
            return {}
        seconds = min(self.seconds, max(self._patience, _HASTY_SECONDS))
        request = {"pairs": [[typeset(side) for side in pair] for pair in pairs], "seconds": seconds}
        request |= {"budget": self.budget, "workers": self.workers}
        final: dict[Pair, bool | None] = {}
        started = time.monotonic()
        try:
            stdin, _ = _pipes(process)
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            for reply in _replies(process, self.budget + _GRACE_SECONDS):
                if reply == "done":
                    self._account(time.monotonic() - started, seconds, [final.get(pair) for pair in pairs])
                    return final
                index, verdict, is_final = reply
                if is_final:
                    final[pairs[index]] = verdict
        except OSError:  # it died, out of memory perhaps
            pass
        except BaseException:  # an interrupt: the replies still to come must not answer the next pairs
            self._stop()
            raise
        self._stop()
        self._account(time.monotonic() - started, seconds, [final.get(pair) for pair in pairs])
        return final

    def _account(self, elapsed: float, seconds: float, verdicts: Sequence[bool | None]) -> None:
        """Undecided pairs take their limit of time from the budget they share, decided calls give theirs back."""
        undecided = sum(verdict is None for verdict in verdicts)
        change = -min(elapsed, seconds * undecided) if undecided else elapsed
        self._patience = min(max(self._patience + change, 0.0), self.budget)

    def _running(self) -> subprocess.Popen | None:
        """The process; None, from then on, if it cannot be had."""
        if self._process is None and not self._is_missing:
            if importlib.util.find_spec("math_verify") is None:
                self._give_up("needs math-verify: pip install math-verify")
                return None
            # -P keeps this folder, with its math.py, off the import path; a session of its own keeps Ctrl-C from the process
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_WORKER), str(self.memory_bytes)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:  # no memory for it, perhaps
                self._give_up(f"failed, math-verify does not start: {error}; try pip install math-verify")
                return None
            self._finalizer = weakref.finalize(self, _kill, self._process)
            try:
                started = next(_replies(self._process, _START_SECONDS), None)
            except BaseException:
                self._stop()
                raise
            if started != "ready":
                self._stop()
                self._give_up("failed, math-verify does not start: try pip install math-verify")
                return None
        return self._process

    def _give_up(self, reason: str) -> None:
        self._is_missing = True
        warnings.warn(f"grading some answers {reason}. They are undecided (None).", RuntimeWarning, stacklevel=2)

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _forget_after_fork(self) -> None:
        """In a forked child: the pool is the parent's, and a thread that held the lock is gone."""
        self._lock = threading.Lock()
        if self._finalizer is not None and self._process is not None:
            self._finalizer.detach()
            self._process.returncode = 0  # not ours to wait for
            for pipe in _pipes(self._process):
                pipe.close()
        self._process = self._finalizer = None


def _forget_all() -> None:
    for instance in list(_instances):
        instance._forget_after_fork()


os.register_at_fork(after_in_child=_forget_all)


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    """Its standard input and output, both of which it was started with."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _replies(process: subprocess.Popen, seconds: float) -> Iterator[Any]:
    """Decoded lines of the process, until it ends or the time is over."""
    _, stdout = _pipes(process)
    deadline, buffer = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            part = os.read(stdout.fileno(), 65536)
            if not part:
                return
            *lines, buffer = (buffer + part).split(b"\n")
            yield from map(json.loads, lines)


def _kill(process: subprocess.Popen) -> None:
    """End the process and its children, and release its pipes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in _pipes(process):
        with contextlib.suppress(BrokenPipeError):  # an unsent request
            pipe.close()
