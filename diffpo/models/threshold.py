"""pi(gamma | c) of DiFFPO (arXiv 2510.02212): a categorical over threshold bins, read from the hidden states of the fully masked first pass."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffpo.models.layout import FirstPass
from diffpo.models.model_config import Reads
from diffpo.models.modules import Linear
from diffpo.models.sharding import call
from diffpo_kernels import row_statistics

if TYPE_CHECKING:
    from diffpo.models.transformer import MaskedDiffusionLM

_STATISTICS = 3  # of the entropies: mean, least, most
_LOGITS_AT_ONCE = 2**28


def policy_shapes(hidden_size: int, bins: int, reads: Reads) -> dict[str, torch.Size]:
    """Of the tensors of a ThresholdPolicy, by their names in it."""
    states = 1 if reads == "completion" else 2
    features = states * hidden_size + (_STATISTICS if reads == "entropies" else 0)
    shapes = {"linear.weight": torch.Size([bins, features]), "linear.bias": torch.Size([bins])}
    return shapes | ({"query.weight": torch.Size([1, hidden_size])} if reads == "attention" else {})


class ThresholdPolicy(nn.Module):
    """A linear head on the mean hidden state of the masked completion and that of the prompt; it starts uniform (zero weights).

    The hidden states are those of z_0, the first denoising pass, which decoding evaluates anyway: the threshold costs no NFE. What a
    masked completion's states hold is what predicts its tokens one by one; how those depend on each other may stand in the prompt alone.
    reads: "both"; "completion" for the first of the two alone; "attention", the prompt's states weighted by the softmax of their product with
    one learned query, which starts at zero and so at the mean; "entropies", both and the mean, least and most of the entropies (nats) of the
    completion's positions, which have no gradient.
    """

    gammas: Tensor

    def __init__(self, hidden_size: int, gammas: tuple[float, ...], reads: Reads = "both"):
        super().__init__()
        self.reads = reads
        if not gammas or any(math.isnan(gamma) or gamma < 0 for gamma in gammas):
            raise ValueError(f"threshold_gammas must be non-negative numbers (nats), got {gammas}")
        self.register_buffer("gammas", torch.tensor(gammas, dtype=torch.float32), persistent=False)
        bins, features = policy_shapes(hidden_size, len(gammas), reads)["linear.weight"]
        self.linear = Linear(features, bins)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if reads == "attention":
            self.query = Linear(hidden_size, 1, bias=False)
            nn.init.zeros_(self.query.weight)

    def forward(self, first: FirstPass, entropy_BL: Tensor | None = None) -> Tensor:
        """Log-probabilities fp32 [B, bins], nats, from the hidden states of z_0 and, where the policy reads them, its entropies (nats)."""
        features_BF = first.completion.mean(dim=1)
        if self.reads != "completion":
            features_BF = torch.cat([features_BF, self._prompt(first).to(features_BF.dtype)], dim=1)
        if self.reads == "entropies":
            assert entropy_BL is not None
            of_row = (entropy_BL.mean(dim=1), *entropy_BL.aminmax(dim=1))
            features_BF = torch.cat([features_BF, torch.stack(of_row, dim=1).to(features_BF.dtype)], dim=1)
        features_BF = features_BF.to(torch.promote_types(features_BF.dtype, self.linear.weight.dtype))
        return call(self.linear, features_BF).float().log_softmax(dim=-1)

    def _prompt(self, first: FirstPass) -> Tensor:
        """[B, D]: the mean of the prompt's real states, or their mean by attention; 0 without any."""
        prompt_BQD = torch.where(first.real[..., None], first.prompt, 0)
        wide = torch.promote_types(first.prompt.dtype, torch.float32)  # fp16 does not hold the sum of a long prompt
        if self.reads != "attention":
            sum_BD = prompt_BQD.sum(dim=1, dtype=wide)
            return sum_BD / first.real.sum(dim=1, keepdim=True).clamp(min=1)
        score_BQ = call(self.query, prompt_BQD)[..., 0].to(wide) / math.sqrt(prompt_BQD.shape[2])
        weight_BQ = score_BQ.masked_fill(~first.real, torch.finfo(wide).min).softmax(dim=1)
        return (weight_BQ[..., None] * prompt_BQD).sum(dim=1)


def threshold_logprobs(model: "MaskedDiffusionLM", first: FirstPass, asked: Tensor | None = None) -> Tensor:
    """Log-probabilities fp32 [B, bins], nats, by the threshold of a model that has one.

    asked: int64, the rows that count, perhaps several times; what others get is arbitrary. None: all. Of a sharded model with a gradient: only in
    ``read`` of a forward.
    """
    assert model.threshold is not None
    if model.config.threshold_reads != "entropies":
        return model.threshold(first)
    entropy_BL = torch.zeros(first.completion.shape[:2], device=first.completion.device)
    rows_k = slice(None) if asked is None else asked.unique()
    entropy_BL[rows_k] = _entropies(model, first.completion[rows_k])
    return model.threshold(first, entropy_BL)


@torch.no_grad()
def _entropies(model: "MaskedDiffusionLM", hidden_kLD: Tensor) -> Tensor:
    """fp32 [k, L], nats, of what each position is predicted to hold, the mask excluded."""
    size = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    logits = (model.head(part_ND) for part_ND in hidden_kLD.flatten(0, 1).split(size))
    narrowed = (some.float() if some.dtype == torch.float64 else some for some in logits)
    entropies = [row_statistics(some, banned_ids=[model.mask_id]).entropy for some in narrowed]
    return torch.cat(entropies).view(hidden_kLD.shape[:2])
