"""Where a run's numbers go: metrics.jsonl (complete and append-only), TensorBoard, one-line summaries, curves.png."""

import math
import os
import time
import warnings
from pathlib import Path

from diffpo.models.file_replacement import write_atomically
from diffpo.training.json_lines import JsonLines


class MetricsLog:
    """metrics.jsonl and TensorBoard. On a resume the lines after the checkpoint are dropped, so each update stands once.

    A number that is not finite is null. ValueError if the file to continue is not readable.
    """

    def __init__(self, folder: Path, finished_updates: int):
        self._lines = read_metrics(folder)
        self._lines.keep(sum(line["update"] <= finished_updates for line in self._lines.rows))
        self._board = TensorBoard(folder / "tensorboard", first_update=finished_updates + 1)

    def write(self, metrics: dict) -> None:
        self._lines.write(metrics)
        self._board.write(metrics)

    def close(self) -> list[dict]:
        """Close both and return all lines."""
        self._lines.close()
        self._board.close()
        return self._lines.rows


def read_metrics(folder: Path) -> JsonLines:
    """metrics.jsonl of a run's folder, made if it is not there; ValueError if it is not one line after the other's update."""
    path = folder / "metrics.jsonl"
    lines = JsonLines(path, "line of metrics")
    before = 0
    for number, line in enumerate(lines.rows, start=1):
        update = line.get("update")
        if type(update) is not int or update <= before:
            lines.close()
            raise ValueError(f"{path}: line {number} is not of the next update; start again with --overwrite")
        before = update
    return lines


class TensorBoard:
    """The numbers of each update as TensorBoard reads them. A fault costs a warning and the rest of the file, never the run.

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

    def _add(self, **content) -> None:
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


def summary_line(metrics: dict, updates: int) -> str:
    """One update in one line."""
    parts = [
        f"update {metrics['update']:>4}/{updates}",
        f"reward {metrics['reward']:.3f}",
        f"accuracy {metrics['accuracy']:.1%}",
        f"NFE {metrics['nfe']:.2f}",
        f"gamma {metrics['gamma']:.3f}",
        f"no-advantage groups {metrics['zero_advantage_fraction']:.0%}",
    ]
    if "ess" in metrics:
        parts += [f"ESS {metrics['ess']:.2f}", f"clip {metrics['clip_fraction']:.1%}", f"KL {metrics['kl']:.3f}"]
    return "  ".join([*parts, f"{sum(v for k, v in metrics.items() if k.startswith('seconds/')):.1f} s"])


def draw_curves(lines: list[dict], path: Path, title: str) -> None:
    """Reward, accuracy, NFE and threshold of the training rollouts against updates, with a running mean."""
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    panels = [
        ("reward", "reward"),
        ("accuracy", "accuracy (T = 1 rollouts)"),
        ("nfe", "NFE"),
        ("gamma", "gamma (nats)"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.6), layout="constrained")
    updates = np.array([line["update"] for line in lines])
    for axis, (key, label) in zip(axes, panels, strict=True):
        values = np.array([line[key] if isinstance(line.get(key), int | float) else math.nan for line in lines])
        width = max(1, min(15, len(values) // 4))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(updates, values, color="tab:blue", alpha=0.25, linewidth=1)
        axis.plot(updates[width - 1 :], smooth, color="tab:blue", linewidth=2)
        axis.set(xlabel="update", title=label)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    plt.close(figure)
