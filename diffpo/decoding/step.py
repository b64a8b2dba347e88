"""One denoising step of some rows, in place: evaluate the network, propose a token for each masked position, commit what the rule allows.

With ``static`` every shape is fixed by the number of rows and nothing waits for the device, so that a CUDA graph can hold the step: the head
runs at all positions of the active blocks instead of the masked ones.

Shapes: A rows, U distinct ones among them, L completion positions, Q evaluated positions, N positions at which the head runs, W of a block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffpo.decoding.rows import Rows
from diffpo.decoding.rules import Rule, StepPredictions
from diffpo.keyed_random import uniform
from diffpo.models.shared_pass import distinct_rows
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo_kernels import entropy_bounded_commit_, row_statistics

_TOKEN_DRAW = 0  # purpose in the random key; the rules' own purposes start at 1
_LOGITS_AT_ONCE = 2**28  # half a gigabyte in bf16


@dataclass(frozen=True)
class Sampling:
    """How tokens are proposed: temperature (0 = argmax), guidance scale (0 = none), the seed of the draws and, beside it, each prompt's key.

    row_ids: int64 [B] on the CPU, None: the prompts' indices.
    """

    temperature: float = 0.0
    cfg_scale: float = 0.0
    seed: int = 0
    row_ids: Tensor | None = None


class Hidden(NamedTuple):
    """Hidden states [U, Q, D]; source: each row's place among the U, None where U = A; column [A]: that of completion position 0."""

    states: Tensor
    source: Tensor | None = None
    column: Tensor | None = None

    def at(self, row_N: Tensor, position_N: Tensor) -> Tensor:
        """Those [N, D] of these completion positions."""
        place_N = row_N if self.source is None else self.source[row_N]
        column_N = position_N if self.column is None else position_N + self.column[row_N]
        return self.states.flatten(0, 1)[place_N * self.states.shape[1] + column_N]

    def of(self, rows: slice) -> Tensor:
        """Those [rows, L, D] of whole completions."""
        return self.states[rows] if self.source is None else self.states[self.source[rows]]


def exact_hidden(model: MaskedDiffusionLM, rows: Rows, padded: bool, shared: bool) -> Hidden:
    """The completions' hidden states, from the whole sequences; ``shared``: rows that are equal are evaluated once."""
    padding = rows.padding if padded else None
    if not shared or len(rows) == 1:
        return Hidden(model(rows.sequence, padding=padding)[:, rows.prompt_length :])
    key = rows.sequence if padding is None else torch.cat([rows.sequence, padding[:, None]], dim=1)
    first_U, source_A = distinct_rows(key)
    hidden = model(rows.sequence[first_U], padding=None if padding is None else padding[first_U])
    return Hidden(hidden[:, rows.prompt_length :], source_A)


def without_prompt(rows: Rows, mask_id: int) -> Rows:
    """The same rows with their prompts masked, as classifier-free guidance compares them."""
    column = torch.arange(rows.sequence.shape[1], device=rows.sequence.device)
    prompt = (column >= rows.padding[:, None]) & (column < rows.prompt_length)
    return Rows(**vars(rows) | {"sequence": torch.where(prompt, mask_id, rows.sequence)})


def set_thresholds(model: MaskedDiffusionLM, rows: Rows, fresh: slice, hidden: Hidden, rule: Rule, seed: int) -> None:
    """The thresholds of rows in their first step, from its hidden states."""
    threshold = rule.thresholds(model, hidden.of(fresh), rows.prompt[fresh], rows.row_id[fresh], seed)
    rows.gamma[fresh], rows.gamma_bin[fresh], rows.gamma_logprob[fresh] = threshold


def commit(
    model: MaskedDiffusionLM,
    rows: Rows,
    hidden: Hidden,
    unconditional: Hidden | None,
    block_length: int,
    rule: Rule,
    sampling: Sampling,
    static: bool,
    eos_ids: tuple[int, ...],
) -> None:
    """The rest of a step, after the network: tokens, records, blocks and ``done``, all in ``rows``. A row that is done does not change."""
    L, mask_id = rows.gen_length, model.mask_id
    start, end = torch.where(rows.done, L, rows.start), torch.where(rows.done, L, rows.end)
    position_L = torch.arange(L, device=start.device)
    candidates = (rows.tokens == mask_id) & (position_L >= start[:, None]) & (position_L < end[:, None])
    row_N, position_N = _windows(start, block_length, L) if static else candidates.nonzero(as_tuple=True)
    hidden_ND = [part.at(row_N, position_N) for part in (hidden, unconditional) if part is not None]
    uniform_N = None
    if sampling.temperature > 0:
        uniform_N = uniform(sampling.seed, _TOKEN_DRAW, rows.row_id[row_N], rows.nfe[row_N] + 1, position_N)
    predicted = _predict(model, hidden_ND, uniform_N, sampling)

    def spread(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(candidates.shape).index_put_((row_N, position_N), values_N)

    entropy = spread(predicted.entropy)
    step = StepPredictions(candidates, entropy, spread(predicted.confidence), spread(predicted.top1), spread(predicted.top2),
                           spread(predicted.odds), spread(predicted.top_odds), block_length, L // block_length, rows.block_step, rows.gamma)  # fmt: skip
    plan = rule.plan(step)
    before = start.clone()
    committed = entropy_bounded_commit_(
        rows.tokens, spread(predicted.token), plan.proxy, plan.cost, plan.budget, mask_id, start, end, rule=plan.rule,
        proposal_logprob=spread(predicted.logprob), logprob=rows.logprob, commit_step=rows.commit_step, nfe=rows.nfe,
        advance=True, max_window=block_length,
    )  # fmt: skip
    rows.entropy.copy_(torch.where(committed, entropy, rows.entropy))
    rows.block_step.copy_(torch.where(start == before, rows.block_step + 1, 0))
    rows.failed.logical_or_((spread(~predicted.valid) & candidates).any(dim=1))
    rows.done.logical_or_(rows.failed | _finished(rows.tokens, mask_id, eos_ids if rule.stops_at_eos else ()))
    rows.start.copy_(torch.where(rows.done, L, start)), rows.end.copy_(torch.where(rows.done, L, end))


def _windows(start: Tensor, block_length: int, L: int) -> tuple[Tensor, Tensor]:
    """Row and position [A W] of the active blocks; a row that is done repeats its last position, which is no candidate."""
    position_AW = (start[:, None] + torch.arange(block_length, device=start.device)).clamp(max=L - 1)
    row_AW = torch.arange(len(start), device=start.device)[:, None].expand_as(position_AW)
    return row_AW.flatten(), position_AW.flatten()


class _Predictions(NamedTuple):
    """Of N positions: the proposed token and its log-prob, and the untempered distribution's statistics (``StepPredictions``)."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    confidence: Tensor
    top1: Tensor
    top2: Tensor
    odds: Tensor
    top_odds: Tensor
    valid: Tensor


def _predict(model, hidden_ND: list[Tensor], uniform_N: Tensor | None, sampling: Sampling) -> _Predictions:
    """In chunks, so that the logits of long blocks do not stand in memory at once; ``hidden_ND``: also the unconditional ones if any."""
    chunk = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    chunks = [part.split(chunk) for part in (*hidden_ND, *(() if uniform_N is None else (uniform_N,)))]
    parts = [
        _predict_chunk(model, part[: len(hidden_ND)], None if uniform_N is None else part[-1], sampling)
        for part in zip(*chunks, strict=True)
    ]
    return parts[0] if len(parts) == 1 else _Predictions(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _predict_chunk(model, hidden_ND: tuple[Tensor, ...], uniform_N: Tensor | None, sampling: Sampling) -> _Predictions:
    logits_NV = model.head(hidden_ND[0])
    if len(hidden_ND) == 2:
        unconditional_NV = model.head(hidden_ND[1])
        logits_NV = _guided(logits_NV, unconditional_NV, sampling.cfg_scale)
    if logits_NV.dtype == torch.float64:
        logits_NV = _narrowed(logits_NV, model.mask_id)
    stats = row_statistics(logits_NV, sampling.temperature, uniform_N, banned_ids=[model.mask_id])
    token_N = stats.token.clamp(min=0)  # of a row that is not valid it is -1, which no embedding can take
    # The odds of a token that is not the most probable one are at least 1: its confidence has their digits.
    odds_N = torch.where(stats.confidence == stats.top1, stats.odds, 1 / stats.confidence - 1)
    return _Predictions(
        token_N, stats.logprob, stats.entropy, stats.confidence, stats.top1, stats.top2, odds_N, stats.odds, stats.valid
    )


def _guided(logits_NV: Tensor, unconditional_NV: Tensor, scale: float) -> Tensor:
    """u + (scale + 1)(c - u), formed as in the published code; a token impossible with the prompt (-inf) stays so."""
    if logits_NV.dtype == torch.float16:  # the sum would leave its range
        logits_NV, unconditional_NV = logits_NV.float(), unconditional_NV.float()
    guided_NV = unconditional_NV + (scale + 1) * (logits_NV - unconditional_NV)
    return torch.where(logits_NV == -torch.inf, logits_NV, guided_NV)


def _narrowed(logits_NV: Tensor, mask_id: int) -> Tensor:
    """float64 logits for the operator, which takes what networks run in: as differences to the largest, which float32 holds more exactly."""
    logits_NV = logits_NV.clone()
    logits_NV[:, mask_id] = -torch.inf
    return (logits_NV - logits_NV.amax(dim=1, keepdim=True)).float()


def _finished(tokens: Tensor, mask_id: int, eos_ids: tuple[int, ...]) -> Tensor:
    """bool [A]: no masked position is left, or none before the first EOS."""
    first_mask = first_position(tokens, (mask_id,))
    return (first_mask == tokens.shape[1]) | (first_position(tokens, eos_ids) < first_mask)


def first_position(tokens: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """int64 [A]: where one of the tokens stands first in each row [A, L], L where none does."""
    L, found = tokens.shape[1], torch.zeros_like(tokens, dtype=torch.bool)
    for token_id in token_ids:  # a few; a tensor of them could not be made while a graph is captured
        found |= tokens == token_id
    return torch.where(found, torch.arange(L, device=tokens.device), L).amin(dim=1)
