"""``python benchmarks/experiments/headroom.py``: what could a threshold chosen for each prompt gain over one for all?

Test problems, which no model was trained on, are decoded greedily at every entropy bound. At a price of an evaluation, value = solved - price * NFE, four
ways to choose the bound: fixed (the best one for all), kind (the best one for each kind of problem, where a task has several), fitted (a linear head on the mean hidden states of completion and prompt at z_0, the learned threshold's own form,
fitted by gradient to the values themselves) and oracle (for each prompt with the outcomes known, the upper limit). All but oracle are cross-fitted: the
choice for a fifth of the problems is made on the other four. Fitted less fixed is what such a head finds with this many problems and every outcome known.

Writes headroom.json and headroom.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from learning_curves import PALETTE, STYLE
from rich.console import Console
from rich.table import Table
from study import in_parts, measurement, provenance, write
from torch import Tensor

from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import EntropyBounded
from diffpo.evaluation import fixed_problems
from diffpo.models.checkpoints import load
from diffpo.models.layout import Texts
from diffpo.tasks import get_task
from diffpo.training.config import ROLLOUT_ORDER

MODELS = (
    ("countdown", "tiny-countdown"),
    ("countdown", "tiny-countdown-diffpo"),
    ("sudoku", "tiny-sudoku"),
    ("medley", "tiny-medley"),
)
GAMMAS = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 16.0, 32.0)  # nats
PRICES = (0.01, 0.02, 0.05, 0.1, 0.2)  # of one evaluation, in solved problems
PENALTIES = (1e-4, 1e-3, 1e-2)  # L2 of the head; besides these, no head at all
PROBLEMS, FOLDS, BATCH = 1600, 5, 512
MINUTES = 5
WAYS = ("fixed", "kind", "fitted", "oracle")


class Outcomes(NamedTuple):
    """Of P problems at G bounds: solved [P, G] (0 or 1), nfe [P, G], features [P, F] of z_0, kinds [P, K] (1 for its own); float64."""

    solved: Tensor
    nfe: Tensor
    features: Tensor
    kinds: Tensor


@torch.no_grad()
def outcomes(model, task, problems: list) -> Outcomes:
    prompts, solved, nfe = [task.prompt(problem) for problem in problems], [], []
    for gamma in GAMMAS:
        rule = EntropyBounded(gamma, ROLLOUT_ORDER)
        out = generate(model, prompts, task.gen_length, task.block_length, rule, batch_size=BATCH)
        solved.append(
            [float(task.grade(problem, text).correct) for problem, text in zip(problems, out.text, strict=True)]
        )
        nfe.append(out.nfe.double())
    rows = out.trajectory
    features = []
    for chunk in torch.arange(len(rows)).split(BATCH):
        part = rows[chunk]
        arrangement = model.layout.arrange(Texts(part.prompt_ids, part.prompt_mask, part.latent(0)))
        first = arrangement.first_pass(model(arrangement.tokens, **arrangement.attention))
        prompt = torch.where(first.real[..., None], first.prompt, 0).sum(dim=1) / first.real.sum(dim=1, keepdim=True)
        features.append(torch.cat([first.completion.mean(dim=1), prompt], dim=1).double())
    kinds = [task.kind(problem) for problem in problems]
    of_kind = torch.tensor([[float(kind == name) for name in sorted(set(kinds))] for kind in kinds]).double()
    return Outcomes(torch.tensor(solved).double().T, torch.stack(nfe, dim=1), torch.cat(features), of_kind)


class Head(NamedTuple):
    """Scores [P, G] of the bounds: a linear head on standardised features."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor  # [D + 1, G]; the constant last

    def choose(self, features: Tensor) -> Tensor:
        return (with_constant((features - self.mean) / self.deviation) @ self.weight).argmax(dim=1)


def with_constant(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)


def fit(features: Tensor, value: Tensor, penalty: float | None) -> Head:
    """Maximises the mean of sum_g softmax(head)_g value_g less penalty |weight|^2; without a penalty the best bound for all."""
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-9)
    weight = torch.zeros(features.shape[1] + 1, value.shape[1], dtype=value.dtype)
    if penalty is None:
        weight[-1, value.mean(dim=0).argmax()] = 1.0
        return Head(mean, deviation, weight)
    inputs = with_constant((features - mean) / deviation)
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = -((inputs @ weight).softmax(dim=1) * value).sum(dim=1).mean() + penalty * weight[:-1].square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return Head(mean, deviation, weight.detach())


def fit_chosen(features: Tensor, value: Tensor) -> Head:
    """With the penalty, or the lack of a head, that gives the most value on the last fifth when fitted on the rest."""
    cut = len(value) * 4 // 5

    def judged(penalty: float | None) -> float:
        chosen = fit(features[:cut], value[:cut], penalty).choose(features[cut:])
        return value[cut:].gather(1, chosen[:, None]).mean().item()

    return fit(features, value, max((None, *PENALTIES), key=judged))


def best_of_kind(kinds: Tensor, value: Tensor) -> Tensor:
    """The bound [K] with the most value for each kind."""
    return (kinds.T @ value).argmax(dim=1)


def compare(data: Outcomes, prices: Sequence[float] = PRICES) -> list[dict]:
    """By price: accuracy, NFE and value of each way; the paired gains over fixed with their standard errors."""
    rows, every = [], torch.arange(len(data.solved))
    for price in prices:
        value = data.solved - price * data.nfe
        choice = {way: torch.zeros_like(every) for way in WAYS} | {"oracle": value.argmax(dim=1)}
        for fold in range(FOLDS):
            held = every % FOLDS == fold
            choice["kind"][held] = best_of_kind(data.kinds[~held], value[~held])[data.kinds[held].argmax(dim=1)]
            for way, fitting in (("fixed", lambda f, v: fit(f, v, None)), ("fitted", fit_chosen)):
                choice[way][held] = fitting(data.features[~held], value[~held]).choose(data.features[held])
        of = {way: value[every, bins] for way, bins in choice.items()}
        found = {way: {"accuracy": data.solved[every, bins].mean().item(), "nfe": data.nfe[every, bins].mean().item(),
                       "value": of[way].mean().item(), "bins": torch.bincount(bins, minlength=len(GAMMAS)).tolist()} for way, bins in choice.items()}  # fmt: skip
        for way in WAYS[1:]:
            gain = of[way] - of["fixed"]
            found[way] |= {"gain": gain.mean().item(), "standard_error": (gain.std() / len(gain) ** 0.5).item()}
        rows.append({"price": price, **found})
    return rows


def measure(task_name: str, model: str, count: int, prices: Sequence[float]) -> list[dict]:
    """One row per price."""
    task = get_task(task_name)
    found = outcomes(load(model, "cpu"), task, fixed_problems(task, count))
    return [{"model": model, **row} for row in compare(found, prices)]


def reading(rows: list[dict]) -> list[str]:
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for row in (row for row in rows if row["model"] == model):
            points = {way: f"{row[way]['accuracy']:.1%} @ {row[way]['nfe']:.2f}" for way in WAYS}
            found.append(
                f"{model}, an evaluation at {row['price']:g} of a solved problem: the best bound for all {points['fixed']}; for each kind "
                f"{points['kind']}, {100 * row['kind']['gain']:+.2f} points of value; fitted to the prompt "
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
    given = measurement(__doc__, "one model, one price, few problems")
    keep_freed_memory()
    count, prices = (40, PRICES[2:3]) if given.smoke else (PROBLEMS, PRICES)
    if not given.smoke:
        print(f"headroom: about {MINUTES} minutes on one core")
    parts = {name: partial(measure, task, name, count, prices) for task, name in MODELS[: 1 if given.smoke else None]}
    with in_parts(given.runs / f"headroom{'-smoke' * given.smoke}", {"problems": count}, parts) as of_models:
        rows = [row for of_model in of_models for row in of_model]
        document = {"gammas": GAMMAS, "problems": count, "rows": rows, "reading": reading(rows)}
        write(given.output / "headroom.json", document | {"provenance": provenance({"problems": 0})})
        draw(rows, given.output / "headroom.png")
    table = Table("model", "price", *WAYS, "fitted - fixed, value", title="accuracy @ NFE on test problems")
    for row in rows:
        points = (f"{row[way]['accuracy']:.1%} @ {row[way]['nfe']:.2f}" for way in WAYS)
        gain, error = (100 * row["fitted"][name] for name in ("gain", "standard_error"))
        table.add_row(row["model"], f"{row['price']:g}", *points, f"{gain:+.2f} ({error:.2f})")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
