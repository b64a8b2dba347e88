"""One denoising step of some rows, in place: evaluate the network, propose a token for each masked position, commit what the rule allows.

With ``static`` every shape is fixed by the number of rows and nothing waits for the device, so that a CUDA graph can hold the step: the head
runs at all positions of the active blocks instead of the masked ones.

Shapes: A rows, U distinct ones among them, L completion positions, Q evaluated positions, N positions at which the head runs, W of a block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from diffpo.decoding.options import ResolvedOptions
from diffpo.decoding.rows import Rows
from diffpo.decoding.rules import Plan, Rule, StepPredictions
from diffpo.decoding.terms import Number, Terms
from diffpo.keyed_random import uniform
from diffpo.models.layout import FirstPass
from diffpo.models.shared_pass import distinct_rows
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo_kernels import entropy_bounded_commit_, row_statistics
from diffpo_kernels.entropy_bounded_commit import RULES
from diffpo_kernels.validation import ANY_FLOAT, check_tensor, values_are_cheap

_TOKEN_DRAW = 0  # purpose in the random key; the rules' own purposes start at 1
_LOGITS_AT_ONCE = 2**28  # half a gigabyte in bf16


class Hidden(NamedTuple):
    """Hidden states [U, Q, D]; source: each row's place among the U, None where U = A; column: that of completion position 0, one for all or
    [A]. It may be negative: no row's completion starts so early then."""

    states: Tensor
    source: Tensor | None = None
    column: int | Tensor = 0

    def at(self, row_N: Tensor, position_N: Tensor) -> Tensor:
        """Those [N, D] of these completion positions."""
        place_N = row_N if self.source is None else self.source[row_N]
        column_N = position_N
        if isinstance(self.column, Tensor):
            column_N = position_N + self.column[row_N]
        elif self.column:
            column_N = position_N + self.column
        return self.states.flatten(0, 1)[place_N * self.states.shape[1] + column_N]

    def whole(self, row_k: Tensor, rows: Rows, positions: int) -> FirstPass:
        """Those of whole rows, whose completions have so many positions, after a pass over all that is no padding."""
        states = self.states[row_k if self.source is None else self.source[row_k]]
        before = states.shape[1] - positions
        _, padding = rows.last(states.shape[1])
        real = torch.arange(before, device=states.device) >= padding[row_k, None]
        return FirstPass(states[:, before:], states[:, :before], real)


def exact_hidden(model: MaskedDiffusionLM, rows: Rows, columns: int, padded: bool, shared: bool) -> Hidden:
    """The completions' hidden states, from the last ``columns`` columns; ``shared``: rows that are equal are evaluated once."""
    sequence, on_the_left = rows.last(columns)
    padding, source_A = on_the_left if padded else None, None
    if shared and len(rows) > 1:
        key = sequence if padding is None else torch.cat([sequence, padding[:, None]], dim=1)
        first_U, source_A = distinct_rows(key)
        sequence, padding = sequence[first_U], None if padding is None else padding[first_U]
    return Hidden(model(sequence, padding=padding), source_A, columns - rows.gen_length)


def unconditional_hidden(
    model: MaskedDiffusionLM, rows: Rows, terms: Terms, columns: int, padded: bool, shared: bool
) -> Hidden:
    """The hidden states of guided rows whose prompts are masked, as classifier-free guidance compares them."""
    if not isinstance(terms.cfg_scale, Tensor):
        return exact_hidden(model, _without_prompt(rows, terms.begin, model.mask_id), columns, padded, shared)
    guided = terms.cfg_scale.nonzero()[:, 0]
    begin = terms.begin[guided] if isinstance(terms.begin, Tensor) else terms.begin
    hidden = exact_hidden(model, _without_prompt(rows[guided], begin, model.mask_id), columns, padded, shared)
    place_A = torch.zeros_like(rows.row_id)  # of the others, which nobody asks for
    place_A[guided] = torch.arange(len(guided), device=guided.device) if hidden.source is None else hidden.source
    return hidden._replace(source=place_A)


def _without_prompt(rows: Rows, begin: int | Tensor, mask_id: int) -> Rows:
    """The same rows with their prompts masked."""
    columns = rows.sequence.shape[1]
    column, end = torch.arange(columns, device=rows.sequence.device), columns - rows.gen_length + begin
    end = end[:, None] if isinstance(end, Tensor) else end
    prompt = (column >= rows.padding[:, None]) & (column < end)
    return Rows(**vars(rows) | {"sequence": torch.where(prompt, mask_id, rows.sequence)})


def set_thresholds(
    model: MaskedDiffusionLM,
    rows: Rows,
    drawn: Sequence[tuple[ResolvedOptions, Tensor]],
    seed: int | Tensor,
    hidden: Hidden,
) -> None:
    """The thresholds that rows draw in their first step, from its hidden states. drawn: rows of one rule and length together."""
    for options, chosen in drawn:
        seed_k = seed[chosen] if isinstance(seed, Tensor) else seed
        first = hidden.whole(chosen, rows, options.gen_length)
        with _asking(options.rule):
            threshold = options.rule.thresholds(model, first, rows.row_id[chosen], seed_k)
            for kept, value in zip((rows.gamma, rows.gamma_bin, rows.gamma_logprob), threshold, strict=True):
                kept[chosen] = value.to(kept.dtype)


def commit(
    model: MaskedDiffusionLM,
    rows: Rows,
    hidden: Hidden,
    unconditional: Hidden | None,
    terms: Terms,
    static: bool,
    eos_ids: tuple[int, ...],
) -> None:
    """The rest of a step, after the network: tokens, records, blocks and ``done``, all in ``rows``. A row that is done does not change."""
    L, mask_id = rows.gen_length, model.mask_id
    start, end = torch.where(rows.done, L, rows.start), torch.where(rows.done, L, rows.end)
    position_L = torch.arange(L, device=start.device)
    candidates = (rows.tokens == mask_id) & (position_L >= start[:, None]) & (position_L < end[:, None])
    row_N, position_N = _windows(start, terms.window, L) if static else candidates.nonzero(as_tuple=True)
    at = _predict(model, rows, row_N, position_N, hidden, unconditional, terms)
    step = StepPredictions(candidates, at.entropy, at.confidence, at.top1, at.top2, at.odds, at.top_odds, rows.block_step, rows.gamma,
                           terms.block_length, terms.blocks, terms.number)  # fmt: skip
    before = start.clone()
    committed = _commit_planned(
        rows, _planned(terms, step), start, end, proposal=at.token, mask_id=mask_id,
        proposal_logprob=at.logprob, max_window=terms.window,
    )  # fmt: skip
    rows.entropy.copy_(torch.where(committed, at.entropy, rows.entropy))
    rows.block_step.copy_(torch.where(start == before, rows.block_step + 1, 0))
    rows.failed.logical_or_((candidates & ~at.valid).any(dim=1))
    rows.done.logical_or_(rows.failed | _finished(rows.tokens, mask_id, eos_ids, terms))
    rows.start.copy_(torch.where(rows.done, L, start)), rows.end.copy_(torch.where(rows.done, L, end))


class RuleError(RuntimeError):
    """A rule's own code has raised its cause, or returned what no step can take, before the step changed a row but for thresholds, which are drawn the same again.
    family: of the rule."""

    def __init__(self, rule: Rule, cause: Exception):
        super().__init__(str(cause))
        self.family = rule.family


@contextmanager
def _asking(rule: Rule) -> Iterator[None]:
    """Errors of the rule's code are told from those of the machine and the model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuleError(rule, error) from error


def _planned(terms: Terms, step: StepPredictions) -> list[tuple[Plan, Tensor | None]]:
    """What to commit, at most one plan for each way of holding costs against budgets, with its rows (bool [A], None: all)."""
    if len(terms.rules) == 1:
        return [(_plan(terms.rules[0][0], step), None)]
    order, cost, budget = torch.zeros_like(step.entropy), torch.zeros_like(step.entropy), torch.zeros_like(step.gamma)
    rows_of: dict[str, Tensor] = {}
    for rule, rows in terms.rules:
        plan = _plan(rule, step if rows is None else step[rows])
        order[rows], cost[rows], budget[rows] = plan.order, plan.cost, plan.budget
        rows_of.setdefault(plan.rule, torch.zeros_like(step.gamma, dtype=torch.bool))[rows] = True
    whole = len(rows_of) == 1
    return [(Plan(order, cost, budget, name), None if whole else rows) for name, rows in rows_of.items()]


def _plan(rule: Rule, step: StepPredictions) -> Plan:
    """The rule's plan in float32, as the operator takes it."""
    with _asking(rule):
        plan, (rows, length), device = rule.plan(step), step.candidates.shape, step.gamma.device
        for name, value, shape in (
            ("order", plan.order, (rows, length)),
            ("cost", plan.cost, (rows, length)),
            ("budget", plan.budget, (rows,)),
        ):
            check_tensor(f"the plan's {name}", value, shape, ANY_FLOAT, device)
        if plan.rule not in RULES:
            raise ValueError(f"the plan's rule must be one of {', '.join(RULES)}, got {plan.rule!r}")
        if values_are_cheap(plan.budget) and not (plan.budget >= 0).all():
            raise ValueError(f"the plan's budget must be at least 0, got {plan.budget.tolist()}")
        return Plan(plan.order.float(), plan.cost.float(), plan.budget.float(), plan.rule)


def _commit_planned(
    rows: Rows,
    plans: list[tuple[Plan, Tensor | None]],
    start: Tensor,
    end: Tensor,
    *,
    proposal: Tensor,
    mask_id: int,
    proposal_logprob: Tensor,
    max_window: int,
) -> Tensor:
    """bool [A, L], what the plans commit, in ``rows``; ``start`` and ``end`` move on. Of other rows than a plan's the window is empty."""
    committed = []
    for plan, chosen in plans:
        first, last = start, end
        if chosen is not None:
            first, last = torch.where(chosen, start, rows.gen_length), torch.where(chosen, end, rows.gen_length)
        written = entropy_bounded_commit_(
            rows.tokens, proposal, plan.order, plan.cost, plan.budget, mask_id, first, last, rule=plan.rule,
            proposal_logprob=proposal_logprob, logprob=rows.logprob, commit_step=rows.commit_step, nfe=rows.nfe,
            advance=True, max_window=max_window,
        )  # fmt: skip
        if chosen is not None:
            start.copy_(torch.where(chosen, first, start)), end.copy_(torch.where(chosen, last, end))
        committed.append(written)
    return reduce(torch.logical_or, committed)


def _windows(start: Tensor, block_length: int, L: int) -> tuple[Tensor, Tensor]:
    """Row and position [A W] of the active blocks; a row that is done repeats its last position, which is no candidate."""
    position_AW = (start[:, None] + torch.arange(block_length, device=start.device)).clamp(max=L - 1)
    row_AW = torch.arange(len(start), device=start.device)[:, None].expand_as(position_AW)
    return row_AW.flatten(), position_AW.flatten()


class _Predictions(NamedTuple):
    """Of N positions, or of all [A, L]: the proposed token and its log-prob, and the untempered distribution's statistics (``StepPredictions``)."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    confidence: Tensor
    top1: Tensor
    top2: Tensor
    odds: Tensor
    top_odds: Tensor
    valid: Tensor


def _predict(
    model: MaskedDiffusionLM,
    rows: Rows,
    row_N: Tensor,
    position_N: Tensor,
    hidden: Hidden,
    unconditional: Hidden | None,
    terms: Terms,
) -> _Predictions:
    """What is predicted at these places, [A, L], 0 elsewhere. In chunks, so that the logits of long blocks do not stand in memory at once,
    and of one guidance each."""
    if not isinstance(terms.cfg_scale, Tensor):
        places = [(terms.cfg_scale, row_N, position_N)]
    else:
        scale_N = terms.cfg_scale[row_N]
        alike = [(scale, scale_N == scale) for scale in scale_N.unique().tolist()]
        places = [(scale, row_N[chosen], position_N[chosen]) for scale, chosen in alike]
    size = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    parts = []
    for scale, row_n, position_n in places:
        for row, position in zip(row_n.split(size), position_n.split(size), strict=True):
            guide = unconditional if scale else None
            parts.append((row, position, *_predict_chunk(model, rows, row, position, hidden, guide, terms, scale)))
    row_N, position_N, *predicted = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    shape = rows.commit_step.shape
    return _Predictions(*(some.new_zeros(shape).index_put_((row_N, position_N), some) for some in predicted))


def _predict_chunk(
    model: MaskedDiffusionLM,
    rows: Rows,
    row_N: Tensor,
    position_N: Tensor,
    hidden: Hidden,
    unconditional: Hidden | None,
    terms: Terms,
    scale: float,
) -> _Predictions:
    """At N places, guided by ``scale`` where there are unconditional states."""

    def each(value: Number | Tensor) -> Number | Tensor:
        return value[row_N] if isinstance(value, Tensor) else value

    logits_NV = model.head(hidden.at(row_N, position_N))
    if unconditional is not None:
        logits_NV = _guided(logits_NV, model.head(unconditional.at(row_N, position_N)), scale)
    if logits_NV.dtype == torch.float64:
        logits_NV = _narrowed(logits_NV, model.mask_id)
    uniform_N = None
    if terms.draws:
        own_N = position_N - each(terms.begin)
        uniform_N = uniform(each(terms.seed), _TOKEN_DRAW, rows.row_id[row_N], rows.nfe[row_N] + 1, own_N)
    stats = row_statistics(logits_NV, each(terms.temperature), uniform_N, banned_ids=[model.mask_id])
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


def _finished(tokens: Tensor, mask_id: int, eos_ids: tuple[int, ...], terms: Terms) -> Tensor:
    """bool [A]: no masked position is left, or, where rows stop at it, none before the first EOS."""
    first_mask = first_position(tokens, (mask_id,), terms.begin)
    done = first_mask == tokens.shape[1]
    if terms.stops_at_eos is False:
        return done
    ended = first_position(tokens, eos_ids, terms.begin) < first_mask
    return done | (ended if terms.stops_at_eos is True else ended & terms.stops_at_eos)


def first_position(tokens: Tensor, token_ids: tuple[int, ...], begin: int | Tensor = 0) -> Tensor:
    """int64 [A]: where one of the tokens stands first in each row [A, L], from position ``begin`` on; L where none does."""
    L, found = tokens.shape[1], torch.zeros_like(tokens, dtype=torch.bool)
    position_L = torch.arange(L, device=tokens.device)
    for token_id in token_ids:  # a few; a tensor of them could not be made while a graph is captured
        found |= tokens == token_id
    if isinstance(begin, Tensor) or begin:
        found &= position_L >= (begin[:, None] if isinstance(begin, Tensor) else begin)
    return torch.where(found, position_L, L).amin(dim=1)
