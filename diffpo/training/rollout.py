"""Rollouts: fresh problems, G completions each, their rewards and advantages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan

import torch
from torch import Tensor

from diffpo.decoding.generation import encode_prompts, generate
from diffpo.decoding.rules import Rule
from diffpo.keyed_random import derive
from diffpo.likelihood.score import PartTooSmallError
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Task
from diffpo.tasks.grading import graded_together
from diffpo.tasks.task import Lengths, begun, completion_lengths
from diffpo.trajectory import Trajectory


@dataclass(frozen=True)
class Rollout:
    """B = prompts x G rollouts, the members of a group adjacent.

    task_reward, reward (the task's at the price of time, see `priced`; NaN = dropped): fp32 [B]; correct, wrong: bool [B], neither where
    nothing was decided; on the CPU.
    """

    trajectory: Trajectory
    task_reward: Tensor
    reward: Tensor
    correct: Tensor
    wrong: Tensor


def collect(
    model: MaskedDiffusionLM,
    task: Task,
    prompts: int,
    group_size: int,
    rule: Rule,
    temperature: float,
    speed_exponent: float,
    seed: int,
    update: int = 0,
    tokens_at_once: int | None = None,
    lengths: Lengths | None = None,
    first: int = 0,
) -> Rollout:
    """Decode ``group_size`` completions of each of ``prompts`` fresh training problems, the problems keyed by (seed, update).

    A rollout's key is its number in the run, from ``first`` on, a group's that of its first member; ``seed`` and the key decide its draws.
    update: of the weights, and the trajectory's version. tokens_at_once: of the network, prompt and completion together; None: all at once. lengths: of completion and
    block; None: the task's own, see `completion_lengths`. A grade without a reward is dropped, its reward is NaN.

    ValueError for a task without training problems, or one that the model cannot be asked. TaskError if the task gives something else than a grade.
    """
    problems = [problem for problem in task.problems("train", prompts, derive(seed, update)) for _ in range(group_size)]
    prompted = [task.prompt(problem) for problem in problems]
    lengths = lengths or completion_lengths(task)
    number = torch.arange(len(problems))
    ids = encode_prompts(model, prompted)
    out = generate(
        model, ids, *lengths, rule, temperature, seed, row_ids=first + number,
        batch_size=rows_at_once(ids, lengths.gen_length, tokens_at_once),
    )  # fmt: skip
    trajectory = out.trajectory
    group = (first + number // group_size * group_size).to(trajectory.key.device)
    trajectory = replace(trajectory, group=group, version=torch.full_like(group, update))
    assert out.text is not None  # the prompts are texts, which take a tokenizer
    texts = [begun(prompt) + text for prompt, text in zip(prompted, out.text, strict=True)]
    grades = graded_together(task, problems, texts)
    task_reward = torch.tensor([nan if grade.reward is None else grade.reward for grade in grades])  # fp32
    correct = torch.tensor([grade.correct is True for grade in grades])
    wrong = torch.tensor([grade.correct is False for grade in grades])
    reward = priced(task_reward, ~wrong, out.nfe.cpu(), lengths.gen_length, speed_exponent)
    return Rollout(trajectory, task_reward, reward, correct, wrong)


def rows_at_once(prompts: Sequence[Tensor], gen_length: int, tokens_at_once: int | None) -> int | None:
    """How many prompts (ids, each 1-d) may be decoded together, None: all. PartTooSmallError if not even one may."""
    if tokens_at_once is None:
        return None
    width = max(map(len, prompts)) + gen_length
    if tokens_at_once < width:
        raise PartTooSmallError(width, tokens_at_once)
    return tokens_at_once // width


def priced(task_reward: Tensor, right: Tensor, nfe: Tensor, gen_length: int, speed_exponent: float) -> Tensor:
    """Rewards [B]: a right answer's task_reward * speed ** speed_exponent, a wrong one's partial credit, at most L ** -speed_exponent.

    task_reward: fp32 [B], NaN or infinite gives NaN; right: bool [B], True also where a task gives a reward and no verdict; nfe: int64
    [B]; gen_length: L, tokens.
    The cap is what the slowest right answer is worth. Only a right answer gains by being fast, or being wrong quickly would pay; partial credit above the
    worth of a slow right answer would have the same effect. A reward below 0 stays: it would shrink with time. Exponent 0: the task's
    own rewards.
    """
    task_reward = torch.where(task_reward.isfinite(), task_reward, nan)
    if speed_exponent == 0:
        return task_reward
    in_time = task_reward * speed(nfe, gen_length) ** speed_exponent
    slowest = speed(torch.tensor(gen_length), gen_length) ** speed_exponent
    return torch.where(right & (task_reward > 0), in_time, torch.minimum(task_reward, slowest))


def speed(nfe: Tensor, gen_length: int) -> Tensor:
    """(L + 1 - NFE) / L: 1 for a single evaluation, 1/L for one token at a time."""
    return (gen_length + 1 - nfe).float() / gen_length
