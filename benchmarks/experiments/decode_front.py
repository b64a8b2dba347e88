"""A model decoded over a sweep of entropy bounds and, where it has one, at its learned threshold: accuracy against tokens per forward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import EntropyBounded, PromptThreshold, Rule
from diffpo.evaluation import fixed_problems
from diffpo.models.checkpoints import load
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Task, get_task

GAMMAS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, math.inf)
SMOKE_GAMMAS = (0.0, 0.5, math.inf)
BATCH = 256


def decode(model: MaskedDiffusionLM, task: Task, problems: Sequence, rule: Rule) -> dict:
    """Greedy decoding of every problem: accuracy, mean nfe, tokens_per_forward = tokens up to and including EOS / network evaluations.

    chosen: each problem's bin of the learned threshold, None for other rules.
    """
    prompts = [task.prompt(problem) for problem in problems]
    out = generate(model, prompts, task.gen_length, task.block_length, rule, batch_size=BATCH)
    trajectory = out.trajectory
    solved = sum(task.grade(problem, text).correct for problem, text in zip(problems, out.text, strict=True))
    learned = isinstance(rule, PromptThreshold)
    return {
        "rule": repr(rule.resolve(model)),
        "learned": learned,
        "accuracy": solved / len(problems),
        "nfe": trajectory.nfe.double().mean().item(),
        "tokens_per_forward": (trajectory.length.sum() / trajectory.nfe.sum()).item(),
        "gamma": trajectory.gamma.double().mean().item(),
        "chosen": trajectory.actions["gamma"].choice.tolist() if learned else None,
    }


def sweep(model: str, task_name: str, order: str, heldout: int, gammas: Sequence[float]) -> dict:
    """{"points": `decode` of each entropy bound in `order`, then of the learned threshold; "bins": its bounds or None}."""
    keep_freed_memory()
    torch.set_num_threads(1)  # as many sweeps run side by side as there are cores
    loaded, task = load(model, "cpu"), get_task(task_name)
    problems = fixed_problems(task, heldout)
    rules: list[Rule] = [EntropyBounded(gamma, order) for gamma in gammas]
    if loaded.threshold is not None:
        rules.append(PromptThreshold(order))
    points = [decode(loaded, task, problems, rule) for rule in rules]
    for point in points:
        if math.isinf(point["gamma"]):
            point["gamma"] = "inf"  # JSON has no infinity
    return {"points": points, "bins": loaded.config.threshold_gammas, "heldout": len(problems), "order": order}
