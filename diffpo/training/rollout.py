"""Rollouts: fresh problems, G completions each, their rewards and advantages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from diffpo.decoding.generation import encode_prompts, generate
from diffpo.decoding.rules import Rule
from diffpo.keyed_random import derive
from diffpo.likelihood.score import PartTooSmallError
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Task
from diffpo.tasks.grading import graded_together
from diffpo.tasks.task import Lengths, begun, completion_lengths
from diffpo.training.distributed import ALONE, World
from diffpo.trajectory import Trajectory

_GRADES = ("task_reward", "reward", "correct", "wrong")


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

    def to_bytes(self) -> bytes:
        """For another process: two files of safetensors, behind the length of the first."""
        trajectory = self.trajectory.to_bytes()
        grades = tensors_to_bytes({name: getattr(self, name) for name in _GRADES})
        return len(trajectory).to_bytes(8) + trajectory + grades

    @staticmethod
    def from_bytes(data: bytes) -> "Rollout":
        """The rollout of `to_bytes`, on the CPU."""
        end = 8 + int.from_bytes(data[:8])
        return Rollout(Trajectory.from_bytes(data[8:end]), **tensors_from_bytes(data[end:]))

    def to(self, device: torch.device) -> "Rollout":
        """With the trajectory on another device."""
        return replace(self, trajectory=self.trajectory.to(device))

    @staticmethod
    def concatenate(parts: "Sequence[Rollout]") -> "Rollout":
        """The rollouts of all parts, in the order of their keys."""
        trajectory = Trajectory.concatenate([part.trajectory for part in parts])
        order = trajectory.key.argsort()
        grades = {name: torch.cat([getattr(part, name) for part in parts])[order] for name in _GRADES}
        return Rollout(trajectory[order], **grades)


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
    world: World = ALONE,
) -> Rollout:
    """Decode ``group_size`` completions of each of ``prompts`` fresh training problems, the problems keyed by (seed, update).

    A rollout's key is its number in the run, from ``first`` on, a group's that of its first member; ``seed`` and the key decide its draws.
    update: of the weights, and the trajectory's version. tokens_at_once: of the network, prompt and completion together; None: all at once. lengths: of completion and
    block; None: the task's own, see `completion_lengths`. A grade without a reward is dropped, its reward is NaN. world: the processes that share the work; each returns all.

    ValueError for a task without training problems, or one that the model cannot be asked. TaskError if the task gives something else than a grade.
    """
    problems = [problem for problem in task.problems("train", prompts, derive(seed, update)) for _ in range(group_size)]
    prompted = [task.prompt(problem) for problem in problems]
    lengths = lengths or completion_lengths(task)
    ids = encode_prompts(model, prompted)
    at_once = rows_at_once(ids, lengths.gen_length, tokens_at_once)

    def rolled_out(rows: Tensor) -> Rollout:
        keys = first + rows
        out = generate(
            model, [ids[row] for row in rows], *lengths, rule, temperature, seed, row_ids=keys, batch_size=at_once
        )
        trajectory = out.trajectory
        group = (first + rows // group_size * group_size).to(trajectory.key.device)
        trajectory = replace(trajectory, group=group, version=torch.full_like(group, update))
        assert out.text is not None  # the prompts are texts, which take a tokenizer
        texts = [begun(prompted[row]) + text for row, text in zip(rows, out.text, strict=True)]
        grades = graded_together(task, [problems[row] for row in rows], texts)
        task_reward = torch.tensor([nan if grade.reward is None else grade.reward for grade in grades])  # fp32
        correct = torch.tensor([grade.correct is True for grade in grades])
        wrong = torch.tensor([grade.correct is False for grade in grades])
        reward = priced(task_reward, ~wrong, out.nfe.cpu(), lengths.gen_length, speed_exponent)
        return Rollout(trajectory, task_reward, reward, correct, wrong)

    own = world.share(torch.tensor([len(prompt) + lengths.gen_length for prompt in ids]))
    if world.size == 1:
        return rolled_out(own)
    parts = world.gather(world.agreed(lambda: rolled_out(own).to_bytes() if len(own) else b""))
    return Rollout.concatenate([Rollout.from_bytes(part) for part in parts if part]).to(model.device)


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
