"""Size and conventions of a masked diffusion LM, checked field by field when one is made."""

import difflib
import math
import reprlib
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

_TOO_LARGE = 2**30  # no size or id of a model reaches it; two of them multiplied, in bytes, still fit into 64 bits
_UNKNOWN_TOLD = 5  # finding the nearest names takes time, and a file may hold any number of keys

RENAMED = {"threshold_proxy": "threshold_order"}  # of fields that earlier versions wrote: old name -> name
Order = Literal["entropy", "confidence", "margin"]
Reads = Literal["completion", "both", "attention", "entropies"]

# From a value as it was given to the value that is kept; ValueError, without the field's name, for one that does not fit.
Check = Callable[[Any], Any]


def _integer(least: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError("Input should be a valid integer")
        if value < least or not value < _TOO_LARGE:
            raise ValueError(f"Input should be at least {least} and below 2^30")
        return int(value)

    return check


def _ids(value: Any) -> int | tuple[int, ...]:
    if not isinstance(value, list | tuple):
        return _integer(0)(value)
    if not value:
        raise ValueError("Input should be an id or a list of at least one")
    return tuple(map(_integer(0), value))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError("Input should be a valid number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("Input should be a finite number") from None


def _positive(value: Any) -> float:
    number = _number(value)
    if not 0 < number < math.inf:
        raise ValueError("Input should be a finite number above 0")
    return number


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("Input should be true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("Input should be a valid string")
    return value


def _one_of(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"Input should be {', '.join(allowed[:-1])} or {allowed[-1]}")
        return value

    return check


def _bins(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, list | tuple):
        raise ValueError("Input should be a list of numbers (nats)")
    bins = tuple(map(_number, values))
    if not all(gamma >= 0 for gamma in bins):  # NaN is not
        raise ValueError("Input should be numbers of at least 0 (nats)")
    return bins or None


def _checked(check: Check, default: Any = MISSING) -> Any:
    """A dataclass field. A default of None also allows None."""
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, init=False)
class ModelConfig:
    """Size and conventions of a masked diffusion LM; field names as in transformers.

    ``logit_shift``: the output at position i-1 predicts position i (Dream), instead of the output at i (LLaDA).
    ``threshold_gammas``: the bins (nats) of the learned entropy-bounded threshold, or None for a model without one;
    ``threshold_order``: the order of commitment it was trained with; ``threshold_proxy`` was its name;
    ``threshold_reads``: what it is read from, see ``ThresholdPolicy``.
    ``head_dim``: of each query, key and value; hidden_size / num_attention_heads unless given, which it need not equal.
    ``eos_token_id``: an id or several; ``MaskedDiffusionLM.eos_ids`` are all that end a completion.
    ``model_type``: the checkpoint format it is saved in: "diffpo", "llada" or "Dream".

    Raises ValueError, naming every field that is unknown, missing, of another type or out of range. Nothing is converted:
    4096.0, "4096" and True are no integers.
    """

    model_type: str = _checked(_text, "diffpo")
    vocab_size: int = _checked(_integer(1))
    hidden_size: int = _checked(_integer(1))
    intermediate_size: int = _checked(_integer(1))
    num_hidden_layers: int = _checked(_integer(1))
    num_attention_heads: int = _checked(_integer(1))
    num_key_value_heads: int | None = _checked(_integer(1), None)
    head_dim: int = _checked(_integer(1), None)
    max_position_embeddings: int = _checked(_integer(1), 4096)
    rms_norm_eps: float = _checked(_positive, 1e-5)
    rope_theta: float = _checked(_positive, 10000.0)
    attention_bias: bool = _checked(_flag, False)
    tie_word_embeddings: bool = _checked(_flag, False)
    logit_shift: bool = _checked(_flag, False)
    mask_token_id: int = _checked(_integer(0))
    eos_token_id: int | tuple[int, ...] | None = _checked(_ids, None)
    pad_token_id: int | None = _checked(_integer(0), None)
    threshold_gammas: tuple[float, ...] | None = _checked(_bins, None)
    threshold_order: Order = _checked(_one_of("entropy", "confidence", "margin"), "entropy")  # noqa: RUF009
    threshold_reads: Reads = _checked(_one_of(*get_args(Reads)), "completion")  # noqa: RUF009  # as before there was a choice

    def __init__(self, /, **values: Any):
        for old, name in RENAMED.items():
            if old in values and name in values:
                raise ValueError(f"{old} is now called {name}: give one of them")
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        known = {one.name: one for one in fields(self)}
        unknown = [name for name in values if name not in known]
        faults = [_unknown(name, known) for name in unknown[:_UNKNOWN_TOLD]]
        for name, one in known.items():
            if name not in values and one.default is MISSING:
                faults.append(f"{name}: Field required")
                continue
            value = values.get(name, one.default)
            try:
                kept = None if value is None and one.default is None else one.metadata["check"](value)
            except ValueError as error:
                faults.append(f"{name}: {error}, got {_shown(value)}")
            else:
                object.__setattr__(self, name, kept)
        if faults:
            raise ValueError("; ".join(faults))
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self._usual_head_dim())
        self._check_consistent()

    def _usual_head_dim(self) -> int:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must divide by num_attention_heads {self.num_attention_heads}, "
                "or head_dim be given"
            )
        return self.hidden_size // self.num_attention_heads

    def _check_consistent(self) -> None:
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim (hidden_size / num_attention_heads, unless given) must be even for RoPE, got {self.head_dim}"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must divide by num_key_value_heads {self.num_key_value_heads}"
            )
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            for token_id in _several(getattr(self, name)):
                if token_id >= self.vocab_size:
                    raise ValueError(f"{name} {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        if self.mask_token_id in _several(self.eos_token_id):
            raise ValueError(f"eos_token_id must not be the mask token, {self.mask_token_id}")

    @property
    def threshold_proxy(self) -> Order:
        return self.threshold_order

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    def model_dump(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return asdict(self)

    def model_copy(self, *, update: dict[str, Any]) -> "ModelConfig":
        """The config with other values in some fields, checked anew."""
        return replace(self, **update)


FIELDS = tuple(one.name for one in fields(ModelConfig))
REQUIRED = tuple(one.name for one in fields(ModelConfig) if one.default is MISSING)


def _several(ids: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return ids if isinstance(ids, tuple) else () if ids is None else (ids,)


def _unknown(name: str, known: dict[str, Any]) -> str:
    nearest = difflib.get_close_matches(name[:64], known, n=3, cutoff=0.0)
    return f"unknown field {_shown(name)}; nearest: {', '.join(nearest)}"


def _shown(value: Any) -> str:
    """The value in a few characters, whatever its size or depth."""
    if isinstance(value, Integral) and abs(int(value)) >= 2**64:
        return f"an integer of {int(value).bit_length()} bits"
    return reprlib.repr(value)
