"""The LM head: logits or log-probs of chosen rows, never of all. Both are computed in the head module's own forward.

So a shard of its weight is whole there, and an adapter on it has its say or is refused. Shapes: N rows, M hidden rows, D hidden size,
V vocabulary.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffpo.models.adapters import adapted_weight, replacement
from diffpo.models.sharding import call
from diffpo_kernels import linear_logprob, skinny_linear


class Head(nn.Linear):
    """Logits [N, V] of chosen rows [N, D], or those of every position [B, L, D]. Few rows need not lay out the weights anew."""

    def forward(self, hidden: Tensor, targets: dict[str, Any] | None = None) -> Tensor:
        """Logits, or the log-probs of ``targets``, fp32 [N] in nats: what `diffpo_kernels.linear_logprob` takes beside hidden and head."""
        weight = self.weight.to(hidden.dtype)  # see modules.py
        if targets is not None:
            return linear_logprob(hidden, weight, **targets)
        return skinny_linear(hidden, weight) if hidden.dim() == 2 else F.linear(hidden, weight)


def logprobs(head: nn.Module, hidden_MD: Tensor, targets: dict[str, Any]) -> Tensor:
    """Log-probs, fp32 [N] in nats, of the targets by a model's head with the adapters on it; differentiable.

    ValueError for an adapter that is no change of the head's weight.
    """
    if isinstance(replacement(head), Head):
        return call(head, hidden_MD, targets)
    weight_VD = adapted_weight(head, "lm_head")  # what LoRA adds to logits, it cannot add to log-probs
    return linear_logprob(hidden_MD, weight_VD.to(hidden_MD.dtype), **targets)
