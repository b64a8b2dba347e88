"""The decoders that ours is held against, written as their papers describe them: the whole batch, a block at a time.

Every step runs the network on the whole sequence, the head at every position of it ("sequence", as the published programs do) or
at the active block alone ("block", what a careful user would write), and a softmax in float64, as the published LLaDA program does.
Greedy, prompts of one length, no early end. Shapes: B rows, P prompt positions, L completion positions, S positions with logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from diffpo.models.transformer import MaskedDiffusionLM

STATISTICS = "statistics and commit"  # the name under which a profile finds that part of a step


class Prediction(NamedTuple):
    """probability: [B, S, V]; confidence: of the most probable token, [B, S], -inf where nothing may be committed; step: in its block."""

    probability: Tensor
    confidence: Tensor
    step: int


Choose = Callable[[Prediction], Tensor]  # bool [B, S]: the positions to commit


class Decoded(NamedTuple):
    """tokens: [B, L]; nfe: steps in which a row had something left to decode in the active block, int64 [B]; forwards: of the batch."""

    tokens: Tensor
    nfe: Tensor
    forwards: int


@dataclass(frozen=True)
class PlainLoop:
    """A commit rule in a plain loop. head: where logits are formed; dtype: of the softmax."""

    choose: Choose
    head: Literal["sequence", "block"] = "sequence"
    dtype: torch.dtype = torch.float64

    @torch.no_grad()
    def __call__(self, model: MaskedDiffusionLM, prompt_BP: Tensor, gen_length: int, block_length: int) -> Decoded:
        (B, P), mask_id, forwards = prompt_BP.shape, model.mask_id, 0
        nfe = torch.zeros(B, dtype=torch.int64, device=prompt_BP.device)
        x = torch.cat([prompt_BP, prompt_BP.new_full((B, gen_length), mask_id)], dim=1)
        for start in range(P, P + gen_length, block_length):
            block = slice(start, start + block_length)
            span = block if self.head == "block" else slice(0, P + gen_length)
            inside = torch.zeros_like(x, dtype=torch.bool)
            inside[:, block] = True
            step = 0
            while (x[:, block] == mask_id).any():
                candidates = (x == mask_id) & inside
                logits_BSV = model.head(model(x)[:, span])
                with record_function(STATISTICS):
                    nfe += candidates.any(dim=1)
                    x[:, span] = self._commit(x[:, span], candidates[:, span], logits_BSV, step)
                step, forwards = step + 1, forwards + 1
        return Decoded(x[:, P:], nfe, forwards)

    def _commit(self, x: Tensor, candidates: Tensor, logits_BSV: Tensor, step: int) -> Tensor:
        proposal = logits_BSV.argmax(dim=-1)
        probability = logits_BSV.to(self.dtype).softmax(dim=-1)
        confidence = probability.gather(-1, proposal[..., None])[..., 0].masked_fill(~candidates, -math.inf)
        chosen = self.choose(Prediction(probability, confidence, step)) & candidates
        return torch.where(chosen, proposal, x)


def fixed_schedule(steps_per_block: int, block_length: int) -> Choose:
    """LLaDA (arXiv 2502.09992): the most confident tokens of each row, as many in each step, one more in the first where it does not divide."""

    def choose(prediction: Prediction) -> Tensor:
        count = block_length // steps_per_block + (prediction.step < block_length % steps_per_block)
        chosen = torch.zeros_like(prediction.confidence, dtype=torch.bool)
        for row, confidence in enumerate(prediction.confidence):
            chosen[row, confidence.topk(count).indices] = True
        return chosen

    return choose


def confidence_threshold(p: float) -> Choose:
    """Fast-dLLM (arXiv 2505.22618): all that are at least this confident, and the most confident of each row."""

    def choose(prediction: Prediction) -> Tensor:
        best = torch.zeros_like(prediction.confidence, dtype=torch.bool)
        best.scatter_(1, prediction.confidence.argmax(dim=1, keepdim=True), True)
        return (prediction.confidence >= p) | best

    return choose


def entropy_bounded(gamma: float) -> Choose:
    """arXiv 2505.24857: in the order of their entropies, as many as their sum less the largest stays within gamma nats."""

    def choose(prediction: Prediction) -> Tensor:
        p = prediction.probability
        entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(dim=-1)
        entropy = entropy.masked_fill(prediction.confidence == -math.inf, math.inf)
        ordered, order = entropy.sort(dim=1, stable=True)
        within = ordered.cumsum(dim=1) - ordered <= gamma  # ascending: the largest of a prefix is its last
        return torch.zeros_like(within).scatter_(1, order, within)

    return choose
