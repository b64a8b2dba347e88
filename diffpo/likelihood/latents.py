"""The one unit of scoring: which network inputs about which rollouts, and how much each token's log-prob counts in an estimate.

Every estimator of the field is a choice of `Latents`: the mean-field family (mean_field.py), random masks (random_masks.py).

Shapes: B rollouts, L completion positions, Q prompt positions, P latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """P network inputs about B rollouts.

    row: int64 [P], which rollout
    masked: bool [P, L], completion positions that read the mask; the others read the rollout's token
    weight: fp32 [P, L], coefficient of log p(o_k | latent) in the estimate; 0 = not scored, else the position must be masked
    prompt_masked: bool [P, Q], prompt positions that read the mask, or None for none
    """

    row: Tensor
    masked: Tensor
    weight: Tensor
    prompt_masked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    @staticmethod
    def concatenate(first: Latents, second: Latents) -> Latents:
        """The latents of both; they must agree on whether prompts are masked."""
        a, b = first.prompt_masked, second.prompt_masked
        if (a is None) != (b is None):
            raise ValueError("latents with masked prompts cannot be joined with others")
        return Latents(
            torch.cat([first.row, second.row]),
            torch.cat([first.masked, second.masked]),
            torch.cat([first.weight, second.weight]),
            None if a is None or b is None else torch.cat([a, b]),
        )


@dataclass(frozen=True)
class Scores:
    """What a model says about latents of B rollouts.

    logprob: fp32 [P, L], nats, unweighted, 0 where not scored
    actions: fp32 [B] by name, nats: the log-prob of what the commit rule drew, 0 where nothing was drawn
    """

    latents: Latents
    rollouts: int
    logprob: Tensor
    actions: dict[str, Tensor]

    def tokens(self) -> Tensor:
        """[B, L]: the estimate of each token's log-prob, the sum over a rollout's latents of weight * logprob."""
        rows = self.latents.row
        weighted = self.latents.weight * self.logprob
        return weighted.new_zeros(self.rollouts, weighted.shape[1]).index_add(0, rows, weighted)

    def sequence(self) -> Tensor:
        """[B]: the estimate of each rollout's log-prob."""
        return self.tokens().sum(dim=1)

    def detach(self) -> Scores:
        detached = {name: value.detach() for name, value in self.actions.items()}
        return replace(self, logprob=self.logprob.detach(), actions=detached)
