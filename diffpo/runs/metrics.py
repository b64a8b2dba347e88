"""metrics.jsonl, complete and append-only, and one line for the reader."""

from pathlib import Path

from diffpo.runs.json_lines import JsonLines, own_file
from diffpo.runs.tensor_board import TensorBoard


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
    lines = JsonLines(own_file(path), str(path), "line of metrics")
    before = 0
    for place, line in enumerate(lines.rows):
        update = line.get("update")
        if type(update) is not int or update <= before:
            raise lines.refused(place, ": it is not of the next update")
        before = update
    return lines


def summary_line(metrics: dict, updates: int) -> str:
    """One update in one line."""
    parts = [
        f"update {metrics['update']:>4}/{updates}",
        f"reward {metrics['reward']:.3f}",
        f"accuracy {metrics['accuracy']:.1%}",
        f"NFE {metrics['nfe']:.2f}",
        f"gamma {metrics['gamma']:.3f} nats",
        f"no-advantage groups {metrics['zero_advantage_fraction']:.0%}",
    ]
    if "ess" in metrics:
        parts += [f"ESS {metrics['ess']:.2f}", f"clip {metrics['clip_fraction']:.1%}", f"KL {metrics['kl']:.3f} nats"]
    return "  ".join([*parts, f"{sum(v for k, v in metrics.items() if k.startswith('seconds/')):.1f} s"])
