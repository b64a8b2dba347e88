"""The denoising loop: a queue of prompts through a fixed number of rows. A finished row leaves and a waiting prompt takes its place.

Shapes: B prompts, R rows in flight at most, A of them now, P prompt positions, L completion positions.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from diffpo.decoding.cache import KeyValueCache, due_for_refresh, whole_pass, window_pass
from diffpo.decoding.graphs import Flags, StepGraphs
from diffpo.decoding.rows import Rows, filled_holes
from diffpo.decoding.rules import Rule
from diffpo.decoding.step import Hidden, Sampling, commit, exact_hidden, first_position, set_thresholds, without_prompt
from diffpo.decoding.stopping import StopStrings
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.trajectory import Action, Trajectory

_WIDTHS = 64  # prompt widths of static steps are multiples of this


@dataclass(frozen=True)
class Settings:
    """What is decoded, and how. cache, cache_refresh: see cache.py.

    static: steps of fixed shapes (step.py), ``graphs``: replayed from CUDA graphs, False, True or None (where they can be captured);
    lag: how many steps late a static decode learns which rows are done, so that the device never waits for the host.
    """

    gen_length: int
    block_length: int
    rule: Rule
    sampling: Sampling
    cache: str = "none"
    cache_refresh: int | None = None
    stop: tuple[str, ...] = ()
    static: bool = False
    graphs: bool | None = False
    lag: int = 0


class Finished(NamedTuple):
    """Rows that ended together. prompts: their indices, int64 on the CPU; seconds: wall-clock from each one's entering the batch to now."""

    prompts: Tensor
    trajectory: Trajectory
    seconds: list[float]


@torch.no_grad()
def denoise(
    model: MaskedDiffusionLM, prompt_ids: Tensor, prompt_mask: Tensor, settings: Settings, rows: int
) -> Iterator[Finished]:
    """Decode B left-padded prompts [B, P], ``rows`` at a time; yields rows as they finish.

    The longest prompts come first, so that rows in flight have similar lengths. A row's result depends on its prompt and the key of its
    draws alone, up to rounding. When memory runs out, the rows in flight start again, half as many at a time.

    FloatingPointError, with the keys of the prompts, when logits are not finite; torch.OutOfMemoryError when a single row does not fit.
    """
    lengths = prompt_mask.sum(dim=1).cpu()
    unfinished = lengths.argsort(descending=True, stable=True)
    while len(unfinished):
        rows, memory_error = min(rows, len(unfinished)), None
        try:
            for finished in Decoder(model, prompt_ids, prompt_mask, settings, rows).run(unfinished):
                unfinished = unfinished[~torch.isin(unfinished, finished.prompts)]
                yield finished
        except torch.OutOfMemoryError as error:
            memory_error = str(error)  # not the error itself, which would keep the tensors of its frames alive
        if memory_error is not None:
            rows = _halved(rows, memory_error, settings)


class Decoder:
    """Rows in flight with their caches, graphs and host-side bookkeeping."""

    def __init__(
        self, model: MaskedDiffusionLM, prompt_ids: Tensor, prompt_mask: Tensor, settings: Settings, rows: int
    ):
        self.model, self.settings, self.limit, self.eos_ids = model, settings, rows, model.eos_ids
        self.prompt_ids, self.prompt_mask, self.lengths = prompt_ids, prompt_mask, prompt_mask.sum(dim=1).cpu()
        P, L = prompt_ids.shape[1], settings.gen_length
        spare = int(settings.static and rows > 1)  # a row that is never alive, to fill up an index
        self.rows = Rows.empty(rows + spare, P, L, model.device)
        self.cache = KeyValueCache(model, rows + spare, P + L) if settings.cache != "none" else None
        self.row_ids = torch.arange(len(prompt_ids)) if settings.sampling.row_ids is None else settings.sampling.row_ids
        self.ids = torch.zeros(0, dtype=torch.int64)  # prompts in flight
        self.entered: dict[int, float] = {}  # when, by the host's clock
        self.flags = torch.zeros(
            4, rows + spare, dtype=torch.int64, device=model.device
        )  # done, failed, due for a refresh, start
        self.host, self.pending = None, Flags(settings.lag)  # the flags of the rows in flight, without a lag
        self.index = torch.full((rows + spare,), rows, device=model.device)
        self.graphs = None if settings.graphs is False else StepGraphs(model.device, required=settings.graphs is True)
        self.stop = StopStrings(model, settings.stop) if settings.stop else None

    def run(self, waiting: Tensor) -> Iterator[Finished]:
        """Decode the waiting prompts in order; yields those that finished together, right after their last step."""
        while True:
            waiting, fresh = self._admit(waiting)
            if len(self.ids) == 0:
                return
            self._step(fresh)
            done, failed = self._finished()
            if done.any():
                yield self._leave(done)
            if failed:
                scale = self.settings.sampling.cfg_scale
                cause = f", guided with cfg_scale {scale:g}," if scale else ""
                raise FloatingPointError(
                    f"the model's logits{cause} are NaN or infinite for {len(failed)} prompts, first: {failed[:8]}"
                )

    def _admit(self, waiting: Tensor) -> tuple[Tensor, int]:
        """Fill the free rows; returns the prompts that still wait, and how many rows are new: the last ones."""
        A, entering = len(self.ids), waiting[: self.limit - len(self.ids)]
        if len(entering) == 0:
            return waiting, 0
        device, length = self.model.device, self.settings.block_length
        ids, padding = entering.to(device), (self.prompt_ids.shape[1] - self.lengths[entering]).to(device)
        keys, place = self.row_ids[entering].to(device), slice(A, A + len(entering))
        self.rows.admit(place, self.prompt_ids[ids], padding, ids, keys, length, self.model.mask_id)
        self.ids, self.host = torch.cat([self.ids, entering]), None
        self.entered |= dict.fromkeys(entering.tolist(), perf_counter())
        return waiting[len(entering) :], len(entering)

    def _step(self, fresh: int) -> None:
        """One step of all rows in flight, or, with a cache, of those due for a refresh if there are any."""
        A, static, lengths = len(self.ids), self.settings.static, self.lengths[self.ids]
        count, width = (_bucket(A, self.limit), self._width(lengths)) if static else (A, int(lengths.max()))
        padded = bool((lengths != width).any())
        index, positions = slice(0, count), None
        if self.cache is not None:
            due = self._due(fresh)
            if len(due):
                A, count = len(due), _bucket(len(due), self.limit) if static else len(due)
                index = self.index[:count]
                index.fill_(len(self.rows) - 1)[:A] = due.to(index.device)
            else:
                positions, width = self._window_positions(), (self.prompt_ids.shape[1] if static else width)
                padded = bool((lengths != width).any())
        step = partial(self._evaluate, index, width, padded, positions, slice(A - fresh, A))
        if self.graphs is None or fresh:
            step()
        else:
            self.graphs.run((count, width, padded, positions, isinstance(index, slice)), step)
        self.pending.push(self.flags, self.ids)

    def _evaluate(self, index: Tensor | slice, width: int, padded: bool, positions: int | None, fresh: slice) -> None:
        """The step itself, static where the settings say so: every tensor it reads or leaves behind is one of this object's."""
        settings, model, mask_id = self.settings, self.model, self.model.mask_id
        selected = self.rows[index]
        rows, unconditional = selected.narrow(width), None
        if self.cache is None:
            hidden = exact_hidden(model, rows, padded, shared=not settings.static)
            if settings.sampling.cfg_scale != 0:
                unconditional = exact_hidden(model, without_prompt(rows, mask_id), padded, shared=not settings.static)
        else:
            hidden = self._cached_hidden(rows, index, padded, positions)
        if fresh.start < fresh.stop:
            set_thresholds(model, rows, fresh, hidden, settings.rule, settings.sampling.seed)
        commit(
            model, rows, hidden, unconditional, settings.block_length, settings.rule, settings.sampling, settings.static,
            self.eos_ids,
        )  # fmt: skip
        if isinstance(index, Tensor):
            self.rows.put(index, selected)
        due = due_for_refresh(self.rows, settings.cache_refresh)
        self.flags.copy_(torch.stack([self.rows.done.long(), self.rows.failed.long(), due.long(), self.rows.start]))

    def _cached_hidden(self, rows: Rows, index: Tensor | slice, padded: bool, positions: int | None) -> Hidden:
        padding = rows.padding if padded else None
        if positions is None:
            hidden = self.model(rows.sequence, padding=padding, cache=whole_pass(self.cache, rows, index))
            return Hidden(hidden[:, rows.prompt_length :])
        shift = int(self.model.config.logit_shift)
        window = window_pass(self.cache, rows, index, self.settings.cache, shift, positions)
        hidden = self.model(rows.sequence.gather(1, window.columns), padding=padding, cache=window)
        return Hidden(hidden, column=rows.prompt_length - window.columns[:, 0])

    def _width(self, lengths: Tensor) -> int:
        return min(self.prompt_ids.shape[1], -(-int(lengths.max()) // _WIDTHS) * _WIDTHS)

    def _due(self, fresh: int) -> Tensor:
        """Places of the rows whose next step is a refresh, new ones last."""
        if self.host is None:  # rows have entered since
            return due_for_refresh(self.rows[: len(self.ids)], self.settings.cache_refresh).nonzero()[:, 0].cpu()
        return self.host[2].nonzero()[:, 0]

    def _window_positions(self) -> int:
        """How many completion positions a cached step computes in each row: a multiple of the block, rounded up to a few values."""
        block, L = self.settings.block_length, self.settings.gen_length
        if self.settings.cache == "dual":
            return block
        blocks = (L - int(self.host[3].min())) // block
        return _bucket(blocks, L // block) * block if self.settings.static else blocks * block

    def _finished(self) -> tuple[Tensor, list[int]]:
        """The rows that are done, bool [A], and the keys of the prompts that failed, as far as is known yet."""
        popped = self.pending.pop()
        if popped is None:
            return torch.zeros(len(self.ids), dtype=torch.bool), []
        flags, prompts = popped
        if self.settings.lag == 0:  # nothing has moved since
            self.host = flags
        done, failed = (torch.isin(self.ids, prompts[flag.bool()]) for flag in flags[:2])
        if self.stop is not None:
            done |= torch.tensor(self.stop.reached(self.rows.tokens[: len(self.ids)], self.ids.tolist()))
        return done & ~failed, self.row_ids[self.ids[failed]].sort().values.tolist()

    def _leave(self, done: Tensor) -> Finished:
        """Take the rows that are done out; the last ones move into their places."""
        device, now = self.model.device, perf_counter()
        finished, leaving = self.ids[done], self.rows[done.nonzero()[:, 0].to(device)]
        source, target = filled_holes(done)
        self.ids[target] = self.ids[source]
        self.ids = self.ids[: int((~done).sum())]
        if self.host is not None:
            self.host[:, target] = self.host[:, source]
            self.host = self.host[:, : len(self.ids)]
        source, target = source.to(device), target.to(device)
        self.rows.move(source, target, len(self.ids))
        if self.cache is not None:
            self.cache.move(source, target)
        seconds = [now - self.entered.pop(prompt) for prompt in finished.tolist()]
        return Finished(finished, self._trajectory(finished, leaving), seconds)

    def _trajectory(self, ids: Tensor, rows: Rows) -> Trajectory:
        tokens, sampling = rows.tokens.clone(), self.settings.sampling
        if self.eos_ids:
            tokens.masked_fill_(rows.commit_step == 0, self.eos_ids[0])
        length = (first_position(tokens, self.eos_ids) + 1).clamp(max=rows.gen_length)
        ids = ids.to(tokens.device)
        actions = {"gamma": Action(rows.gamma_bin, rows.gamma_logprob)} if self.settings.rule.draws_gamma else {}
        return Trajectory(
            prompt_ids=self.prompt_ids[ids],
            prompt_mask=self.prompt_mask[ids],
            tokens=tokens,
            commit_step=rows.commit_step,
            logprob=rows.logprob,
            entropy=rows.entropy,
            gamma=rows.gamma,
            nfe=rows.nfe,
            length=length,
            key=rows.row_id,
            group=rows.row_id,
            version=torch.zeros_like(rows.row_id),
            mask_id=self.model.mask_id,
            temperature=sampling.temperature,
            block_length=self.settings.block_length,
            cfg_scale=sampling.cfg_scale,
            actions=actions,
        )


def _halved(rows: int, error: str, settings: Settings) -> int:
    """Half as many rows, or torch.OutOfMemoryError where there is only one."""
    if rows == 1:
        kept = "" if settings.cache == "none" else f', or decode with cache="none" instead of "{settings.cache}"'
        raise torch.OutOfMemoryError(
            f"a single row does not fit in memory: lower gen_length ({settings.gen_length}) or block_length ({settings.block_length}), "
            f"give shorter prompts, load the model in bfloat16{kept}. {error}"
        )
    warnings.warn(
        f"out of memory with {rows} rows in flight: going on with {rows // 2} (batch_size)",
        RuntimeWarning,
        stacklevel=3,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows // 2


def _bucket(count: int, limit: int) -> int:
    """The next power of two, but no more than ``limit``."""
    return min(1 << (count - 1).bit_length(), limit)
