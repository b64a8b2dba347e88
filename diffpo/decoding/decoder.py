"""Rows in flight: a fixed number of places, of which the first are taken. A finished row leaves, the last ones move into the holes.

Shapes: R places, A rows in flight, S columns of a place, L of them completion positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from diffpo.decoding.cache import KeyValueCache, due_for_refresh, whole_pass, window_pass
from diffpo.decoding.graphs import Flags, StepGraphs
from diffpo.decoding.options import EngineOptions, ResolvedOptions
from diffpo.decoding.rows import Rows
from diffpo.decoding.step import Hidden, commit, exact_hidden, first_position, set_thresholds, unconditional_hidden
from diffpo.decoding.stopping import StopStrings
from diffpo.decoding.terms import Terms
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.trajectory import Action, Trajectory

_WIDTHS = 64  # prompt widths of static steps are multiples of this


@dataclass(frozen=True)
class StepMode:
    """static: steps of fixed shapes (step.py), where all rows agree; ``graphs``: replayed from CUDA graphs, False, True or None (where they
    can be captured); lag: how many steps late the host learns which rows are done, so that the device never waits for it."""

    static: bool = False
    graphs: bool | None = False
    lag: int = 0

    @staticmethod
    def of(model: MaskedDiffusionLM, options: EngineOptions) -> "StepMode":
        """On a GPU static steps, in graphs. With a cache the next step depends on this one's outcome, a few microseconds' wait."""
        on_gpu = model.device.type == "cuda"
        if options.cuda_graph and not on_gpu:
            raise ValueError(f"cuda_graph=True needs a model on a GPU, this one is on {model.device}")
        static = on_gpu and options.cuda_graph is not False
        return StepMode(static, options.cuda_graph if static else False, int(static and options.cache == "none"))


@dataclass(frozen=True, eq=False)
class Job:
    """One row to decode. ids: int64 1-d, the prompt; length: tokens of prompt and completion; version: of the weights
    that begin it."""

    id: int
    ids: Tensor
    length: int
    key: int
    options: ResolvedOptions
    version: int = 0


class FinishedRows(NamedTuple):
    """Rows of one kind of trajectory that ended together. seconds: wall-clock from each one's entering the batch to now; the prompts are
    padded to all columns before the completion."""

    ids: list[int]
    trajectory: Trajectory
    seconds: list[float]


class Committed(NamedTuple):
    """What a step committed in a row: ``positions`` of its completion and the ``tokens`` there; nfe: the step's number in this row."""

    id: int
    nfe: int
    positions: list[int]
    tokens: list[int]


class Decoder:
    """Rows in flight with their caches, graphs and host-side bookkeeping."""

    def __init__(
        self, model: MaskedDiffusionLM, rows: int, columns: int, gen_length: int, options: EngineOptions, mode: StepMode
    ):
        self.model, self.options, self.mode, self.limit, self.eos_ids = model, options, mode, rows, model.eos_ids
        spare = int(mode.static and rows > 1)  # a row that is never alive, to fill up an index
        self.rows = Rows.empty(rows + spare, columns, gen_length, model.device)
        self.cache = KeyValueCache(model, rows + spare, columns) if options.cache != "none" else None
        self.jobs: list[Job] = []  # in the order of their rows
        self.ids = torch.zeros(0, dtype=torch.int64)  # theirs
        self.lengths = torch.zeros(0, dtype=torch.int64)  # theirs
        self.terms: Terms | None = None  # by which they are decoded, None: they have changed
        self.entered: dict[int, float] = {}  # when, by the host's clock
        self.reported: dict[int, int] = {}  # steps whose commits have been told
        self.fresh = 0  # how many rows, the last ones, have not made a step
        told = 2 if self.cache is None else 4  # done, failed, due for a refresh, start
        self.flags = torch.zeros(told, rows + spare, dtype=torch.int64, device=model.device)
        self.host: Tensor | None = None  # the flags of the rows in flight, without a lag
        self.pending = Flags()
        self.index = torch.full((rows + spare,), rows, device=model.device)
        self.graphs = None if mode.graphs is False else StepGraphs(model.device, required=mode.graphs is True)
        self.stops: dict[tuple[str, ...], StopStrings] = {}

    def admit(self, jobs: Sequence[Job]) -> None:
        """Put these jobs, no more than are free, into the next places."""
        model, L, columns = self.model, self.rows.gen_length, self.rows.sequence.shape[1]
        begin = torch.tensor([L - job.options.gen_length for job in jobs])
        padding = torch.tensor([columns - job.length for job in jobs])
        column = torch.arange(columns)
        pad_id = model.config.pad_token_id if model.config.pad_token_id is not None else 0
        end = begin[:, None] + columns - L
        sequence = torch.where(column < end, pad_id, model.mask_id)
        sequence.masked_scatter_((column >= padding[:, None]) & (column < end), torch.cat([job.ids for job in jobs]))
        block = torch.tensor([job.options.block_length for job in jobs])
        gamma = torch.tensor([float(job.options.rule.gamma) for job in jobs])
        row_id = torch.tensor([job.key for job in jobs])
        values = (value.to(model.device) for value in (sequence, padding, row_id, begin, begin + block, gamma))
        self.rows.admit(slice(len(self.ids), len(self.ids) + len(jobs)), *values)
        self.ids, self.host, self.terms = torch.cat([self.ids, torch.tensor([job.id for job in jobs])]), None, None
        self.lengths = torch.cat([self.lengths, torch.tensor([job.length for job in jobs])])
        self.jobs += jobs
        self.entered |= dict.fromkeys((job.id for job in jobs), perf_counter())
        self.fresh = len(jobs)
        for stop in {job.options.stop for job in jobs if job.options.stop} - self.stops.keys():
            self.stops[stop] = StopStrings(model, stop)

    def step(self) -> None:
        """One step of all rows in flight, or, with a cache, of those due for a refresh if there are any."""
        A = len(self.ids)
        L, device, options = self.rows.gen_length, self.model.device, [job.options for job in self.jobs]
        terms = self.terms = self.terms or Terms.of(options, L, device)
        static = self.mode.static and terms.agree
        count, columns = (_bucket(A, self.limit), self._width()) if static else (A, int(self.lengths.max()))
        index: Tensor | slice = slice(0, count)
        positions: int | None = None
        if self.cache is not None:
            due = self._due()
            if len(due):
                A, count = len(due), _bucket(len(due), self.limit) if static else len(due)
                index = self.index[:count]
                index.fill_(len(self.rows) - 1)
                index[:A] = due.to(device)
                terms = terms if terms.agree else Terms.of([options[row] for row in due.tolist()], L, device)
            else:
                positions, columns = self._window_positions(terms), self.rows.sequence.shape[1] if static else columns
        padded = bool((self.lengths != columns).any())
        fresh = options[len(options) - self.fresh :]
        drawing = self._drawing(fresh, A - self.fresh) if any(row.rule.draws_gamma for row in fresh) else []
        step = partial(self._evaluate, index, columns, padded, positions, drawing, terms, static)
        if self.graphs is None or self.fresh or not static:
            step()
        else:
            kind = options[0].kind
            self.graphs.run((count, columns, padded, positions, isinstance(index, slice), kind), step)
        self.fresh = 0
        self.pending.push(self.flags, self.ids)

    def committed(self) -> list[Committed]:
        """What each row's steps have committed since this was asked the last time. Waits for the device."""
        A, L = len(self.ids), self.rows.gen_length
        rows = self.rows[:A]
        tokens, commit_step, nfe = rows.tokens.cpu(), rows.commit_step.cpu(), rows.nfe.tolist()
        told = torch.tensor([self.reported.get(row, 0) for row in self.ids.tolist()])
        new = (commit_step > told[:, None]) & ~rows.failed.cpu()[:, None]
        events = []
        for row in new.any(dim=1).nonzero()[:, 0].tolist():
            job, position = self.jobs[row], new[row].nonzero()[:, 0]
            self.reported[job.id] = nfe[row]
            begin = L - job.options.gen_length
            events.append(Committed(job.id, nfe[row], (position - begin).tolist(), tokens[row, position].tolist()))
        return events

    def ended(self) -> tuple[Tensor, Tensor]:
        """The rows that are done and those that failed, bool [A] on the CPU, as far as is known yet."""
        none = torch.zeros(len(self.ids), dtype=torch.bool)
        # steps of rows that differ run one after the other: none comes after the last row's end
        lag = 0 if self.stops or self.terms is None or not self.terms.agree else self.mode.lag
        popped = self.pending.pop(lag)
        if popped is None:
            return none, none
        flags, ids = popped
        if lag == 0:  # nothing has moved since
            self.host = flags
        done, failed = (torch.isin(self.ids, ids[flag.bool()]) for flag in flags[:2])
        if self.stops:
            done |= self._stopped()
        return done & ~failed, failed

    def finished(self, done: Tensor) -> list[FinishedRows]:
        """The trajectories of these rows, bool [A], which stay where they are."""
        now, places = perf_counter(), done.nonzero()[:, 0]
        leaving, ending = self.rows[places.to(self.model.device)], [self.jobs[place] for place in places.tolist()]
        groups: dict[tuple, list[int]] = {}
        for number, job in enumerate(ending):
            options = job.options
            key = (
                options.gen_length,
                options.temperature,
                options.block_length,
                options.cfg_scale,
                options.rule.draws_gamma,
            )
            groups.setdefault(key, []).append(number)
        parts = []
        for numbers in groups.values():
            rows = leaving if len(groups) == 1 else leaving[torch.tensor(numbers, device=self.model.device)]
            jobs = [ending[number] for number in numbers]
            seconds = [now - self.entered[job.id] for job in jobs]
            parts.append(FinishedRows([job.id for job in jobs], self._trajectory(jobs, rows), seconds))
        return parts

    def remove(self, leaving: Tensor) -> None:
        """Take these rows, bool [A], out; the last ones move into their places."""
        gone = [self.jobs[row] for row in leaving.nonzero()[:, 0].tolist()]
        for job in gone:
            self.entered.pop(job.id), self.reported.pop(job.id, None)
            if job.options.stop:
                self.stops[job.options.stop].forget(job.id)
        if self.terms is not None and not self.terms.agree:
            self.terms = None
        source, target = self.rows.remove(leaving)
        for values in (self.ids, self.lengths):
            values[target] = values[source]
        for hole, last in zip(target.tolist(), source.tolist(), strict=True):
            self.jobs[hole] = self.jobs[last]
        live = len(self.jobs) - len(gone)
        self.jobs, self.ids, self.lengths = self.jobs[:live], self.ids[:live], self.lengths[:live]
        if self.stops:
            kept = {job.options.stop for job in self.jobs}
            self.stops = {stop: watch for stop, watch in self.stops.items() if stop in kept}
        if self.host is not None:
            self.host[:, target] = self.host[:, source]
            self.host = self.host[:, :live]
        if self.cache is not None:
            self.cache.move(source.to(self.model.device), target.to(self.model.device))

    def clear_cache(self, rows: Tensor) -> None:
        """Forget what rows, bool [A], that are to be removed have kept: their numbers are not finite."""
        if self.cache is not None:
            self.cache.clear(rows.nonzero()[:, 0].to(self.model.device))

    def _evaluate(
        self,
        index: Tensor | slice,
        columns: int,
        padded: bool,
        positions: int | None,
        drawing: Sequence[tuple[ResolvedOptions, Tensor]],
        terms: Terms,
        static: bool,
    ) -> None:
        """The step itself. Where it is static, every tensor it reads or leaves behind is one of this object's."""
        model, shared, unconditional = self.model, not static, None
        rows = self.rows[index]
        if self.cache is None:
            hidden = exact_hidden(model, rows, columns, padded, shared)
            if terms.guided:
                unconditional = unconditional_hidden(model, rows, terms, columns, padded, shared)
        else:
            hidden = self._cached_hidden(self.cache, rows, index, columns, padded, positions)
        if drawing:
            set_thresholds(model, rows, drawing, terms.seed, hidden)
        commit(model, rows, hidden, unconditional, terms, static, self.eos_ids)
        if isinstance(index, Tensor):
            self.rows.put(index, rows)
        told = [self.rows.done, self.rows.failed]
        if self.cache is not None:
            told += [due_for_refresh(self.rows, self.options.cache_refresh), self.rows.start]
        self.flags.copy_(torch.stack([value.long() for value in told]))

    def _cached_hidden(
        self, cache: KeyValueCache, rows: Rows, index: Tensor | slice, columns: int, padded: bool, positions: int | None
    ) -> Hidden:
        before = columns - rows.gen_length  # columns in front of completion position 0
        sequence, on_the_left = rows.last(columns)
        padding = on_the_left if padded else None
        if positions is None or isinstance(index, Tensor):
            hidden = self.model(sequence, padding=padding, cache=whole_pass(cache, rows, index, columns))
            return Hidden(hidden, column=before)
        shift = int(self.model.config.logit_shift)
        window = window_pass(cache, rows, index, columns, self.options.cache, shift, positions)
        hidden = self.model(sequence.gather(1, window.columns), padding=padding, cache=window)
        return Hidden(hidden, column=before - window.columns[:, 0])

    def _drawing(self, fresh: Sequence[ResolvedOptions], start: int) -> list[tuple[ResolvedOptions, Tensor]]:
        """The new rows that draw a threshold, those of one rule and one length together, by their places in the step, from ``start`` on."""
        groups: dict[tuple, list[int]] = {}
        for place, row in enumerate(fresh, start):
            if row.rule.draws_gamma:
                groups.setdefault((row.rule.family, row.gen_length), []).append(place)
        return [
            (fresh[places[0] - start], torch.tensor(places, device=self.model.device)) for places in groups.values()
        ]

    def _width(self) -> int:
        """Columns of a static step: few different numbers."""
        L = self.rows.gen_length
        return min(self.rows.sequence.shape[1], L + -(-max(int(self.lengths.max()) - L, 0) // _WIDTHS) * _WIDTHS)

    def _due(self) -> Tensor:
        """Places of the rows whose next step is a refresh, new ones last."""
        if self.host is None:  # rows have entered since
            return due_for_refresh(self.rows[: len(self.ids)], self.options.cache_refresh).nonzero()[:, 0].cpu()
        return self.host[2].nonzero()[:, 0]

    def _window_positions(self, terms: Terms) -> int:
        """How many completion positions a cached step computes in each row: a multiple of the block, rounded up to a few values."""
        block, L = terms.window, self.rows.gen_length
        if self.options.cache == "dual":
            return block
        start = self.rows.start[: len(self.ids)] if self.host is None else self.host[3]
        left = L - int(start.min())
        return min(_bucket(left // block, L // block) * block, L) if self.mode.static and terms.agree else left

    def _stopped(self) -> Tensor:
        """bool [A]: rows whose text has reached a stop string."""
        jobs, tokens = self.jobs, self.rows.tokens[: len(self.ids)].tolist()
        reached = torch.zeros(len(jobs), dtype=torch.bool)
        for stop, watch in self.stops.items():
            places = [place for place, job in enumerate(jobs) if job.options.stop == stop]
            texts = [tokens[place][-jobs[place].options.gen_length :] for place in places]
            reached[places] = torch.tensor(watch.reached(texts, [jobs[place].id for place in places]), dtype=torch.bool)
        return reached

    def _trajectory(self, jobs: Sequence[Job], rows: Rows) -> Trajectory:
        options, device, columns = jobs[0].options, self.model.device, self.rows.sequence.shape[1]
        prompt, L = columns - options.gen_length, options.gen_length
        first = rows.gen_length - L
        tokens, commit_step = rows.tokens[:, first:].clone(), rows.commit_step[:, first:].contiguous()
        if self.eos_ids:
            tokens.masked_fill_(commit_step == 0, self.eos_ids[0])
        return Trajectory(
            prompt_ids=rows.sequence[:, :prompt].clone(),
            prompt_mask=torch.arange(prompt, device=device) >= rows.padding[:, None],
            tokens=tokens,
            commit_step=commit_step,
            logprob=rows.logprob[:, first:].contiguous(),
            entropy=rows.entropy[:, first:].contiguous(),
            gamma=rows.gamma,
            nfe=rows.nfe,
            length=(first_position(tokens, self.eos_ids) + 1).clamp(max=L),
            key=rows.row_id,
            group=rows.row_id,
            version=torch.tensor([job.version for job in jobs], device=device),
            mask_id=self.model.mask_id,
            temperature=options.temperature,
            block_length=options.block_length,
            cfg_scale=options.cfg_scale,
            actions={"gamma": Action(rows.gamma_bin, rows.gamma_logprob)} if options.rule.draws_gamma else {},
        )


def _bucket(count: int, limit: int) -> int:
    """The next power of two, but no more than ``limit``."""
    return min(1 << (count - 1).bit_length(), limit)
