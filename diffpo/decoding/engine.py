"""An open queue: requests come and go while others are decoded. ``generate`` and ``stream`` sit on it, as a server does."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffpo.decoding.decoder import Committed, Decoder, FinishedRows, Job, StepMode
from diffpo.decoding.options import EngineOptions, Request, ResolvedOptions, check_int64, check_model, names_nearest
from diffpo.decoding.prompts import IdsError
from diffpo.decoding.step import RuleError
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.trajectory import Trajectory


class Finished(NamedTuple):
    """A row is done. trajectory: of one row, cut to its own prompt and completion; seconds: wall-clock from entering the batch to now."""

    id: int
    trajectory: Trajectory
    seconds: float


class Failed(NamedTuple):
    """A row has left without a result: FloatingPointError, its logits were not finite; torch.OutOfMemoryError, it fits not even alone; or what its rule raised.
    key: of its draws."""

    id: int
    key: int
    error: Exception


class Restarted(NamedTuple):
    """Memory ran out, or another row's rule raised: the row waits again, and what it had committed is void. It draws the same anew."""

    id: int


Event = Committed | Finished | Failed | Restarted


class Outcome(NamedTuple):
    """What a step did: the rows that ended, those of one kind together, and the rest as events."""

    finished: list[FinishedRows]
    events: list[Event]


@names_nearest
class Engine:
    """Decodes requests, ``rows`` at a time, first come, first served.

    rows: decoded together at most; halved when memory runs out. prompt_length, gen_length: a row fits if its completion is no longer than
    ``gen_length`` tokens and both together no longer than both of these. version: of the weights. The other keywords: ``EngineOptions``.

    Every option of a request is its row's own: rule and parameters, temperature, guidance, lengths, seed, stop strings. A row's result
    depends on its request and the weights alone, up to rounding. Where the options of all rows agree, a step costs what it costs a closed
    list; where they do not, it is still one pass of the network (and one of the guided rows), but CUDA graphs do not hold it.

    Not for several threads. ValueError for what cannot be, here and in ``submit``, before any network evaluation.
    """

    def __init__(
        self,
        model: MaskedDiffusionLM,
        rows: int,
        prompt_length: int,
        gen_length: int,
        *,
        version: int = 0,
        cache: str = "none",
        cache_refresh: int | None = None,
        cuda_graph: bool | None = None,
    ):
        check_model(model)
        check_int64("version", version)
        self.options = EngineOptions(cache=cache, cache_refresh=cache_refresh, cuda_graph=cuda_graph)
        self.mode = StepMode.of(model, self.options)
        for name, value, least in (
            ("rows", rows, 1),
            ("prompt_length", prompt_length, 0),
            ("gen_length", gen_length, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        context, columns = model.config.max_position_embeddings, prompt_length + gen_length
        if columns > context:
            raise ValueError(
                f"prompt_length {prompt_length} and gen_length {gen_length} exceed the model's context of {context}"
            )
        self.model, self.rows, self.columns, self.gen_length, self.version = model, rows, columns, gen_length, version
        self.open: dict[int, Job] = {}  # all that have no result yet
        self.waiting: dict[int, None] = {}  # those in no row, in order
        self.decoder: Decoder | None = None
        self._ids = itertools.count()
        self._restarted: list[int] = []

    def __len__(self) -> int:
        """How many requests have no result yet."""
        return len(self.open)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id: 0, 1, ... ValueError if this engine cannot decode it."""
        if not isinstance(request, Request):
            raise ValueError(f"request must be a Request(ids, options), got {type(request).__name__}")
        options, ids = request.options, torch.as_tensor(request.ids)
        if not isinstance(options, ResolvedOptions):
            options = options.resolved(self.model)
        _check_rule(options)
        if options.cfg_scale and self.options.cache != "none":
            raise ValueError(
                f'cfg_scale {options.cfg_scale} needs cache="none": guidance evaluates a second sequence, which has no cache'
            )
        prompt = ids.tolist()
        vocab_size, mask_id, length = self.model.config.vocab_size, self.model.mask_id, len(prompt)
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise IdsError(f"it holds a token id outside the vocabulary of {vocab_size} tokens")
        if mask_id in prompt:
            raise IdsError(f"it contains the mask token (id {mask_id}), which only completions may hold")
        if options.gen_length > self.gen_length or length + options.gen_length > self.columns:
            raise ValueError(
                f"ids and gen_length: a prompt of {length} tokens and a completion of {options.gen_length} do not fit, the engine takes "
                f"completions of {self.gen_length} and {self.columns} tokens in all"
            )
        number = next(self._ids)
        key = number if request.key is None else request.key
        self.open[number] = Job(number, ids, length + options.gen_length, key, options)
        self.waiting[number] = None
        return number

    def cancel(self, id: int) -> bool:
        """Drop a request, waiting or in flight; there are no more events about it. False if it has ended already."""
        if self.open.pop(id, None) is None:
            return False
        if id in self.waiting:
            del self.waiting[id]
        elif self.decoder is not None:
            self.decoder.remove(self.decoder.ids == id)
        self._restarted = [row for row in self._restarted if row != id]
        return True

    def step(self) -> list[Event]:
        """One denoising step of all rows in flight, after waiting requests have taken free rows. What each row committed comes before its end.

        An error in a rule's own code is the failure of its rows; the others in flight begin anew. An error of the model itself is raised and
        leaves the requests open; those in flight begin anew.
        """
        finished, events = self.advance(report=True)
        return events + [
            Finished(id, _cut(part.trajectory[row : row + 1]), part.seconds[row])
            for part in finished
            for row, id in enumerate(part.ids)
        ]

    @torch.no_grad()
    def advance(self, report: bool = False) -> Outcome:
        """As ``step``, for many rows at once: rows that ended together come together. report: also tell what was committed."""
        memory_error = None
        try:
            outcome = self._advance(report)
        except torch.OutOfMemoryError as error:
            memory_error = str(error)  # not the error itself, which would keep the tensors of its frames alive
        except RuleError as error:
            outcome = Outcome([], self._without_rule(error))
        except BaseException:
            self._restart()
            raise
        if memory_error is not None:
            outcome = Outcome([], self._with_less_memory(memory_error))
        events = [Restarted(row) for row in self._restarted] + outcome.events
        self._restarted = []
        return Outcome(outcome.finished, events)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy other weights, named as in ``model.state_dict()``, into the model, in place.

        Rows in flight go on, now with the new weights, and keep the version that began them in their trajectory; a cache holds their older
        keys and values until the next refresh. Requests that still wait begin with the new version. For rows of one version alone, finish
        or cancel first: ``len(engine)`` says how many are open. ValueError before anything is written if the names or shapes differ, or
        for what are no weights.
        """
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights must be named as in model.state_dict(), got {type(weights).__name__}")
        check_int64("version", version)
        own = self.model.state_dict()
        given = {own[name].data_ptr() for name in own.keys() & weights.keys()}
        missing = [name for name in own if name not in weights and own[name].data_ptr() not in given]  # unless tied
        wrong = missing + [name for name in weights if name not in own]
        if wrong:
            raise ValueError(f"weights: missing or not of this model: {', '.join(sorted(wrong)[:8])}")
        for name, value in weights.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"weights: {name} must be a tensor of floats, got {got}")
            if value.shape != own[name].shape:
                raise ValueError(f"weights: {name} must be {list(own[name].shape)}, got {list(value.shape)}")
        for name, value in weights.items():
            own[name].copy_(value)
        self.version = version

    def _advance(self, report: bool) -> Outcome:
        decoder = self.decoder = self.decoder or Decoder(
            self.model, self.rows, self.columns, self.gen_length, self.options, self.mode
        )
        entering = list(itertools.islice(self.waiting, self.rows - len(decoder.jobs)))
        if entering:
            jobs = [self.open[row] for row in entering]
            for row in entering:  # before memory can run out
                del self.waiting[row]
            decoder.admit(jobs if self.version == 0 else [replace(job, version=self.version) for job in jobs])
        if len(decoder.ids) == 0:
            return Outcome([], [])
        decoder.step()
        events: list[Event] = list(decoder.committed()) if report else []
        done, failed = decoder.ended()
        finished = decoder.finished(done) if done.any() else []
        if failed.any():
            decoder.clear_cache(failed)
            events += [self._not_finite(row) for row in decoder.ids[failed].tolist()]
        leaving = decoder.ids[done | failed].tolist()
        if leaving:
            decoder.remove(done | failed)
        for row in leaving:
            del self.open[row]
        return Outcome(finished, events)

    def _not_finite(self, row: int) -> Failed:
        job = self.open[row]
        return Failed(row, job.key, FloatingPointError(not_finite([job.key], job.options.cfg_scale)))

    def _restart(self) -> list[int]:
        """Everything in flight waits again, in front; returns what that was."""
        in_flight = sorted(self.open.keys() - self.waiting.keys())
        self.waiting = dict.fromkeys(sorted(self.open))
        self._restarted += in_flight
        self.decoder = None
        return in_flight

    def _without_rule(self, error: RuleError) -> list[Event]:
        """The rows in flight of a rule whose code raises have failed; the others begin anew."""
        cause = error.__cause__
        assert isinstance(cause, Exception)
        jobs = [self.open[row] for row in self._restart()]
        failed = [job for job in jobs if job.options.rule.family == error.family]
        for job in failed:
            self.cancel(job.id)
        return [Failed(job.id, job.key, cause) for job in failed]

    def _with_less_memory(self, error: str) -> list[Event]:
        """Half as many rows; a single one that does not fit has failed."""
        in_flight = self._restart()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.rows > 1:
            rows, used = self.rows, len(in_flight) or self.rows
            while rows // 2 >= max(used, 2):  # that would change nothing
                rows //= 2
            self.rows = max(rows // 2, 1)
            warnings.warn(
                f"out of memory with {rows} rows in flight: going on with {self.rows} (batch_size)",
                RuntimeWarning,
                stacklevel=4,
            )
            return []
        job = self.open[next(iter(self.waiting))]
        options = job.options
        self.cancel(job.id)
        kept = (
            "" if self.options.cache == "none" else f', or decode with cache="none" instead of "{self.options.cache}"'
        )
        reason = (
            f"a single row does not fit in memory: lower gen_length ({options.gen_length}) or block_length ({options.block_length}), "
            f"give shorter prompts, load the model in bfloat16{kept}. {error}"
        )
        return [Failed(job.id, job.key, torch.OutOfMemoryError(reason))]


def _check_rule(options: ResolvedOptions) -> None:
    """ValueError for a rule whose row no batch could hold."""
    rule = options.rule
    try:
        hash(options.kind), float(rule.gamma), math.fabs(rule.number)  # which takes no text
    except Exception as error:
        raise ValueError(f"rule: {type(rule).__name__} has no gamma, number or family for a row: {error}") from error
    for name in ("stops_at_eos", "draws_gamma"):
        if not isinstance(getattr(rule, name), bool):
            raise ValueError(
                f"rule: {name} of {type(rule).__name__} must be True or False, got {getattr(rule, name)!r}"
            )


def not_finite(keys: Sequence[int], cfg_scale: float) -> str:
    """What is said of prompts with these keys whose logits are not finite."""
    cause = f", guided with cfg_scale {cfg_scale:g}," if cfg_scale else ""
    return f"the model's logits{cause} are NaN or infinite for {len(keys)} prompts, first: {sorted(keys)[:8]}"


def _cut(one: Trajectory) -> Trajectory:
    """A trajectory of one row without the padding of its prompt."""
    start = one.prompt_ids.shape[1] - int(one.prompt_mask.sum())
    return replace(one, prompt_ids=one.prompt_ids[:, start:], prompt_mask=one.prompt_mask[:, start:])
