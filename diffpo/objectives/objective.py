"""What an algorithm is: its settings, the latents to score, what each rollout's score is pushed by, and a loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffpo.config import Config, Field, NonNegative, Rows, field_validator
from diffpo.keyed_random import uniform
from diffpo.likelihood.latents import Latents, Scores
from diffpo.objectives.advantage import Advantage
from diffpo.trajectory import Trajectory


class AlgorithmConfig(Config):
    """What every algorithm has. Each adds its own settings; one that it does not have is refused.

    random_latents: something about the latents may be drawn.
    """

    replaced: ClassVar[dict[str, str]] = {
        "mode": 'it is now algorithm.train, ["model", "threshold"] for "joint", ["model"] for "model", ["threshold"] for "sampler"'
    }
    random_latents: ClassVar[bool] = True
    name: str
    train: tuple[Literal["model", "threshold"], ...] = Field(("model",), min_length=1)
    """what is trained: the model, the threshold policy, or both; the rest is frozen"""
    advantage: Advantage = "mean"
    """reward less the group's mean; also divided by its standard deviation, or by its best reward; by rank; or less the mean of the others"""
    group_size: int = Field(8, ge=2, le=2**12)
    prompts_per_update: Rows = 64
    inner_updates: int = Field(2, gt=0, le=2**12)
    """optimizer steps per batch of rollouts"""
    fresh_latents: bool = False
    """draw what is random about the latents anew for each inner update; without it once per batch, so that old and reference scores are
    computed once: a quarter fewer denoiser calls an update"""
    kl_coefficient: NonNegative = 0.01
    """weight of the KL, to the starting model unless the algorithm says another"""

    @field_validator("train")
    @classmethod
    def _each_part_once(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(parts)) < len(parts):
            raise ValueError("each part stands there once")
        return tuple(sorted(parts))

    @field_validator("fresh_latents")
    @classmethod
    def _something_to_draw(cls, fresh: bool) -> bool:
        if fresh and not cls.random_latents:
            raise ValueError("nothing about this algorithm's latents is random: leave it out")
        return fresh


@dataclass(frozen=True)
class Batch:
    """B rollouts to learn from, whole groups. reward, advantage: fp32 [B]."""

    trajectory: Trajectory
    reward: Tensor
    advantage: Tensor

    def __len__(self) -> int:
        return len(self.trajectory)

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        return Batch(self.trajectory[rows], self.reward[rows], self.advantage[rows])


Settings = TypeVar("Settings", bound=AlgorithmConfig)


class Loss(NamedTuple):
    """value: differentiable scalar; metrics: detached tensors by name."""

    value: Tensor
    metrics: dict[str, Tensor]


class Objective(ABC, Generic[Settings]):
    """An RL algorithm with its Settings.

    Config: its settings, with the published defaults; rollout: the published settings of its rollouts, below the user's own;
    anchored: its KL is to the starting model, which is otherwise neither kept nor scored.
    """

    Config: ClassVar[type[AlgorithmConfig]]
    rollout: ClassVar[dict[str, Any]] = {}
    anchored: ClassVar[bool] = True

    def __init__(self, config: Settings) -> None:
        self.config = config

    @property
    def separable(self) -> bool:
        """The loss is a sum over tokens, each scored from one latent, whose weights and normalisers do not depend on the scores of others.

        Its gradient can then be taken part by part (``training/update.py``).
        """
        return False

    @abstractmethod
    def latents(self, batch: Batch, *key: int) -> Latents:
        """What is scored, the same for theta, old and reference. Random draws are keyed by ``key`` and the rollouts' own keys."""

    def signal(self, batch: Batch, old: Scores | None, reference: Scores | None) -> Tensor:
        """[B] or [B, L], once a batch, over whole groups and without a gradient; the advantage by default.

        old is None in the first inner update, where it equals theta's own.
        """
        return batch.advantage

    @abstractmethod
    def loss(self, batch: Batch, signal: Tensor, new: Scores, old: Scores, reference: Scores | None) -> Loss:
        """A pure function of the whole batch, differentiable in ``new`` alone; all scores are of the same latents."""


def masked_prompts(latents: Latents, batch: Batch, probability: float, *key: int) -> Latents:
    """The latents behind prompts whose tokens are masked with a probability each, alike for the members of a group."""
    if probability == 0:
        return latents
    trajectory = batch.trajectory
    # counted from the prompt's end, so that padding plays no part
    position = torch.arange(trajectory.prompt_ids.shape[1], 0, -1, device=trajectory.tokens.device)
    masked = uniform(*key, trajectory.group[:, None], position) < probability
    return replace(latents, prompt_masked=masked[latents.row])
