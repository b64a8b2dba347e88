"""Importance weights pooled over tokens: w = the surrogate likelihood of what was drawn / its true likelihood, with less spread.

A token's own weight, exp(old - behaviour), has a mean far from 1 where the surrogate is rough, and a cap then cuts most of them:

    quarter    w_k / the mean of w over the tokens of the same quarter of the denoising steps, in the whole batch: self-normalised importance
               sampling, within strata, because the surrogate is roughest in late steps. Which tokens count more stays, how much a quarter
               counts does not.
    sequence   exp of the mean over a rollout's scored tokens of (old - behaviour), the same for all of them: the geometric mean, as GSPO's
               ratio is (arXiv 2507.18071, eq. 7). The product itself would be the weight of the whole rollout, but its logarithm's spread
               grows with the length.

The clipped loss takes weights as old - behaviour, so what is made here is the behaviour for which that is the pooled weight.
"""

from typing import Literal

import torch
from torch import Tensor

ImportanceWeights = Literal["none", "token", "quarter", "sequence"]
QUARTERS = 4  # of a rollout's denoising steps
POOLED: tuple[ImportanceWeights, ...] = ("quarter", "sequence")  # need the old scores of all tokens at once


def pooled_behaviour(
    kind: ImportanceWeights, old_BL: Tensor, behaviour_BL: Tensor, scored_BL: Tensor, quarter_BL: Tensor
) -> Tensor:
    """Log-probs [B, L], nats, in the dtype of ``old``: old less the log of the weight, without its cap.

    kind: one of POOLED. scored_BL: bool [B, L], which tokens count; quarter_BL: int64 [B, L], of the denoising steps, 0 .. 3. Of tokens that
    do not count the values are arbitrary.
    """
    log_weight_BL = torch.where(scored_BL, old_BL - behaviour_BL, 0.0).double()
    if kind == "sequence":
        pooled_BL = (log_weight_BL.sum(dim=1) / scored_BL.sum(dim=1).clamp(min=1))[:, None].expand_as(log_weight_BL)
    else:
        pooled_BL = log_weight_BL
        for quarter in range(QUARTERS):
            chosen_BL = scored_BL & (quarter_BL == quarter)
            log_sum = log_weight_BL.masked_fill(~chosen_BL, -torch.inf).flatten().logsumexp(dim=0)
            log_mean = log_sum - chosen_BL.sum().log()  # NaN without a token, which no token sees
            pooled_BL = torch.where(chosen_BL, log_weight_BL - log_mean, pooled_BL)
    return old_BL - pooled_BL.to(old_BL.dtype)
