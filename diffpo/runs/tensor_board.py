"""The numbers of each update as TensorBoard reads them."""

import os
import time
import warnings
from pathlib import Path
from typing import Any


class TensorBoard:
    """An event file in ``folder``. A fault costs a warning and the rest of the file, never the run.

    The records are written here, one an update: the writers that tensorboard offers do it in a thread, whose faults end in a traceback.
    """

    def __init__(self, folder: Path, first_update: int):
        self._file = None
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter

            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
            self._file = (folder / name).open("xb", buffering=0)
        except (ImportError, OSError) as error:
            self._stop(error)
            return
        self._event, self._summary, self._records = Event, Summary, RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        # what an earlier process wrote of these updates is replaced
        self._add(step=first_update, session_log=SessionLog(status=SessionLog.START))

    def write(self, metrics: dict) -> None:
        if self._file is None:
            return
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(step=metrics["update"], summary=self._summary(value=values))

    def _add(self, **content: Any) -> None:
        if self._file is None:
            return
        try:
            self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        except OSError as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        warnings.warn(f"TensorBoard is not written: {error}; metrics.jsonl has every number", stacklevel=2)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
