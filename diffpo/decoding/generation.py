"""``diffpo.generate``: prompts in, text, tokens, NFE and trajectory out."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffpo.decoding.decoder import FinishedRows
from diffpo.decoding.engine import Engine, Failed, not_finite
from diffpo.decoding.options import CallOptions, Request, check_model, takes
from diffpo.decoding.options import check_lengths as check_lengths
from diffpo.decoding.prompts import IdsError, PromptError, Prompts, encode_prompts
from diffpo.decoding.stopping import StopText
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.trajectory import Trajectory


@dataclass(frozen=True)
class Generation:
    """text: the completions up to the first of the model's ``eos_ids`` or stop string (None without a tokenizer); tokens: int64 [B, L]; nfe: int64 [B].

    seconds: of a streamed row, wall-clock from entering the batch to leaving it, in which other rows were decoded too; else None.
    """

    text: list[str] | None
    trajectory: Trajectory
    seconds: float | None = None

    @property
    def tokens(self) -> Tensor:
        return self.trajectory.tokens

    @property
    def nfe(self) -> Tensor:
        return self.trajectory.nfe


@takes(CallOptions)
def generate(model: MaskedDiffusionLM, prompts: Prompts, options: CallOptions) -> Generation:
    """Decode every prompt to ``gen_length`` tokens with a commit rule.

    prompts: strings, chats (lists of role/content messages, by the tokenizer's template; a last message of the assistant is continued)
        or token ids (a list of 1-d tensors, or one tensor [B, P] without padding), of any lengths. Special tokens spelled in a text are
        read as such; a BOS that stands there is not put before it again; the mask token is refused
    {options}

    ValueError for arguments that do not fit, before any network evaluation. FloatingPointError when the model's logits are not finite.
    torch.OutOfMemoryError when a single row does not fit in memory.
    """
    parts = list(_decoded(*_queued(model, prompts, options)))
    order = torch.tensor([index for part in parts for index in part.ids]).argsort().to(model.device)
    trajectory = Trajectory.concatenate([part.trajectory for part in parts])[order]
    texts = None if model.tokenizer is None else decode_text(model, trajectory, options.stop)
    return Generation(texts, trajectory)


@takes(CallOptions)
def stream(model: MaskedDiffusionLM, prompts: Prompts, options: CallOptions) -> Iterator[tuple[int, Generation]]:
    """As ``generate``, but yields (index of the prompt, its Generation of one row) as soon as a row is finished.

    The arguments, those of ``generate``, are checked by the call itself, before the first item is asked for. When an error ends the
    decoding, every row that had finished has been yielded.
    """
    return Stream(model, _decoded(*_queued(model, prompts, options)), options.stop)


class Stream(Iterator[tuple[int, Generation]]):
    """What ``stream`` returns. ``ready``: how many rows have ended already, and come without another step of the network."""

    def __init__(self, model: MaskedDiffusionLM, parts: Iterator[FinishedRows], stop: Sequence[str] | None):
        self._model, self._parts, self._stop = model, parts, stop
        self._ended: deque[tuple[int, Trajectory, float]] = deque()

    @property
    def ready(self) -> int:
        return len(self._ended)

    def __next__(self) -> tuple[int, Generation]:
        while not self._ended:
            ids, trajectory, seconds = next(self._parts)
            rows = (trajectory[place : place + 1] for place in range(len(ids)))
            self._ended = deque(zip(ids, rows, seconds, strict=True))
        index, row, spent = self._ended[0]
        text = None if self._model.tokenizer is None else decode_text(self._model, row, self._stop)
        self._ended.popleft()  # not before its text is there: an interrupt must not lose it
        return index, Generation(text, row, spent)


def _queued(model: MaskedDiffusionLM, prompts: Prompts, options: CallOptions) -> tuple[Engine, list[int], float]:
    """An engine that holds the prompts, the longest first, so that rows in flight have similar lengths; their order; and their guidance."""
    check_model(model)
    ids = encode_prompts(model, prompts)
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    longest, context = len(ids[order[0]]), model.config.max_position_embeddings
    if longest + options.gen_length > context:
        raise PromptError(
            order[0],
            f"the longest prompt ({longest} tokens) and gen_length {options.gen_length} exceed the model's context of {context}",
        )
    keys = range(len(ids)) if options.row_ids is None else options.keys(len(ids))
    of_row = options.resolved(model, len(ids))
    engine = Engine(
        model, min(options.batch_size or len(ids), len(ids)), longest, options.gen_length,
        cache=options.cache, cache_refresh=options.cache_refresh, cuda_graph=options.cuda_graph,
    )  # fmt: skip
    for index in order:
        rule = of_row.rule.for_prompt(index)
        own = of_row if rule is of_row.rule else replace(of_row, rule=rule)
        try:
            engine.submit(Request(ids[index], own, keys[index]))
        except IdsError as error:
            raise PromptError(index, error.reason) from None
    return engine, order, options.cfg_scale


def _decoded(engine: Engine, order: list[int], cfg_scale: float) -> Iterator[FinishedRows]:
    """Rows as they finish, by the prompts' indices. FloatingPointError or torch.OutOfMemoryError when one fails."""
    while engine.open:
        finished, events = engine.advance()
        for part in finished:
            yield part._replace(ids=[order[number] for number in part.ids])
        failed = [event for event in events if isinstance(event, Failed)]
        if len(failed) == 1 or any(not isinstance(event.error, FloatingPointError) for event in failed):
            raise failed[0].error  # those of one rule, or the one that is out of memory, have one error
        if failed:
            raise FloatingPointError(not_finite([event.key for event in failed], cfg_scale))


def decode_text(model: MaskedDiffusionLM, trajectory: Trajectory, stop: Sequence[str] | None = None) -> list[str]:
    """Completions up to the first EOS or before the first stop string, special tokens removed. The model has a tokenizer."""
    rows = [row[:length] for row, length in zip(trajectory.tokens.tolist(), trajectory.length.tolist(), strict=True)]
    assert model.tokenizer is not None
    if not stop:
        return model.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [text for text, _ in StopText(model.tokenizer, stop).cut(rows)]
