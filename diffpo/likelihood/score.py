"""Scoring latents: every distinct network input is evaluated once, in parts of at most ``tokens_at_once`` tokens.

Shapes: B rollouts, L completion positions, Q prompt positions, S = Q + L, P latents, U distinct inputs, N scored tokens, M drawn actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from diffpo.keyed_random import hashed
from diffpo.likelihood.latents import Latents, Scores
from diffpo.models.layout import FirstPass, Full, Texts
from diffpo.models.shared_pass import distinct_rows
from diffpo.models.threshold import threshold_logprobs
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.trajectory import Trajectory

_HASH_TOKENS = 1 << 20  # inputs are compared by a hash, that of at most this many tokens at a time


class PartTooSmallError(ValueError):
    """A part of ``tokens_at_once`` tokens does not hold one sequence."""

    def __init__(self, width: int, tokens_at_once: int):
        super().__init__(f"tokens_at_once must be at least {width}, the length of one sequence, got {tokens_at_once}")


def score(
    model: MaskedDiffusionLM,
    trajectory: Trajectory,
    latents: Latents,
    tokens_at_once: int | None = None,
) -> Scores:
    """The log-probs of the latents' tokens, and of the recorded actions from each rollout's z_0.

    Tokens are scored at the trajectory's temperature (at 1 for a greedy one) with the mask token excluded, as they were drawn.
    tokens_at_once: of the network, prompt and completion together; None: all at once. It changes results by rounding alone.
    Differentiable; what is kept for the backward pass is that of all parts (``training/update.py`` frees each part).

    ValueError for a trajectory of another model or a guided one, and for a part that is too small for one sequence.
    """
    return Plan(model, trajectory, latents, tokens_at_once).evaluate(model)


class Plan:
    """The parts in which latents are scored; iterates over `Part`.

    rank, size: of ``size`` processes that share the work, the parts of process ``rank``. The distinct inputs are dealt out like cards.
    in_step: with as many parts as any other process; what is one too many reads an input again and scores nothing.
    """

    def __init__(
        self,
        model: MaskedDiffusionLM,
        trajectory: Trajectory,
        latents: Latents,
        tokens_at_once: int | None = None,
        rank: int = 0,
        size: int = 1,
        in_step: bool = False,
    ):
        check_same_model(model, trajectory)
        self.trajectory, self.latents = trajectory, latents
        B, L = trajectory.tokens.shape
        width = model.layout.width(trajectory.prompt_ids.shape[1], L)
        if tokens_at_once is not None and not hasattr(tokens_at_once, "__index__"):
            raise ValueError(f"tokens_at_once must be an int (tokens) or None (all at once), got {tokens_at_once!r}")
        if tokens_at_once is not None and tokens_at_once < width:
            raise PartTooSmallError(width, tokens_at_once)
        self.acting = model.threshold is not None and "gamma" in trajectory.actions
        at_once = tokens_at_once // width if tokens_at_once else None
        self.inputs = with_first(latents, B) if self.acting else latents
        first_U, source_P = distinct_inputs(trajectory, self.inputs, model.layout, at_once)
        dealt_U = (torch.arange(len(first_U), device=first_U.device) % size).argsort(stable=True)
        self.first_U, self.source_P = first_U[dealt_U], dealt_U.argsort()[source_P]
        counts = [len(range(first, len(first_U), size)) for first in range(size)]
        self.start, self.stop = sum(counts[:rank]), sum(counts[: rank + 1])
        self.size = at_once or max(counts[0], 1)
        self.idle = -(-counts[0] // self.size) - len(self) if in_step else 0
        self.scored_N2 = latents.weight.nonzero()
        source_N = self.source_P[self.scored_N2[:, 0]]
        self.order = source_N.argsort(stable=True)  # of the scored tokens: by part
        self.source_N = source_N[self.order]

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.size)

    def __iter__(self) -> Iterator[Part]:
        edges = [*range(self.start, self.stop, self.size), self.stop]
        cuts = torch.searchsorted(self.source_N, torch.tensor(edges, device=self.source_N.device)).tolist()
        for (start, low), (stop, high) in pairwise(zip(edges, cuts, strict=True)):
            yield self._part(start, stop, low, high)
        for _ in range(self.idle):
            yield replace(self._part(0, 0, 0, 0), first=self.first_U[:1])

    def _part(self, start: int, stop: int, low: int, high: int) -> Part:
        """Of the distinct inputs from ``start`` to ``stop``, with the scored tokens from ``low`` to ``high``."""
        index = self.order[low:high]
        acting = None
        if self.acting:
            source_B = self.source_P[len(self.latents) :]
            rollout = ((source_B >= start) & (source_B < stop)).nonzero()[:, 0]
            acting = (rollout, source_B[rollout] - start)
        scored, source = self.scored_N2[index], self.source_N[low:high] - start
        return Part(self.trajectory, self.inputs, self.first_U[start:stop], index, scored, source, acting)

    def evaluate(self, model: MaskedDiffusionLM) -> Scores:
        """The scores of all parts."""
        scores = self.empty()
        for part in self:
            scores = part.filled(scores, *part.evaluate(model))
        return scores

    def empty(self) -> Scores:
        """Scores of zeros, for the parts to fill."""
        rollouts, device = len(self.trajectory), self.trajectory.tokens.device
        value = torch.zeros(len(self.scored_N2), device=device)
        actions = {"gamma": torch.zeros(rollouts, device=device)} if self.trajectory.actions else {}
        return Scores(self.latents, rollouts, self.scored_N2, value, actions)


@dataclass(frozen=True)
class Part:
    """Some of the distinct inputs: latents whose input they are, int64 [u]; the tokens scored from them, their index among all that are
    scored [N], (latent, position) [N, 2], and from which of the u; and the rollouts whose action is read from them [M], with which of the u."""

    trajectory: Trajectory
    latents: Latents
    first: Tensor
    index: Tensor
    scored: Tensor
    source: Tensor
    acting: tuple[Tensor, Tensor] | None

    def evaluate(self, model: MaskedDiffusionLM) -> tuple[Tensor, Tensor | None]:
        """Log-probs fp32 [N] of the tokens and [M] of the actions (None without any)."""
        arrangement = model.layout.arrange(network_inputs(self.trajectory, self.latents, self.first))

        def read(hidden_uSD: Tensor) -> tuple[Tensor, Tensor | None]:
            first = arrangement.first_pass(hidden_uSD)
            return self._logprobs(model, first.completion), self._action_logprobs(model, first)

        return model(arrangement.tokens, **arrangement.attention, read=read)

    def _logprobs(self, model: MaskedDiffusionLM, hidden_uLD: Tensor) -> Tensor:
        t, L = self.trajectory, hidden_uLD.shape[1]
        latent_N, position_N = self.scored.unbind(dim=1)
        return model.logprobs(
            hidden_uLD.flatten(0, 1),
            t.tokens[self.latents.row[latent_N], position_N],
            temperature=t.temperature or 1.0,
            banned_ids=[model.mask_id],
            rows=self.source * L + position_N,
        )

    def _action_logprobs(self, model: MaskedDiffusionLM, first: FirstPass) -> Tensor | None:
        if self.acting is None:
            return None
        rollout_M, source_M = self.acting
        chosen_M = self.trajectory.actions["gamma"].choice[rollout_M]
        logprob_MG = threshold_logprobs(model, first, source_M)[source_M]
        logprob_M = logprob_MG.gather(1, chosen_M.clamp(min=0)[:, None])[:, 0]
        return torch.where(chosen_M >= 0, logprob_M, 0.0)

    def filled(self, scores: Scores, logprob_N: Tensor, action_M: Tensor | None) -> Scores:
        """``scores`` with this part's values in their places."""
        value = scores.value.to(logprob_N.dtype).index_copy(0, self.index, logprob_N)
        actions = scores.actions
        if action_M is not None and self.acting is not None:
            actions = {"gamma": actions["gamma"].to(action_M.dtype).index_put((self.acting[0],), action_M)}
        return replace(scores, value=value, actions=actions)

    def of(self, scores: Scores) -> tuple[Tensor, Tensor | None]:
        """This part's values out of ``scores`` [N] and [M]; None where there are none."""
        action = scores.actions.get("gamma")
        action_M = None if self.acting is None or action is None else action[self.acting[0]]
        return scores.value[self.index], action_M


def check_same_model(model: MaskedDiffusionLM, trajectory: Trajectory) -> None:
    """ValueError if the model cannot have decoded the trajectory."""
    if trajectory.cfg_scale != 0:
        raise ValueError(
            f"the trajectory was decoded with cfg_scale {trajectory.cfg_scale}: guided draws have no model likelihood"
        )
    if trajectory.mask_id != model.mask_id:
        raise ValueError(
            f"the trajectory is another model's: its mask token is {trajectory.mask_id}, this model's {model.mask_id}"
        )
    read = [ids.aminmax() for ids in (trajectory.tokens, trajectory.prompt_ids) if ids.numel()]
    for token in (int(edge) for edges in read for edge in edges):
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(
                f"the trajectory is another model's: it holds token {token}, this model's vocabulary {model.config.vocab_size} tokens"
            )
    bins, drawn = model.config.threshold_gammas, trajectory.actions.get("gamma")
    if bins and drawn and drawn.choice.numel() and (chosen := int(drawn.choice.max())) >= len(bins):
        raise ValueError(
            f"the trajectory is another model's: it drew threshold {chosen}, counted from 0, this model has {len(bins)}"
        )


def with_first(latents: Latents, rollouts: int) -> Latents:
    """The latents, and behind them z_0 of each of so many rollouts, behind its whole prompt: from it a threshold is read."""
    masked, weight, prompt = latents.masked, latents.weight, latents.prompt_masked
    return Latents(
        torch.cat([latents.row, torch.arange(rollouts, device=latents.row.device)]),
        torch.cat([masked, masked.new_ones(rollouts, masked.shape[1])]),
        torch.cat([weight, weight.new_zeros(rollouts, weight.shape[1])]),
        None if prompt is None else torch.cat([prompt, prompt.new_zeros(rollouts, prompt.shape[1])]),
    )


def network_inputs(trajectory: Trajectory, latents: Latents, index: Tensor) -> Texts:
    """What the network is to read for the latents with these indices, int64 [u]."""
    chosen = latents[index]
    row, mask_id = chosen.row, trajectory.mask_id
    prompt_ids, real = trajectory.prompt_ids[row], trajectory.prompt_mask[row]
    if chosen.prompt_masked is not None:
        prompt_ids = prompt_ids.masked_fill(chosen.prompt_masked & real, mask_id)
    return Texts(prompt_ids, real, trajectory.tokens[row].masked_fill(chosen.masked, mask_id))


def distinct_inputs(
    trajectory: Trajectory, latents: Latents, layout: Full, at_once: int | None
) -> tuple[Tensor, Tensor]:
    """Index [U] of the first of each distinct network input, ascending, and the place among them of each latent's.

    The members of a group share z_0, and often the first latents after it. Inputs are told apart by 128 bits of hash, which are computed
    for ``at_once`` inputs at a time.
    """
    width = layout.width(trajectory.prompt_ids.shape[1], trajectory.tokens.shape[1])
    rows = min(max(_HASH_TOKENS // max(width, 1), 1), at_once or _HASH_TOKENS)
    keys = [torch.zeros(0, 2, dtype=torch.int64, device=latents.row.device)]
    for index in torch.arange(len(latents), device=latents.row.device).split(rows):
        sequence = layout.identity(network_inputs(trajectory, latents, index))
        position = torch.arange(sequence.shape[1], device=sequence.device)
        keys.append(torch.stack([hashed(salt, position, sequence).sum(dim=1) for salt in (0, 1)], dim=1))
    key_P2 = torch.cat(keys)
    if len(key_P2) == 0:
        return key_P2[:, 0], key_P2[:, 0]
    first_U, source_P = distinct_rows(key_P2)
    order = first_U.argsort()
    return first_U[order], order.argsort()[source_P]
