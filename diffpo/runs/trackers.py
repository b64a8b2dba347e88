"""Where the numbers of each update go beside metrics.jsonl: TensorBoard, trackio or wandb.

A tracker may fail or hang as it likes. It costs the run one warning, and metrics.jsonl is complete.
"""

import importlib
import queue
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from diffpo.runs.tensor_board import TensorBoard

TrackerName = Literal["tensorboard", "trackio", "wandb", "none"]
PROJECT = "diffpo"
PATIENCE = 10.0  # seconds that the end of a run waits for a tracker
_WAITING = 1000  # updates that a tracker may be behind


class Tracker(Protocol):
    """Takes the metrics of one update after the other. Neither method raises, or takes longer than a moment, but `close` up to PATIENCE."""

    def write(self, metrics: dict) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    def write(self, metrics: dict) -> None:
        pass

    def close(self) -> None:
        pass


def check_tracker(name: TrackerName | None) -> None:
    """ValueError, in one line with what to do, where the package is missing or does not import. None: nothing was asked for."""
    if name in (None, "none"):
        return
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise ValueError(f"tracker: {name} is not installed: pip install {name}, or choose another") from error
        raise ValueError(f"tracker: {name} does not import: {error}") from error
    except Exception as error:  # of a package that somebody else wrote
        raise ValueError(f"tracker: {name} does not import: {error}") from error


def open_tracker(
    name: TrackerName | None, folder: Path, settings: Mapping[str, Any], first_update: int, run: str
) -> Tracker:
    """The tracker of this name; None: TensorBoard, where it is installed.

    folder: of the run. settings: JSON values. first_update: what an earlier process wrote from here on does not count. run: its name.
    """
    if name == "none":
        return NoTracker()
    if name in (None, "tensorboard"):
        return TensorBoard(folder / "tensorboard", first_update)
    shown = run if first_update == 1 else f"{run} from update {first_update}"
    return InAThread(name, {"project": PROJECT, "name": shown, "group": run, "config": dict(settings)})


class InAThread:
    """trackio or wandb, which share the calls ``init(...)``, ``log(numbers, step)`` and ``finish()``, in a thread of its own.

    They go over the network, where each call may take for ever. A resumed training is a run of its own there, in the same group.
    """

    def __init__(self, module: str, begin: dict[str, Any]):
        self._name, self._begin = module, begin
        self._lines: queue.Queue[dict | None] = queue.Queue(_WAITING)
        self._fault: str | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=module, daemon=True)
        self._thread.start()

    def write(self, metrics: dict) -> None:
        if self._fault is None:
            try:
                self._lines.put_nowait(metrics)
            except queue.Full:
                self._fault = f"it is {_WAITING} updates behind"
        self._warn()

    def close(self) -> None:
        ends = time.monotonic() + PATIENCE
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            self._fault = self._fault or f"it is {_WAITING} updates behind"
        if self._fault is None:
            self._thread.join(max(ends - time.monotonic(), 0))
            if self._thread.is_alive():
                self._fault = f"it did not end within {PATIENCE:g} seconds"
        self._warn()

    def _work(self) -> None:
        try:
            run = importlib.import_module(self._name).init(**self._begin)
            while (metrics := self._lines.get()) is not None:
                run.log(numbers(metrics), step=metrics["update"])
            run.finish()
        except (Exception, SystemExit) as error:  # whatever it is, in code that somebody else wrote
            self._fault = " ".join(f"{type(error).__name__}: {error}".split())

    def _warn(self) -> None:
        """In the thread of the run, which knows what a warning is to do."""
        if self._fault is not None and not self._warned:
            self._warned = True
            message = f"{self._name} is not written any more: {self._fault}; metrics.jsonl has every number"
            warnings.warn(message, stacklevel=3)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker draws."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
