"""``diffpo.generate``: prompts in, text, tokens, NFE and trajectory out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpo.decoding.cache import check_cache
from diffpo.decoding.decoder import Finished, Settings, denoise
from diffpo.decoding.prompts import Prompts, check_prompts, encode_prompts
from diffpo.decoding.rules import FixedSchedule, Rule
from diffpo.decoding.step import Sampling
from diffpo.decoding.stopping import StopText, check_stop
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


def generate(
    model: MaskedDiffusionLM,
    prompts: Prompts,
    gen_length: int,
    block_length: int | None = None,
    rule: Rule | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    cfg_scale: float = 0.0,
    batch_size: int | None = None,
    *,
    cache: str = "none",
    cache_refresh: int | None = None,
    stop: str | Sequence[str] | None = None,
    cuda_graph: bool | None = None,
    row_ids: Tensor | None = None,
) -> Generation:
    """Decode every prompt to ``gen_length`` tokens with a commit rule.

    prompts: strings, chats (lists of role/content messages, by the tokenizer's template; a last message of the assistant is continued)
        or token ids (a list of 1-d tensors, or one tensor [B, P] without padding), of any lengths. Special tokens spelled in a text are
        read as such; a BOS that stands there is not put before it again; the mask token is refused
    gen_length, block_length: tokens; block_length (default gen_length) must divide gen_length
    rule: what to commit in each step; default ``FixedSchedule(gen_length)``, one token a step
    temperature: 0 takes the most probable token, otherwise a draw from softmax(logits / temperature)
    seed: keys every draw together with the prompt's row id: the same result whatever the batch size
    cfg_scale: classifier-free guidance, logits = u + (cfg_scale + 1)(c - u) with u from a masked prompt; 0 = off. A guided
        step evaluates the network twice and counts as one NFE.
    batch_size: rows decoded together; default all. A finished row's place goes to a waiting prompt. Halved when memory runs out.
    cache: "none", every step exact; "prefix" or "dual", keys and values outside the active block are kept between refreshes, an
        approximation (``diffpo/decoding/cache.py``). A cached step counts as one NFE.
    cache_refresh: steps between exact passes within a block; default only at each block's start
    stop: one or several strings; the text ends before the first of them, and the row as soon as all before it is committed. They may hold
        special tokens ("<|eot_id|>"), and match across none that they do not hold
    cuda_graph: replay the steps from CUDA graphs; default where the model is on a GPU
    row_ids: int64 [B], what keys each prompt's draws beside the seed; default its index. With the ids of a longer list, some of its
        prompts get the same draws as in the whole list

    ValueError for arguments that do not fit, before any network evaluation. FloatingPointError when the model's logits are not finite.
    torch.OutOfMemoryError when a single row does not fit in memory.
    """
    job = _job(model, prompts, gen_length, block_length, rule, temperature, seed, cfg_scale, batch_size,
               cache, cache_refresh, stop, cuda_graph, row_ids)  # fmt: skip
    ids, parts, _ = zip(*denoise(model, *job), strict=True)
    trajectory = Trajectory.concatenate(parts)[torch.cat(ids).argsort().to(model.device)]
    return Generation(decode_text(model, trajectory, check_stop(model, stop)), trajectory)


def stream(
    model: MaskedDiffusionLM,
    prompts: Prompts,
    gen_length: int,
    block_length: int | None = None,
    rule: Rule | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    cfg_scale: float = 0.0,
    batch_size: int | None = None,
    *,
    cache: str = "none",
    cache_refresh: int | None = None,
    stop: str | Sequence[str] | None = None,
    cuda_graph: bool | None = None,
    row_ids: Tensor | None = None,
) -> Iterator[tuple[int, Generation]]:
    """As ``generate``, but yields (index of the prompt, its Generation of one row) as soon as a row is finished.

    The arguments are checked by the call itself, before the first item is asked for. When an error ends the decoding, every row that had
    finished has been yielded.
    """
    job = _job(model, prompts, gen_length, block_length, rule, temperature, seed, cfg_scale, batch_size,
               cache, cache_refresh, stop, cuda_graph, row_ids)  # fmt: skip
    return _rows(model, denoise(model, *job), check_stop(model, stop))


def _rows(model, parts: Iterator[Finished], stop: tuple[str, ...]) -> Iterator[tuple[int, Generation]]:
    for part in parts:
        for i, row in enumerate(part.prompts.tolist()):
            one = part.trajectory[i : i + 1]
            yield row, Generation(decode_text(model, one, stop), one, part.seconds[i])


def _job(
    model,
    prompts,
    gen_length,
    block_length,
    rule,
    temperature,
    seed,
    cfg_scale,
    batch_size,
    cache,
    cache_refresh,
    stop,
    cuda_graph,
    row_ids,
) -> tuple[Tensor, Tensor, Settings, int]:
    """What ``denoise`` takes beside the model; every check comes before the first network evaluation."""
    block_length = gen_length if block_length is None else block_length
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_lengths(gen_length, block_length)
    rule = FixedSchedule(gen_length) if rule is None else rule
    if not isinstance(rule, Rule):
        raise ValueError(f"rule must be a commit rule such as diffpo.EntropyBounded(0.1), got {rule!r}")
    check_sampling(temperature, cfg_scale)
    check_cache(cache, cache_refresh, cfg_scale)
    stop = check_stop(model, stop)
    on_gpu = model.device.type == "cuda"
    if cuda_graph and not on_gpu:
        raise ValueError(f"cuda_graph=True needs a model on a GPU, this one is on {model.device}")
    prompt_ids, prompt_mask = encode_prompts(model, prompts)
    check_prompts(model, prompt_ids, prompt_mask, gen_length)
    check_row_ids(row_ids, len(prompt_ids))
    rule = rule.resolve(model)
    rule.check(model, len(prompt_ids), gen_length, block_length)
    static = on_gpu and cuda_graph is not False
    settings = Settings(
        gen_length, block_length, rule, Sampling(temperature, cfg_scale, seed, None if row_ids is None else row_ids.cpu()), cache, cache_refresh, stop,
        # with a cache or stop strings the next step depends on this one's outcome, which is a few microseconds' wait
        static=static, graphs=cuda_graph if static else False, lag=int(static and cache == "none" and not stop),
    )  # fmt: skip
    return prompt_ids, prompt_mask, settings, batch_size or len(prompt_ids)


def check_lengths(gen_length: int, block_length: int) -> None:
    if gen_length < 1:
        raise ValueError(f"gen_length must be at least 1, got {gen_length}")
    if block_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length {gen_length} must be a multiple of block_length, got {block_length}")


def check_sampling(temperature: float, cfg_scale: float) -> None:
    for name, value in (("temperature", temperature), ("cfg_scale", cfg_scale)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


def check_row_ids(row_ids: Tensor | None, prompts: int) -> None:
    if row_ids is None:
        return
    if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64 or row_ids.shape != (prompts,):
        got = f"{row_ids.dtype} {list(row_ids.shape)}" if isinstance(row_ids, Tensor) else type(row_ids).__name__
        raise ValueError(f"row_ids must be an int64 tensor [{prompts}], one for each prompt, got {got}")


def decode_text(model: MaskedDiffusionLM, trajectory: Trajectory, stop: Sequence[str] = ()) -> list[str] | None:
    """Completions up to the first EOS or before the first stop string, special tokens removed; None without a tokenizer."""
    if model.tokenizer is None:
        return None
    rows = [row[:length] for row, length in zip(trajectory.tokens.tolist(), trajectory.length.tolist(), strict=True)]
    return [text for text, _ in StopText(model.tokenizer, stop).cut(rows)]
