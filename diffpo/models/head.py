"""The LM head: logits or log-probs of chosen rows, never of all. Both are computed in the head module's own forward.

So a shard of its weight is whole there, and an adapter on it has its say or is refused. Shapes: N rows, M hidden rows, D hidden size,
V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from diffpo.models.adapters import adapted_weight, replacement
from diffpo.models.sharding import call
from diffpo_kernels import linear_logprob, skinny_linear


class Targets(NamedTuple):
    """The tokens [N] whose log-probs are asked for, and how they are drawn: as `diffpo_kernels.linear_logprob` takes them.

    rows: int64 [N], the hidden row that each token is scored from, or None for one after the other
    """

    token: Tensor
    temperature: float = 1.0
    banned_ids: Sequence[int] = ()
    rows: Tensor | None = None

    def logprobs(self, hidden_MD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_logprob(
            hidden_MD, weight_VD, self.token, self.temperature, banned_ids=self.banned_ids, rows=self.rows
        )


class Head(nn.Linear):
    """Logits [N, V] of chosen rows [N, D], or those of every position [B, L, D]. Few rows need not lay out the weights anew."""

    def forward(self, hidden: Tensor, targets: Targets | None = None) -> Tensor:
        """Logits, or with ``targets`` their log-probs, fp32 [N] in nats."""
        if targets is not None:
            return targets.logprobs(hidden, self.weight)
        return skinny_linear(hidden, self.weight) if hidden.dim() == 2 else F.linear(hidden, self.weight)


def logprobs(head: nn.Module, hidden_MD: Tensor, targets: Targets) -> Tensor:
    """Log-probs, fp32 [N] in nats, of the targets by a model's head with the adapters on it; differentiable.

    ValueError for an adapter that is no change of the head's weight.
    """
    if isinstance(replacement(head), Head):
        return call(head, hidden_MD, targets)
    return targets.logprobs(
        hidden_MD, adapted_weight(head, "lm_head")
    )  # what LoRA adds to logits, it cannot add to log-probs
