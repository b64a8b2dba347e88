"""metrics.jsonl, complete and append-only, and one line for the reader."""

import math
from pathlib import Path

from diffpo.runs.json_lines import JsonLines, own_file
from diffpo.runs.trackers import Tracker


class MetricsLog:
    """metrics.jsonl and a tracker. On a resume the lines after the checkpoint are dropped, so each update stands once.

    A number that is not finite is null. ValueError if the file to continue is not readable.
    """

    def __init__(self, folder: Path, finished_updates: int, tracker: Tracker):
        self._tracker = tracker
        self._lines = read_metrics(folder)
        self._lines.keep(sum(line["update"] <= finished_updates for line in self._lines.rows))

    def write(self, metrics: dict) -> None:
        self._lines.write(metrics)
        self._tracker.write(self._lines.rows[-1])

    def close(self) -> list[dict]:
        """Close both and return all lines."""
        self._lines.close()
        self._tracker.close()
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
    shown = {
        "reward": "reward {:.3f}",
        "accuracy": "accuracy {:.1%}",
        "nfe": "NFE {:.2f}",
        "gamma": "gamma {:.3f} nats",
        "zero_advantage_fraction": "no-advantage groups {:.0%}",
        "ess": "ESS {:.2f}",
        "clip_fraction": "clip {:.1%}",
        "kl": "KL {:.3f} nats",
    }
    # a rule without a threshold has no gamma, a loss without importance weights no ESS
    known = {name: value for name in shown if (value := metrics.get(name)) is not None and not math.isnan(value)}
    parts = [
        f"update {metrics['update']:>4}/{updates}",
        *(shown[name].format(value) for name, value in known.items()),
    ]
    return "  ".join([*parts, f"{sum(v for k, v in metrics.items() if k.startswith('seconds/')):.1f} s"])
