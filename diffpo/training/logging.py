"""Where a run's numbers go: metrics.jsonl (complete and append-only), TensorBoard, one-line summaries, curves.png."""

import json
from pathlib import Path

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # tensorboard is missing
    SummaryWriter = None


class MetricsLog:
    """metrics.jsonl, and TensorBoard's files where it is installed. On a resume the lines after the checkpoint are dropped, so each update stands once."""

    def __init__(self, folder: Path, finished_updates: int):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if line["update"] <= finished_updates]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = SummaryWriter and SummaryWriter(str(folder / "tensorboard"), purge_step=finished_updates + 1)

    def _lines(self) -> list[dict]:
        if not self.path.exists():
            return []
        complete = self.path.read_text().rpartition("\n")[0]  # a killed run may leave half a line
        return [json.loads(line) for line in complete.splitlines()]

    def write(self, metrics: dict) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items() if self._board else ():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, metrics["update"])

    def close(self) -> list[dict]:
        """Close both and return all lines."""
        self._file.close()
        if self._board:
            self._board.close()
        return self._lines()


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
        values = np.array([line[key] for line in lines])
        width = max(1, min(15, len(values) // 4))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(updates, values, color="tab:blue", alpha=0.25, linewidth=1)
        axis.plot(updates[width - 1 :], smooth, color="tab:blue", linewidth=2)
        axis.set(xlabel="update", title=label)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
