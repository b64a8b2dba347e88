"""How hard each held-out problem is for the base model, and whether a learned threshold follows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats

from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import FixedSchedule
from diffpo.evaluation import fixed_problems
from diffpo.models.checkpoints import load
from diffpo.tasks import get_task

SAMPLES = 16
GROUPS = 4  # quartiles
SHUFFLES = 500
_CHUNK = 512  # rows decoded together


def solve_rates(model: str, task_name: str, heldout: int, samples: int = SAMPLES) -> list[float]:
    """Share of `samples` draws at temperature 1, one token at a time, that solve each held-out problem; seed 0. Difficulty is 1 less this."""
    keep_freed_memory()
    torch.set_num_threads(1)
    loaded, task = load(model, "cpu"), get_task(task_name)
    problems = [problem for problem in fixed_problems(task, heldout) for _ in range(samples)]
    prompts = [task.prompt(problem) for problem in problems]
    rule = FixedSchedule(task.gen_length)
    out = generate(
        loaded, prompts, task.gen_length, task.block_length, rule, temperature=1.0, seed=0, batch_size=_CHUNK
    )
    solved = [task.grade(problem, text).correct for problem, text in zip(problems, out.text, strict=True)]
    return np.array(solved).reshape(-1, samples).mean(axis=1).tolist()


def quartiles(difficulty: Sequence[float]) -> np.ndarray:
    """The quarter (0 = easiest) of each problem; equally large, ties in difficulty are broken by the problems' random order."""
    order = np.argsort(difficulty, kind="stable")
    group = np.empty(len(order), dtype=int)
    group[order] = np.arange(len(order)) * GROUPS // len(order)
    return group


def adaptation(chosen: Sequence[int], bins: Sequence[float], difficulty: Sequence[float], seed: int = 0) -> dict:
    """Does the chosen bin depend on the difficulty, or is it one value?

    top_share, top_gamma: of the most common bin; bin_entropy (nats); information: mutual information of bin and difficulty quartile in
    nats, less its mean over `SHUFFLES` shuffles of the problems (the plug-in estimate is biased upwards); p_value: share of the shuffles
    with at least as much; spearman: rank correlation of gamma with difficulty, None where one of them is constant;
    histogram: [4, bins], share of each quartile's problems.
    """
    chosen, group, rng = np.asarray(chosen), quartiles(difficulty), np.random.default_rng(seed)
    counts = np.bincount(chosen, minlength=len(bins))
    found = mutual_information(chosen, group, len(bins))
    shuffled = np.array([mutual_information(rng.permutation(chosen), group, len(bins)) for _ in range(SHUFFLES)])
    constant = len(np.unique(chosen)) == 1 or len(np.unique(difficulty)) == 1
    histogram = _joint(chosen, group, len(bins))
    return {
        "top_share": float(counts.max() / counts.sum()),
        "top_gamma": float(bins[counts.argmax()]),
        "bin_entropy": float(stats.entropy(counts)),
        "information": float(found - shuffled.mean()),
        "p_value": float((1 + (shuffled >= found - 1e-12).sum()) / (1 + SHUFFLES)),
        "spearman": None if constant else float(stats.spearmanr(np.asarray(bins)[chosen], difficulty).statistic),
        "histogram": (histogram / histogram.sum(axis=1, keepdims=True)).tolist(),
    }


def mutual_information(chosen: np.ndarray, group: np.ndarray, bins: int) -> float:
    """Plug-in estimate in nats."""
    joint = _joint(chosen, group, bins)
    joint = joint / joint.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / apart[joint > 0])).sum())


def _joint(chosen: np.ndarray, group: np.ndarray, bins: int) -> np.ndarray:
    groups = max(GROUPS, int(group.max()) + 1)
    return np.bincount(group * bins + chosen, minlength=groups * bins).reshape(groups, bins).astype(float)
