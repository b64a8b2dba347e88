"""What is recognised and refused by name: families whose networks are not implemented, and quantised weights."""

from pathlib import Path

from diffpo.models.folder_files import shown

_MIXTURE = "a mixture of experts (LLaDA-MoE, LLaDA2)"
_BLOCK_CAUSAL = "a model with block-causal attention (SDAR, Fast-dLLM-v2)"
_QUANTISED = "a checkpoint with quantised weights"
_BY_NAME = {"moe": _MIXTURE, "llada2": _MIXTURE, "sdar": _BLOCK_CAUSAL, "fast_dllm": _BLOCK_CAUSAL}
_BY_KEY = {
    "expert": _MIXTURE,
    "block_size": _BLOCK_CAUSAL,
    "bd_size": _BLOCK_CAUSAL,
    "block_length": _BLOCK_CAUSAL,
    "quantization": _QUANTISED,
    "compression_config": _QUANTISED,
}


def refuse_unsupported_family(fields: dict, where: str | Path) -> None:
    """ValueError if model_type, architectures or the keys of a config.json (LLaDA-MoE calls itself "llada") show one."""
    architectures = fields.get("architectures") or []
    for name in (fields.get("model_type"), *(architectures if isinstance(architectures, list) else [architectures])):
        for part, family in _BY_NAME.items():
            if isinstance(name, str) and part in name.lower():
                raise ValueError(f"{where}: {shown(name)} is {family}, which is not supported yet")
    for key, value in fields.items():
        for part, family in _BY_KEY.items():
            if part in key.lower() and value and not key.startswith("_"):
                raise ValueError(
                    f"{where}: {shown(key)[1:-1]} {shown(value)} means {family}, which is not supported yet"
                )
