"""``python benchmarks/experiments/surrogate_gap.py``: how far is the m-times mean-field surrogate from the true likelihood?

Rollouts at temperature 1 of base and trained models; for m = 1 (mean field, d1), 2 (DiFFPO), 4, 8 and T (exact), by quarter of the denoising
steps: KL(true || surrogate), the mean of log pi_true - log pi_surrogate over the tokens (nats per token), its standard deviation, and the
importance weights w = pi_surrogate / pi_true: mean, effective sample size, share above the cap 2, histogram. For m = 2, 4 and 8 the boundaries are drawn
anew `VIEWS` times. The trained Sudoku model is sampler.py's (`TRAINED_SUDOKU`, below --runs); without it these rows are left out, and said to be.

Writes surrogate_gap.json and surrogate_gap.png.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from learning_curves import STYLE
from rich.console import Console
from rich.table import Table
from study import digest, in_parts, measurement, provenance, write

from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import EntropyBounded
from diffpo.likelihood.mean_field import trajectory_logprobs
from diffpo.models.checkpoints import load
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives.diffpo import EXACT, draw_boundaries
from diffpo.tasks import Task, get_task
from diffpo.trajectory import Trajectory

MODELS = (("countdown", "tiny-countdown"), ("countdown", "tiny-countdown-diffpo"), ("sudoku", "tiny-sudoku"))
TRAINED_SUDOKU = "sudoku-joint-seed0"
GAMMAS = (
    0.0,
    0.1,
    0.5,
    2.0,
)  # one token at a time; the rollouts of d1, of the shipped model's training, of today's defaults
M = (1, 2, 4, 8, EXACT)
MINUTES = 20
PROMPTS, VIEWS, QUARTERS, CAP = 512, 8, 4, 2.0
EDGES = (0.0, 0.1, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 10.0, float("inf"))  # of the histogram of w


@torch.no_grad()
def gaps(model: MaskedDiffusionLM, trajectory: Trajectory, m: int, views: int) -> torch.Tensor:
    """log pi_true - log pi_surrogate of every scored token [N] in every view: [views, N]; one view where nothing is drawn."""
    found = []
    for view in range(views if m not in (1, EXACT) else 1):
        logprob = trajectory_logprobs(model, trajectory, draw_boundaries(trajectory.nfe, trajectory.key, m, 0, view))
        found.append((trajectory.logprob - logprob)[trajectory.scored])
    return torch.stack(found)


def describe(gap_VN: torch.Tensor, answer_N: torch.Tensor) -> dict | None:
    """KL and the weights of one set of tokens, None without any; answer_N: which answer each belongs to.

    kl_error: standard error over answers, whose tokens belong together, of the mean over tokens and views.
    """
    if gap_VN.shape[1] == 0:
        return None
    weight = (-gap_VN).double().exp()
    counts = torch.histogram(weight.float().flatten(), torch.tensor(EDGES)).hist
    kl, gap_N = gap_VN.mean(), gap_VN.mean(dim=0)
    off_by_answer = torch.zeros(int(answer_N.max()) + 1).index_add_(0, answer_N, gap_N - kl)
    return {
        "tokens": len(gap_N),
        "kl": kl.item(),
        "kl_error": (off_by_answer.square().sum().sqrt() / len(gap_N)).item(),
        "gap_deviation": gap_VN.std(correction=0).item(),
        "weight_mean": weight.mean().item(),
        "ess": (weight.sum().square() / (weight.numel() * weight.square().sum())).item(),
        "above_cap": (weight > CAP).double().mean().item(),
        "histogram": (counts / weight.numel()).tolist(),
    }


def measure(task: Task, name: str, model: MaskedDiffusionLM, gamma: float, prompts: int, views: int) -> list[dict]:
    """One row per m."""
    problems = task.problems("validation", prompts, seed=0)
    rule = EntropyBounded(gamma, "confidence")
    texts = [task.prompt(problem) for problem in problems]
    trajectory = generate(model, texts, task.gen_length, task.block_length, rule, temperature=1.0, seed=0).trajectory
    quarter = ((trajectory.commit_step - 1) * QUARTERS // trajectory.nfe[:, None])[trajectory.scored]
    answer = torch.arange(len(trajectory))[:, None].expand_as(trajectory.tokens)[trajectory.scored]
    rows = []
    for m in M:
        gap = gaps(model, trajectory, m, views)
        by_quarter = [describe(gap[:, quarter == q], answer[quarter == q]) for q in range(QUARTERS)]
        rows.append({"model": name, "task": task.name, "gamma": gamma, "m": m or "T", "nfe": trajectory.nfe.float().mean().item(),
                     "all": describe(gap, answer), "quarters": by_quarter})  # fmt: skip
    return rows


def by_name(rows: list[dict]) -> dict:
    """{model: {bound: {"m1": KL in nats per token, ...}}}, for the README."""
    found: dict[str, dict] = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault(f"{row['gamma']:g}", {})[f"m{row['m']}"] = row["all"]["kl"]
    return found


def reading(rows: list[dict]) -> list[str]:
    """What the numbers say, sentence by sentence."""
    found = []
    for model, gamma in dict.fromkeys((row["model"], row["gamma"]) for row in rows):
        of = {row["m"]: row for row in rows if (row["model"], row["gamma"]) == (model, gamma)}
        start, every = f"{model}, bound {gamma:g}, {of[1]['nfe']:.2f} NFE: ", of[1]["all"]
        if of[1]["nfe"] == 1:
            found.append(start + "no gap, mean field is exact in one evaluation.")
            continue
        kls = ", ".join(f"{row['all']['kl']:.3f} ({row['all']['kl_error']:.3f})" for row in of.values())
        quarters = " ".join(f"{quarter['kl']:.2f}" if quarter else "-" for quarter in of[1]["quarters"])
        found.append(
            f"{start}KL(true || surrogate) for m = {', '.join(map(str, of))}: {kls} nats a token (standard errors); of mean field by quarter of the steps {quarters}. "
            f"Weights of m = 1 and 2: mean {every['weight_mean']:.2f} and {of[2]['all']['weight_mean']:.2f}, effective sample size {every['ess']:.2f} and "
            f"{of[2]['all']['ess']:.2f}, {every['above_cap']:.1%} and {of[2]['all']['above_cap']:.1%} above the cap."
        )  # fmt: skip
    for task in dict.fromkeys(row["task"] for row in rows):
        models = list(dict.fromkeys(row["model"] for row in rows if row["task"] == task))
        for before, after in pairwise(models):
            pairs = (f"bound {gamma:g}: {by_name(rows)[before][f'{gamma:g}']['m1']:.2f} to {by_name(rows)[after][f'{gamma:g}']['m1']:.2f}" for gamma in GAMMAS)  # fmt: skip
            found.append(
                f"{task}, mean field's gap before ({before}) and after training ({after}): {', '.join(pairs)}."
            )
    return found


def report(rows: list[dict], console: Console) -> None:
    for model, gamma in dict.fromkeys((row["model"], row["gamma"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["gamma"]) == (model, gamma)]
        title = f"{model}, bound {gamma:g}, NFE {mine[0]['nfe']:.1f}: KL(true || surrogate) in nats per token"
        table = Table(
            "m", "all", "+- s.d.", *(f"quarter {q + 1}" for q in range(QUARTERS)), "w mean", "ESS", "w > 2", title=title
        )
        for row in mine:
            every, quarters = row["all"], (quarter and quarter["kl"] for quarter in row["quarters"])
            cells = [every["kl"], every["gap_deviation"], *quarters, every["weight_mean"], every["ess"]]
            shown = ("-" if cell is None else f"{cell:.3f}" for cell in cells)
            table.add_row(str(row["m"]), *shown, f"{every['above_cap']:.1%}")
        console.print(table)


def draw(rows: list[dict], path: Path) -> None:
    """KL by quarter of the steps: a row per model, a panel per bound, a line per m."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(models), len(GAMMAS), figsize=(3.1 * len(GAMMAS), 2.8 * len(models)), sharey="row", layout="constrained", squeeze=False)  # fmt: skip
        for row in rows:
            axis = axes[models.index(row["model"]), GAMMAS.index(row["gamma"])]
            points = [(q, of["kl"], 2 * of["kl_error"]) for q, of in enumerate(row["quarters"], start=1) if of]
            x, kl, error = zip(*points, strict=True)
            axis.errorbar(x, kl, error, marker="o", label=f"m = {row['m']}", capsize=2)
            axis.set(
                title=f"{row['model']}\nbound {row['gamma']:g}, NFE {row['nfe']:.1f}", xticks=range(1, QUARTERS + 1)
            )
        for line in axes:
            line[0].set_ylabel("KL, nats per token")
        for axis in axes[-1]:
            axis.set_xlabel("quarter of the steps")
        axes[0, -1].legend(frameon=False)
        figure.suptitle("KL(true || surrogate); bars: two standard errors")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    given = measurement(__doc__, "one model, 16 prompts, 2 views")
    keep_freed_memory()
    console = Console(width=160, highlight=False)
    prompts, views = (16, 2) if given.smoke else (PROMPTS, VIEWS)
    if not given.smoke:
        console.print(f"surrogate_gap: about {MINUTES} minutes on one core")
    models = [(task, name, load(name, "cpu")) for task, name in MODELS[: 1 if given.smoke else None]]
    trained = given.runs / "sampler" / TRAINED_SUDOKU / "model"
    settings = {"prompts": prompts, "views": views, "trained": digest(trained.glob("*"))}
    if trained.exists():
        models.append(("sudoku", TRAINED_SUDOKU, load(str(trained), "cpu")))
    else:
        console.print(
            f"{TRAINED_SUDOKU} is left out: run sampler.py --tasks sudoku first, or give its folder with --runs"
        )
    parts = {
        f"{name}-{gamma:g}": partial(measure, get_task(task), name, model, gamma, prompts, views)
        for task, name, model in models
        for gamma in GAMMAS
    }
    with in_parts(given.runs / f"surrogate_gap{'-smoke' * given.smoke}", settings, parts) as of_parts:
        rows = [row for of_part in of_parts for row in of_part]
        document = {
            "edges": EDGES,
            "cap": CAP,
            "prompts": prompts,
            "views": views,
            "rows": rows,
            "kl": by_name(rows),
            "reading": reading(rows),
        }
        write(given.output / "surrogate_gap.json", document | {"provenance": provenance({"rollouts": 0})})
        draw(rows, given.output / "surrogate_gap.png")
    report(rows, console)
    console.print(*document["reading"], sep="\n")


if __name__ == "__main__":
    main()
