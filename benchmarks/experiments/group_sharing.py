"""``python benchmarks/experiments/group_sharing.py``: what evaluating equal network inputs once saves, and that it changes nothing.

Every member of a group has the same fully masked completion, so z_0 is evaluated once per prompt; equal later latents are shared too. Compared with the
same scores computed from one member of each group at a time, where no input occurs twice: denoiser calls and seconds of a forward and a backward pass of the
two-times mean-field likelihood, and the largest difference of the log-probs and of the gradients. Writes
group_sharing.json and group_sharing.png.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from learning_curves import PALETTE, STYLE
from rich.console import Console
from rich.table import Table
from study import measurement, provenance, write

from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import EntropyBounded
from diffpo.likelihood.mean_field import trajectory_logprobs
from diffpo.models.checkpoints import load
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives.diffpo import draw_boundaries
from diffpo.tasks import get_task
from diffpo.trajectory import Trajectory

GROUPS = (4, 8, 16)
M = 2
MINUTES = 2


def score(model: MaskedDiffusionLM, parts: list[tuple[torch.Tensor, Trajectory, list]]) -> dict:
    """Log-probs [B, L] and the gradient of their sum, computed part by part, with the denoiser calls and the seconds."""
    calls, started = 0, time.perf_counter()

    def count(module, arguments):
        nonlocal calls
        calls += len(arguments[0])

    hook = model.register_forward_pre_hook(count)
    model.zero_grad()
    found = torch.empty(sum(len(rows) for rows, *_ in parts), parts[0][1].tokens.shape[1])
    for rows, trajectory, boundaries in parts:
        logprob = trajectory_logprobs(model, trajectory, boundaries)
        logprob.sum().backward()
        found[rows] = logprob.detach()
    hook.remove()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"logprob": found, "gradient": gradient, "calls": calls, "seconds": time.perf_counter() - started}


def compare(model: MaskedDiffusionLM, task, group: int, prompts: int, rounds: int) -> dict:
    problems = [problem for problem in task.problems("train", prompts, seed=0) for _ in range(group)]
    texts = [task.prompt(problem) for problem in problems]
    rule = EntropyBounded(0.1, "confidence")
    trajectory = generate(model, texts, task.gen_length, task.block_length, rule, temperature=1.0, seed=0).trajectory
    zero, tau = draw_boundaries(trajectory.nfe, trajectory.key, M, 0)
    every = torch.arange(len(trajectory))
    members = [every[i::group] for i in range(group)]
    ways = {
        "shared": [(every, trajectory, [zero, tau])],
        "unshared": [(rows, trajectory[rows], [zero, tau[rows]]) for rows in members],
    }
    results = {name: [score(model, parts) for _ in range(rounds)] for name, parts in ways.items()}
    shared, unshared = results["shared"][-1], results["unshared"][-1]
    scale = unshared["gradient"].abs().max()
    return {
        "group": group,
        "rows": len(trajectory),
        "calls": {name: runs[-1]["calls"] for name, runs in results.items()},
        "seconds": {name: statistics.median(run["seconds"] for run in runs[1:]) for name, runs in results.items()},
        "largest_logprob_difference": (shared["logprob"] - unshared["logprob"]).abs().max().item(),
        "largest_gradient_difference": ((shared["gradient"] - unshared["gradient"]).abs().max() / scale).item(),
    }


def reading(rows: list[dict]) -> list[str]:
    """What the numbers say, sentence by sentence."""
    return [
        f"groups of {row['group']}: {1 - row['calls']['shared'] / row['calls']['unshared']:.0%} of the denoiser calls and "
        f"{1 - row['seconds']['shared'] / row['seconds']['unshared']:.0%} of the seconds saved "
        f"({row['calls']['unshared']} to {row['calls']['shared']} calls, {row['seconds']['unshared']:.2f} to {row['seconds']['shared']:.2f} s); "
        f"log-probs differ by at most {row['largest_logprob_difference']:.1e} nats, gradients by {row['largest_gradient_difference']:.1e} of the largest."
        for row in rows
    ]  # fmt: skip


def draw(rows: list[dict], path: Path) -> None:
    """Denoiser calls and seconds by group size, with and without sharing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        for axis, (name, label) in zip(axes, (("calls", "denoiser calls (sequences)"), ("seconds", "seconds, one core")), strict=True):  # fmt: skip
            for i, (way, colour) in enumerate(zip(("unshared", "shared"), PALETTE, strict=False)):
                positions = [x + (i - 0.5) * 0.38 for x in range(len(rows))]
                axis.bar(positions, [row[name][way] for row in rows], 0.38, color=colour, label=way)
            axis.set_xticks(range(len(rows)), [f"G = {row['group']}" for row in rows])
            axis.set(title=f"{label}, forward and backward")
        axes[0].legend(frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    given = measurement(__doc__, "4 prompts, 2 rounds")
    keep_freed_memory()
    torch.set_num_threads(1)  # said in the figure
    if not given.smoke:
        print(f"group_sharing: about {MINUTES} minutes on one core")
    model, task = load("tiny-countdown").train(), get_task("countdown")
    prompts, rounds = (4, 2) if given.smoke else (64, 6)
    rows = [compare(model, task, group, prompts, rounds) for group in GROUPS]  # in one go: seconds are to be compared
    document = {"m": M, "prompts": prompts, "rows": rows, "reading": reading(rows)}
    write(given.output / "group_sharing.json", document | {"provenance": provenance({"rollouts": 0})})
    draw(rows, given.output / "group_sharing.png")
    table = Table("G", "rows", "calls, unshared", "calls, shared", "seconds, unshared", "seconds, shared", "log-prob off by", "gradient off by",
                  title="two-times mean field, forward and backward, tiny-countdown")  # fmt: skip
    for row in rows:
        calls, seconds = row["calls"], row["seconds"]
        table.add_row(
            str(row["group"]), str(row["rows"]), str(calls["unshared"]), str(calls["shared"]),
            f"{seconds['unshared']:.2f}", f"{seconds['shared']:.2f} ({seconds['unshared'] / seconds['shared']:.2f}x)",
            f"{row['largest_logprob_difference']:.1e}", f"{row['largest_gradient_difference']:.1e}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
