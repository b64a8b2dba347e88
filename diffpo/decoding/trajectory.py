"""The one data structure between decoding and training: what was generated, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """B rollouts of L completion positions. Commit steps alone restore every latent a rollout went through.

    prompt_ids, prompt_mask: int64 / bool [B, P], left-padded, True where a token is real
    tokens: int64 [B, L]; positions that were never committed (after an early stop) hold EOS
    commit_step: int64 [B, L], the 1-based denoising step that committed the position, 0 = never committed
    logprob: fp32 [B, L], nats: log-prob of the token under the distribution it was drawn from; of an argmax
        (temperature 0) under the untempered distribution; 0 where never committed
    entropy: fp32 [B, L], nats: entropy of the untempered predictive distribution when the position was committed; 0 where never
    gamma: fp32 [B], nats: the entropy bound used, NaN for rules without one
    gamma_bin: int64 [B], the bin of a learned threshold, -1 for other rules; gamma_logprob: fp32 [B], its log-prob
    nfe: int64 [B], denoising steps (network evaluations of the row)
    length: int64 [B], tokens up to and including the first EOS, any of the model's ``eos_ids``
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    commit_step: Tensor
    logprob: Tensor
    entropy: Tensor
    gamma: Tensor
    gamma_bin: Tensor
    gamma_logprob: Tensor
    nfe: Tensor
    length: Tensor
    mask_id: int
    temperature: float
    cfg_scale: float = 0.0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows) -> Trajectory:
        """The trajectory of some rows (a slice, an index tensor or a boolean mask)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Trajectory(**{k: v[rows] if isinstance(v, Tensor) else v for k, v in values.items()})

    def latent(self, tau: int | Tensor) -> Tensor:
        """z_tau: the completion [B, L] with exactly the positions committed at steps 1..tau revealed; tau int or [B]."""
        tau = torch.as_tensor(tau, device=self.tokens.device)
        return torch.where(self.committed & (self.commit_step <= tau.reshape(-1, 1)), self.tokens, self.mask_id)

    @property
    def committed(self) -> Tensor:
        """bool [B, L]: positions the rollout committed."""
        return self.commit_step > 0

    @property
    def scored(self) -> Tensor:
        """bool [B, L]: the |o| tokens that count, committed and not after the first EOS."""
        return self.committed & (torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.length[:, None])

    @staticmethod
    def concatenate(parts: Sequence[Trajectory]) -> Trajectory:
        """Rows of several trajectories with equal prompt and completion widths, mask id and temperature."""
        first = parts[0]
        values = {field.name: [getattr(part, field.name) for part in parts] for field in fields(first)}
        return Trajectory(**{k: torch.cat(v) if isinstance(v[0], Tensor) else v[0] for k, v in values.items()})
