"""``python benchmarks/experiments/surrogate_gap.py``: how far is the m-times mean-field surrogate from the true likelihood?

Rollouts at temperature 1 of base and trained models; for m = 1 (mean field, d1), 2 (DiFFPO), 4, 8 and T (exact), by quarter of the denoising
steps: KL(true || surrogate), the mean of log pi_true - log pi_surrogate over the tokens (nats per token), its standard deviation, and the
importance weights w = pi_surrogate / pi_true: mean, effective sample size, share above the cap 2, histogram. For m = 2, 4 and 8 the boundaries are drawn
anew `VIEWS` times. Costs about 5 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from study import RESULTS, provenance

from diffpo.decoding.generation import generate
from diffpo.decoding.rules import EntropyBounded
from diffpo.decoding.trajectory import Trajectory
from diffpo.likelihood.mean_field import trajectory_logprobs
from diffpo.models.checkpoints import load
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives.diffpo import EXACT, draw_boundaries
from diffpo.tasks import Task, get_task

MODELS = (("countdown", "tiny-countdown"), ("countdown", "tiny-countdown-diffpo"), ("sudoku", "tiny-sudoku"))
GAMMAS = (
    0.0,
    0.1,
    0.5,
    2.0,
)  # one token at a time, d1's rollouts, those of the shipped model's training, and of today's defaults
M = (1, 2, 4, 8, EXACT)
PROMPTS, VIEWS, QUARTERS, CAP = 512, 8, 4, 2.0
EDGES = (0.0, 0.1, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 10.0, float("inf"))  # of the histogram of w


@torch.no_grad()
def gaps(model: MaskedDiffusionLM, trajectory: Trajectory, m: int, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_true - log pi_surrogate of every scored token in every view, and the quarter of the steps it was committed in."""
    quarter = ((trajectory.commit_step - 1) * QUARTERS // trajectory.nfe[:, None])[trajectory.scored]
    found = []
    for view in range(views if m not in (1, EXACT) else 1):
        logprob = trajectory_logprobs(model, trajectory, draw_boundaries(trajectory.nfe, m, 0, view))
        found.append((trajectory.logprob - logprob)[trajectory.scored])
    return torch.cat(found), quarter.repeat(len(found))


def describe(gap: torch.Tensor) -> dict:
    """KL and the weights of one set of tokens; `kl_error` is a standard error that takes tokens for independent."""
    weight = (-gap).double().exp()
    counts = torch.histogram(weight.float(), torch.tensor(EDGES)).hist
    return {
        "tokens": len(gap),
        "kl": gap.mean().item(),
        "kl_error": (gap.std() / len(gap) ** 0.5).item(),
        "gap_deviation": gap.std().item(),
        "weight_mean": weight.mean().item(),
        "ess": (weight.sum().square() / (len(weight) * weight.square().sum())).item(),
        "above_cap": (weight > CAP).double().mean().item(),
        "histogram": (counts / len(gap)).tolist(),
    }


def measure(task: Task, name: str, gamma: float, prompts: int, views: int) -> list[dict]:
    """One row per m."""
    model = load(name)
    problems = task.problems("validation", prompts, seed=0)
    rule = EntropyBounded(gamma, "confidence")
    texts = [task.prompt(problem) for problem in problems]
    trajectory = generate(model, texts, task.gen_length, task.block_length, rule, temperature=1.0, seed=0).trajectory
    rows = []
    for m in M:
        gap, quarter = gaps(model, trajectory, m, views)
        by_quarter = [describe(gap[quarter == q]) for q in range(QUARTERS)]
        rows.append({"model": name, "task": task.name, "gamma": gamma, "m": m or "T", "nfe": trajectory.nfe.float().mean().item(),
                     "all": describe(gap), "quarters": by_quarter})  # fmt: skip
    return rows


def report(rows: list[dict], console: Console) -> None:
    for model, gamma in dict.fromkeys((row["model"], row["gamma"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["gamma"]) == (model, gamma)]
        title = f"{model}, bound {gamma:g}, NFE {mine[0]['nfe']:.1f}: KL(true || surrogate) in nats per token"
        table = Table(
            "m", "all", "+- s.d.", *(f"quarter {q + 1}" for q in range(QUARTERS)), "w mean", "ESS", "w > 2", title=title
        )
        for row in mine:
            every = row["all"]
            cells = [
                every["kl"],
                every["gap_deviation"],
                *(q["kl"] for q in row["quarters"]),
                every["weight_mean"],
                every["ess"],
            ]
            table.add_row(str(row["m"]), *(f"{cell:.3f}" for cell in cells), f"{every['above_cap']:.1%}")
        console.print(table)


def draw(rows: list[dict], path: Path) -> None:
    """KL by quarter of the steps, a panel per model and bound, a line per m."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["gamma"]) for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.1 * len(panels), 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (model, gamma) in zip(axes[0], panels, strict=True):
        for row in (row for row in rows if (row["model"], row["gamma"]) == (model, gamma)):
            kl, error = ([q[key] for q in row["quarters"]] for key in ("kl", "kl_error"))
            axis.errorbar(
                range(1, QUARTERS + 1), kl, [2 * e for e in error], marker="o", label=f"m = {row['m']}", capsize=2
            )
        axis.set(title=f"{model}\nbound {gamma:g} nats", xlabel="quarter of the steps", xticks=range(1, QUARTERS + 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("KL(true || surrogate), nats per token")
    axes[0, -1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="16 prompts, 2 views")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default benchmarks/results/experiments)")
    given = parser.parse_args()
    prompts, views = (16, 2) if given.smoke else (PROMPTS, VIEWS)
    rows = [
        row for task, name in MODELS for gamma in GAMMAS for row in measure(get_task(task), name, gamma, prompts, views)
    ]
    given.output.mkdir(parents=True, exist_ok=True)
    document = {
        "edges": EDGES,
        "cap": CAP,
        "prompts": prompts,
        "views": views,
        "rows": rows,
        "provenance": provenance({"rollouts": 0}),
    }
    (given.output / "surrogate_gap.json").write_text(json.dumps(document) + "\n")
    draw(rows, given.output / "surrogate_gap.png")
    report(rows, Console(width=160))


if __name__ == "__main__":
    main()
