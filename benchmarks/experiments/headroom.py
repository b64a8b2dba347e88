"""``python benchmarks/experiments/headroom.py``: what could a threshold chosen for each prompt gain over one for all?

Every problem is decoded greedily at every entropy bound. At a price of an evaluation, value = solved - price * NFE, three ways to choose the bound:
fixed (the best one for all), fitted (for each prompt, from what the learned threshold reads: logistic regression of solved and
linear regression of NFE on the mean hidden state of the masked completion) and oracle (for each prompt with the outcomes known, the
upper limit). Fixed and fitted choose on training problems, all are valued on test problems. Fitted minus fixed is what the learned
threshold could have found; oracle minus fitted is not to be seen in its input, or not by a linear head.

Costs about 3 minutes on one core. Writes headroom.json and headroom.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from learning_curves import PALETTE, STYLE
from rich.console import Console
from rich.table import Table
from study import RESULTS, provenance, write
from torch import Tensor

from diffpo.config import RolloutConfig
from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import EntropyBounded
from diffpo.models.checkpoints import load
from diffpo.models.shared_pass import completion_hidden
from diffpo.tasks import get_task
from diffpo.training.evaluation import fixed_problems

MODELS = (("countdown", "tiny-countdown"), ("countdown", "tiny-countdown-diffpo"), ("sudoku", "tiny-sudoku"))
GAMMAS = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # nats
PRICES = (0.01, 0.02, 0.05, 0.1, 0.2)  # of one evaluation, in solved problems
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # L2 of the regressions, chosen on a fifth of the training problems
FITTED_ON, HELDOUT, BATCH = 4000, 1000, 512
WAYS = ("fixed", "fitted", "oracle")


class Outcomes(NamedTuple):
    """Of P problems at G bounds: solved [P, G] (0 or 1), nfe [P, G], features [P, D] of z_0; float64."""

    solved: Tensor
    nfe: Tensor
    features: Tensor


@torch.no_grad()
def outcomes(model, task, problems: list) -> Outcomes:
    prompts, solved, nfe = [task.prompt(problem) for problem in problems], [], []
    for gamma in GAMMAS:
        rule = EntropyBounded(gamma, RolloutConfig().proxy)
        out = generate(model, prompts, task.gen_length, task.block_length, rule, batch_size=BATCH)
        solved.append([float(task.correct(problem, text)) for problem, text in zip(problems, out.text, strict=True)])
        nfe.append(out.nfe.double())
    rows = out.trajectory
    features = []
    for chunk in torch.arange(len(rows)).split(BATCH):
        part = rows[chunk]
        hidden, source = completion_hidden(model, part.prompt_ids, part.prompt_mask, part.latent(0))
        features.append(hidden.mean(dim=1)[source].double())
    return Outcomes(torch.tensor(solved).double().T, torch.stack(nfe, dim=1), torch.cat(features))


class Regressions(NamedTuple):
    """Probability of solving and NFE at each bound from the features: linear heads on standardised features."""

    mean: Tensor
    deviation: Tensor
    solved_weight: Tensor
    nfe_weight: Tensor

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        inputs = with_constant((features - self.mean) / self.deviation)
        return (inputs @ self.solved_weight).sigmoid(), inputs @ self.nfe_weight


def with_constant(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)


def fit(data: Outcomes, penalty: float) -> Regressions:
    """By L2-penalised maximum likelihood (Newton's method) and least squares; the constant is not penalised."""
    mean, deviation = data.features.mean(dim=0), data.features.std(dim=0).clamp(min=1e-9)
    inputs = with_constant((data.features - mean) / deviation)
    ridge = penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    ridge[-1, -1] = 1e-9
    nfe_weight = torch.linalg.solve(inputs.T @ inputs / len(inputs) + ridge, inputs.T @ data.nfe / len(inputs))
    columns = []
    for solved in data.solved.T:
        weight = torch.zeros(inputs.shape[1], dtype=inputs.dtype)
        for _ in range(20):
            p = (inputs @ weight).sigmoid()
            gradient = inputs.T @ (p - solved) / len(inputs) + ridge @ weight
            curvature = (inputs * (p * (1 - p)).clamp(min=1e-6)[:, None]).T @ inputs / len(inputs) + ridge
            step = torch.linalg.solve(curvature, gradient)
            weight = weight - step
            if step.abs().max() < 1e-9:
                break
        columns.append(weight)
    return Regressions(mean, deviation, torch.stack(columns, dim=1), nfe_weight)


def chosen_penalty(data: Outcomes) -> float:
    """That of the best likelihood on the last fifth, fitted on the rest."""
    cut = len(data.solved) * 4 // 5
    fitted_on, judged_on = (Outcomes(*(part[rows] for part in data)) for rows in (slice(cut), slice(cut, None)))

    def loss(penalty: float) -> float:
        p = fit(fitted_on, penalty).predict(judged_on.features)[0].clamp(1e-9, 1 - 1e-9)
        return torch.nn.functional.binary_cross_entropy(p, judged_on.solved).item()

    return min(PENALTIES, key=loss)


def compare(train: Outcomes, test: Outcomes) -> list[dict]:
    """By price: accuracy, NFE and value of each way on `test`; the paired gains over fixed with their standard errors."""
    regressions = fit(train, chosen_penalty(train))
    probability, expected = regressions.predict(test.features)
    rows, every = [], torch.arange(len(test.solved))
    for price in PRICES:
        value = test.solved - price * test.nfe
        best = (train.solved - price * train.nfe).mean(dim=0).argmax()
        choice = {"fixed": best.expand(len(every)), "fitted": (probability - price * expected).argmax(dim=1), "oracle": value.argmax(dim=1)}  # fmt: skip
        of = {way: value[every, bins] for way, bins in choice.items()}
        found = {way: {"accuracy": test.solved[every, bins].mean().item(), "nfe": test.nfe[every, bins].mean().item(),
                       "value": of[way].mean().item(), "bins": torch.bincount(bins, minlength=len(GAMMAS)).tolist()} for way, bins in choice.items()}  # fmt: skip
        for way in ("fitted", "oracle"):
            gain = of[way] - of["fixed"]
            found[way] |= {"gain": gain.mean().item(), "standard_error": (gain.std() / len(gain) ** 0.5).item()}
        rows.append({"price": price, "gamma": GAMMAS[int(best)], **found})
    return rows


def reading(rows: list[dict]) -> list[str]:
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for row in (row for row in rows if row["model"] == model):
            points = {way: f"{row[way]['accuracy']:.1%} @ {row[way]['nfe']:.2f}" for way in WAYS}
            found.append(
                f"{model}, an evaluation at {row['price']:g} of a solved problem: the best bound for all, {row['gamma']:g}, {points['fixed']}; fitted to the prompt "
                f"{points['fitted']}, {100 * row['fitted']['gain']:+.2f} points of value (standard error {100 * row['fitted']['standard_error']:.2f}); "
                f"oracle {points['oracle']}, {100 * row['oracle']['gain']:+.1f}."
            )
    return found


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), layout="constrained", squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            for way, colour in zip(WAYS, PALETTE, strict=False):
                points = sorted((row[way]["nfe"], 100 * row[way]["accuracy"]) for row in rows if row["model"] == model)
                axis.plot(*np.array(points).T, "o-", color=colour, label=way)
            axis.set(title=model, xlabel="NFE", ylabel="accuracy, %")
            axis.legend(frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one model, few problems")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default benchmarks/results/experiments)")
    given = parser.parse_args()
    keep_freed_memory()
    fitted_on, heldout = (200, 50) if given.smoke else (FITTED_ON, HELDOUT)
    rows = []
    for task_name, name in MODELS[: 1 if given.smoke else None]:
        model, task = load(name), get_task(task_name)
        train, test = (outcomes(model, task, problems) for problems in (task.problems("train", fitted_on, 0), fixed_problems(task, heldout)))  # fmt: skip
        rows += [{"model": name, **row} for row in compare(train, test)]
    document = {"gammas": GAMMAS, "fitted_on": fitted_on, "heldout": heldout, "rows": rows, "reading": reading(rows)}
    write(given.output / "headroom.json", document | {"provenance": provenance({"train problems": 0})})
    draw(rows, given.output / "headroom.png")
    table = Table("model", "price", *WAYS, "fitted - fixed, value", title="accuracy @ NFE on test problems")
    for row in rows:
        points = (f"{row[way]['accuracy']:.1%} @ {row[way]['nfe']:.2f}" for way in WAYS)
        gain, error = (100 * row["fitted"][name] for name in ("gain", "standard_error"))
        table.add_row(row["model"], f"{row['price']:g}", *points, f"{gain:+.2f} ({error:.2f})")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
