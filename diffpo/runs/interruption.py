"""Ctrl-C and SIGTERM: the unit of work is finished and saved."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within its ``with`` block both signals are noted in ``requested``, and nothing else happens, but within ``at_once``."""

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that has nothing to save before it is finished: KeyboardInterrupt, also for a signal that came before."""
        self._at_once = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def next_of(self, rows: Iterator[T]) -> T:
        """The next item; making it is interrupted ``at_once``. Those that the iterator has made already (``ready``, how many) are taken
        whatever happens."""
        if not getattr(rows, "ready", 0):
            try:
                with self.at_once():
                    return next(rows)
            except KeyboardInterrupt:
                if not getattr(rows, "ready", 0):
                    raise
        return next(rows)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True  # no more: printing here would re-enter a print that the signal interrupted
        if self._at_once:
            raise KeyboardInterrupt
