"""What an objective offers the trainer: a random view of the rollouts to score, and a loss on that view."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from diffpo.decoding.trajectory import Trajectory
from diffpo.likelihood.mean_field import Scores, score
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo_kernels.surrogate_loss import SurrogateLoss

if TYPE_CHECKING:
    from diffpo.config import AlgorithmConfig


@dataclass(frozen=True)
class View:
    """The random part of one inner update, or of all of a batch's: theta, old and reference must all be scored on the very same view.

    trajectory: the rollouts, their prompts possibly masked; boundaries: of the mean-field family, ints or [B].
    """

    trajectory: Trajectory
    boundaries: Sequence[int | Tensor]

    def score(self, model: MaskedDiffusionLM) -> Scores:
        return score(model, self.trajectory, self.boundaries)


class Objective(ABC):
    """An RL algorithm. ``defaults``: its published settings, by table of ``config.TrainConfig``, applied before the user's own."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, config: "AlgorithmConfig"):
        self.config = config

    @abstractmethod
    def view(self, trajectory: Trajectory, *key: int) -> View:
        """Draw a view, for one inner update or all of a batch's (``AlgorithmConfig.fresh_views``); ``key`` seeds it."""

    @abstractmethod
    def loss(
        self, trajectory: Trajectory, advantage: Tensor, new: Scores, old: Scores, reference: Scores | None
    ) -> SurrogateLoss:
        """Loss and diagnostics, a pure function. advantage: [B]; new, old, reference: scores of one and the same view."""


def threshold_first(gamma_value_B: Tensor, token_values_BL: Tensor) -> Tensor:
    """[B, 1 + L]: the threshold is one more token, in front of the completion's."""
    return torch.cat([gamma_value_B[:, None], token_values_BL], dim=1)
