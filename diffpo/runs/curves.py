"""curves.png: how a training went."""

import math
from pathlib import Path

from diffpo.models.file_replacement import write_atomically


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
