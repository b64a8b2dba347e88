"""What the names of stored tensors say: buffers that a model computes anew, and what went wrong when names do not fit."""

import re
from collections.abc import Collection, Iterable, Sequence

# tables that older versions of transformers saved: functions of the config alone
_TABLES = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb|rotary|rope)\.(original_)?(inv_freq|cos_cached|sin_cached)$"
    r"|(^|\.)(position_ids|causal_attention_bias|masked_bias)$"
)
_MASK = re.compile(r"(^|\.)(attn|self_attn|attention)\.bias$")  # GPT-2's triangle, where it has no other meaning

# what training tools put around modules
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_LORA = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|lora_magnitude_vector)\.")


def is_derived(name: str, shape: Sequence[int] | None = None) -> bool:
    """Whether a stored tensor is a buffer that has no say in the numbers here: rotary tables, position ids, attention masks.

    Without a shape: whether the name can be that of one.
    """
    return bool(_TABLES.search(name)) or bool(_MASK.search(name) and (shape is None or len(shape) > 2))


def hint(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What explains most of the names that do not fit, with the fix, to be added to a message; empty when nothing does."""
    lora = [name for name in unexpected if _LORA.search(name)]
    if lora:
        return "; tensors of an adapter are among them: merge it into the base model with peft's merge_and_unload() and save that"
    for wrapper in _WRAPPERS:
        if any(wrapper in name for name in unexpected):
            return _rename(f"{wrapper!r}, which a training tool put there", f"name.replace({wrapper!r}, '')")
    wanted = set(missing)
    for prefix in _prefixes(missing, unexpected):
        if _most(name.removeprefix(prefix) in wanted for name in unexpected if name.startswith(prefix)):
            return _rename(f"the prefix {prefix!r}", f"name.removeprefix({prefix!r})")
    given = set(unexpected)
    for prefix in _prefixes(unexpected, missing):
        if _most(name.removeprefix(prefix) in given for name in missing if name.startswith(prefix)):
            return f"; the names lack the prefix {prefix!r}: add it to them"
    return ""


def _prefixes(short: Iterable[str], long: Iterable[str]) -> list[str]:
    """What may stand before every name of ``short`` to give one of ``long``, shortest first."""
    first = min(short, key=len, default=None)
    if first is None:
        return []
    found = {name.removesuffix(first) for name in long if name.endswith("." + first)}
    return sorted(found, key=len)[:8]


def _most(fits: Iterable[bool]) -> bool:
    fits = list(fits)
    return sum(fits) * 2 > len(fits)


def _rename(what: str, new_name: str) -> str:
    return (
        f"; the names hold {what}: take it off, with {{{new_name}: tensor for name, tensor in load_file(path).items()}} "
        "and save_file of safetensors.torch"
    )
