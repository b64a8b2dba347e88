"""What may be said about decoding, each thing once: of a row, of an engine, and of a call of ``generate`` or ``stream``."""

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from numbers import Real
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from diffpo.decoding.cache import CACHES
from diffpo.decoding.prompts import Prompts, as_ids
from diffpo.decoding.rules import FixedSchedule, Rule
from diffpo.decoding.stopping import check_stop, checked_strings
from diffpo.models.transformer import MaskedDiffusionLM

P = ParamSpec("P")
Options = TypeVar("Options")
T = TypeVar("T")
Result = TypeVar("Result", covariant=True)
_INT64 = range(-(2**63), 2**63)


def names_nearest(kind: type[T]) -> type[T]:
    """A decorator: a keyword that the class does not take is named with the nearest one that it does."""
    make, known = kind.__init__, inspect.signature(kind).parameters

    @wraps(make)
    def made(self: T, *positional: Any, **named: Any) -> None:
        if wrong := named.keys() - known.keys():
            raise _unexpected(kind.__name__, min(wrong), known)
        make(self, *positional, **named)

    kind.__init__ = made  # type: ignore[method-assign,assignment]
    return kind


def _unexpected(function: str, name: str, known: Iterable[str]) -> TypeError:
    (near,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}; the nearest is {near!r}")


@names_nearest
@dataclass(frozen=True)
class DecodingOptions:
    """
    gen_length, block_length: tokens; block_length (default gen_length) must divide gen_length
    rule: what to commit in each step; default ``FixedSchedule(gen_length)``, one token a step
    temperature: 0 takes the most probable token, otherwise a draw from softmax(logits / temperature)
    seed: keys every draw together with the row's key: the same result whatever the batch size
    cfg_scale: classifier-free guidance, logits = u + (cfg_scale + 1)(c - u) with u from a masked prompt; 0 = off. A guided
        step evaluates the network twice and counts as one NFE.
    stop: one or several strings; the text ends before the first of them, and the row as soon as all before it is committed. They may hold
        special tokens ("<|eot_id|>"), and match across none that they do not hold
    """

    gen_length: int
    block_length: int | None = None
    rule: Rule | None = None
    temperature: float = 0.0
    seed: int = 0
    cfg_scale: float = 0.0
    stop: str | Sequence[str] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_lengths(self.gen_length, self.gen_length if self.block_length is None else self.block_length)
        if self.rule is not None and not isinstance(self.rule, Rule):
            raise ValueError(f"rule must be a commit rule such as diffpo.EntropyBounded(0.1), got {self.rule!r}")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and math.isfinite(value) and not value < 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        check_int64("seed", self.seed)
        # numbers of other types, such as numpy's, are kept as Python's: rows are compared by them
        vars(self).update(
            gen_length=operator.index(self.gen_length),
            block_length=None if self.block_length is None else operator.index(self.block_length),
            temperature=float(self.temperature),
            seed=operator.index(self.seed),
            cfg_scale=float(self.cfg_scale),
            stop=() if self.stop is None else checked_strings(self.stop),
        )

    def resolved(self, model: MaskedDiffusionLM, prompts: int = 1) -> "ResolvedOptions":
        """The same with everything filled in that the lengths and the model decide. ValueError if the model cannot decode like that."""
        block_length = self.gen_length if self.block_length is None else self.block_length
        rule = (FixedSchedule(self.gen_length) if self.rule is None else self.rule).resolve(model)
        rule.check(model, prompts, self.gen_length, block_length)
        return ResolvedOptions(
            self.gen_length,
            block_length,
            rule,
            self.temperature,
            self.seed,
            self.cfg_scale,
            stop=check_stop(model, self.stop) if self.stop else (),
        )


@dataclass(frozen=True)
class ResolvedOptions(DecodingOptions):
    """Options in which nothing is left to the lengths or the model."""

    block_length: int
    rule: Rule
    stop: tuple[str, ...] = field(default=(), kw_only=True)

    @cached_property
    def kind(self) -> tuple:
        """Rows of one kind are decoded together as if there were no others: all that a step asks a row's options."""
        rule = self.rule
        return (
            rule.family,
            rule.number,
            self.temperature,
            self.cfg_scale,
            self.seed,
            self.block_length,
            self.gen_length,
        )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """
    cache: "none", every step exact; "prefix" or "dual", keys and values outside the active block are kept between refreshes, an
        approximation (``diffpo/decoding/cache.py``). A cached step counts as one NFE.
    cache_refresh: steps between exact passes within a block; default only at each block's start
    cuda_graph: replay the steps from CUDA graphs; default where the model is on a GPU
    """

    cache: str = "none"
    cache_refresh: int | None = None
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        cache, refresh = self.cache, self.cache_refresh
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
        if refresh is not None and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1):
            raise ValueError(
                f"cache_refresh must be an int of at least 1 (steps) or None (each block's start), got {refresh!r}"
            )
        if refresh is not None and cache == "none":
            raise ValueError('cache_refresh needs cache="prefix" or "dual": nothing is kept with cache="none"')


@dataclass(frozen=True, eq=False)
class CallOptions(DecodingOptions, EngineOptions):
    """
    batch_size: rows decoded together; default all. A finished row's place goes to a waiting prompt. Halved when memory runs out.
    row_ids: int64 [B], what keys each prompt's draws beside the seed; default its index. With the ids of a longer list, some of its
        prompts get the same draws as in the whole list
    """

    batch_size: int | None = None
    row_ids: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        DecodingOptions.__post_init__(self)  # those of the engine it checks itself
        if self.batch_size is not None:
            check_int64("batch_size", self.batch_size)
            if self.batch_size < 1:
                raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
            vars(self).update(batch_size=operator.index(self.batch_size))

    def keys(self, prompts: int) -> list[int]:
        """The ``row_ids`` that were given. ValueError where they do not fit."""
        row_ids = self.row_ids
        if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64 or row_ids.shape != (prompts,):
            got = f"{row_ids.dtype} {list(row_ids.shape)}" if isinstance(row_ids, Tensor) else type(row_ids).__name__
            raise ValueError(f"row_ids must be an int64 tensor [{prompts}], one for each prompt, got {got}")
        return row_ids.tolist()


@names_nearest
@dataclass(frozen=True, eq=False)
class Request:
    """One row to decode. ids: the prompt's tokens, a 1-d integer tensor or a list; key: what keys its draws beside the seed, int64,
    default the number that the engine gives the request."""

    ids: Tensor | Sequence[int]
    options: DecodingOptions
    key: int | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "ids", as_ids(self.ids).clone())  # what the caller does with its own later
        except ValueError as error:
            raise ValueError(f"ids {error}") from None
        if not isinstance(self.options, DecodingOptions):
            raise ValueError(f"options must be DecodingOptions, got {type(self.options).__name__}")
        if self.key is not None:
            check_int64("key", self.key)


def check_model(model: object) -> None:
    """ValueError for what is no model, such as the name of one."""
    if not hasattr(model, "mask_id"):  # a wrapper of peft or torch.compile has it too
        raise ValueError(f"model must be a model, as diffpo.load(name) gives it, got {type(model).__name__}")


def check_lengths(gen_length: int, block_length: int) -> None:
    """ValueError unless both are whole numbers of tokens and blocks fill the completion."""
    for name, value in (("gen_length", gen_length), ("block_length", block_length)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be an int (tokens), got {value!r}")
    if gen_length < 1:
        raise ValueError(f"gen_length must be at least 1, got {gen_length}")
    if block_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length {gen_length} must be a multiple of block_length, got {block_length}")


def check_int64(name: str, value: int) -> None:
    """ValueError for what is no whole number of 64 bits."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) not in _INT64:
        raise ValueError(f"{name} must be an int of 64 bits, got {value!r}")


class Call(Protocol[P, Result]):
    """A function of prompts and of what makes options."""

    def __call__(self, model: MaskedDiffusionLM, prompts: Prompts, *args: P.args, **kwargs: P.kwargs) -> Result: ...


def takes(
    options: Callable[P, Options],
) -> Callable[[Callable[[MaskedDiffusionLM, Prompts, Options], Result]], Call[P, Result]]:
    """A decorator: the function's last parameter becomes the parameters that make such options, in its signature and in its help."""

    make: Callable[..., Options] = options

    def decorate(
        function: Callable[[MaskedDiffusionLM, Prompts, Options], Result],
    ) -> Call[P, Result]:
        name, own = function.__name__, inspect.signature(function)
        parameters = inspect.signature(options).parameters
        signature = own.replace(parameters=[*list(own.parameters.values())[:-1], *parameters.values()])

        @wraps(function)
        def called(*positional: Any, **named: Any) -> Result:
            if wrong := named.keys() - signature.parameters.keys():
                raise _unexpected(name, min(wrong), signature.parameters)
            try:
                given = signature.bind(*positional, **named).arguments
            except TypeError as error:
                raise TypeError(f"{name}(): {error}") from None
            model, subject = (given.pop(own_name) for own_name in list(own.parameters)[:-1])
            return function(model, subject, make(**given))

        called.__signature__ = signature  # type: ignore[attr-defined]  # inspect and help look for it
        called.__doc__ = (inspect.getdoc(function) or "").replace("{options}", _meanings(options))
        return called

    return decorate


def _meanings(options: Callable[..., object]) -> str:
    """The lines that explain the fields of options and of those they extend."""
    assert isinstance(options, type)
    return "\n".join(inspect.cleandoc(kind.__doc__ or "") for kind in (*options.__bases__, options))
