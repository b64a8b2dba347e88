"""The types of the values in a config.json, checked as they stand there: nothing is converted, nothing is astronomically large."""

import math
from collections.abc import Mapping

from diffpo.models.folder_files import shown

_LARGEST = 2**30  # two of these multiplied, in bytes, still fit into 64 bits
_INTEGERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "mask_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "rope_theta")
_SWITCHES = ("attention_bias", "tie_word_embeddings", "logit_shift")


def refuse_wrong_types(fields: Mapping, keys: Mapping[str, str], where) -> None:
    """ValueError, naming the key, for a value of ``fields`` that is not of its ModelConfig field's type.

    keys: ModelConfig field -> key of ``fields``. A missing key or null is left to the format.
    """
    for name, key in keys.items():
        value = fields.get(key)
        if value is None:
            continue
        if name in _INTEGERS:
            several = value if name == "eos_token_id" and isinstance(value, list) else [value]
            for one in several:
                require_integer(one, key, where)
        elif name in _NUMBERS and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value)
        ):
            raise ValueError(f"{where}: {key}: Input should be a valid number, got {shown(value)}")
        elif name == "threshold_gammas" and not (isinstance(value, list) and all(map(_number, value))):
            raise ValueError(f"{where}: {key}: Input should be a list of numbers, got {shown(value)}")
        elif name in _SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{where}: {key}: Input should be true or false, got {shown(value)}")


def require_integer(value, key: str, where) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key}: Input should be a valid integer, got {shown(value)}")
    if abs(value) >= _LARGEST:
        raise ValueError(f"{where}: {key}: Input should be less than {_LARGEST}, got {shown(value)}")


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
