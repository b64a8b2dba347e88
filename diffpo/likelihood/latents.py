"""The one unit of scoring: which network inputs about which rollouts, and how much each token's log-prob counts in an estimate.

Every estimator of the field is a choice of `Latents`: the mean-field family (mean_field.py), random masks (random_masks.py).

Shapes: B rollouts, L completion positions, Q prompt positions, P latents, N scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def __getitem__(self, index: Tensor) -> Latents:
        """Some of the latents, by index."""
        prompt = None if self.prompt_masked is None else self.prompt_masked[index]
        return Latents(self.row[index], self.masked[index], self.weight[index], prompt)


@dataclass(frozen=True)
class Scores:
    """What a model says about latents of B rollouts. Only what is scored takes memory: most latents score few of their L tokens.

    scored: int64 [N, 2], latent and position of each scored token, ascending
    value: fp32 [N], nats, unweighted, their log-probs
    actions: fp32 [B] by name, nats: the log-prob of what the commit rule drew, 0 where nothing was drawn
    """

    latents: Latents
    rollouts: int
    scored: Tensor
    value: Tensor
    actions: dict[str, Tensor]

    @property
    def logprob(self) -> Tensor:
        """fp32 [P, L], nats, unweighted, 0 where not scored."""
        return self.value.new_zeros(self.latents.masked.shape).index_put(self.scored.unbind(dim=1), self.value)

    def tokens(self) -> Tensor:
        """[B, L]: the estimate of each token's log-prob, the sum over a rollout's latents of weight * logprob."""
        L = self.latents.masked.shape[1]
        latent_N, position_N = self.scored.unbind(dim=1)
        weighted_N = self.latents.weight[latent_N, position_N] * self.value
        token_N = self.latents.row[latent_N] * L + position_N
        return weighted_N.new_zeros(self.rollouts * L).index_add(0, token_N, weighted_N).view(self.rollouts, L)

    def sequence(self) -> Tensor:
        """[B]: the estimate of each rollout's log-prob."""
        return self.tokens().sum(dim=1)

    def detach(self) -> Scores:
        detached = {name: value.detach() for name, value in self.actions.items()}
        return replace(self, value=self.value.detach(), actions=detached)
