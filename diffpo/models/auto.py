"""transformers' AutoConfig and AutoModel for the model types that load here, without trust_remote_code.

    from diffpo.models.auto import register
    register()
    model = AutoModel.from_pretrained(folder)     # a diffpo.MaskedDiffusionLM, as diffpo.load(folder) gives

A module of its own, because it imports transformers and ``import diffpo`` does not.
"""

import os
from typing import ClassVar

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from diffpo.models.checkpoints import load
from diffpo.models.formats import FORMATS
from diffpo.models.transformer import MaskedDiffusionLM

DeviceMap = str | int | torch.device | None


class _CheckpointConfig(PreTrainedConfig):
    """The keys of config.json as attributes; what they mean is decided by the format when a model is built."""


class DiffpoConfig(_CheckpointConfig):
    model_type = "diffpo"


class DreamConfig(_CheckpointConfig):
    model_type = "Dream"


class LladaConfig(_CheckpointConfig):
    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }


class _Loader:
    """What AutoModel calls for these model types: it builds a MaskedDiffusionLM."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        config: PreTrainedConfig,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: DeviceMap | dict[str, DeviceMap] = None,
        revision: str | None = None,
        **others: object,
    ) -> MaskedDiffusionLM:
        """``diffpo.load`` in transformers' words. dtype "auto" or None: as stored; device_map: one device, as
        in transformers the CPU if none is given.

        TypeError for an argument that would have no effect.
        """
        ignored = sorted(name for name, value in others.items() if value and name not in _ALWAYS_SO)
        if ignored:
            raise TypeError(f"AutoModel of a diffpo model does not take {', '.join(ignored)}; see diffpo.load")
        revision = None if os.path.isdir(name_or_path) else revision
        _refuse_overrides(config, type(config).from_pretrained(name_or_path, revision=revision))
        dtype = dtype or torch_dtype
        return load(name_or_path, _one_device(device_map), None if dtype == "auto" else dtype, revision)

    @classmethod
    def _from_config(
        cls, config: PreTrainedConfig, dtype: torch.dtype | None = None, **others: object
    ) -> MaskedDiffusionLM:
        """A model with random weights."""
        if others:
            raise TypeError(f"AutoModel of a diffpo model does not take {', '.join(sorted(others))}")
        fields = {key: value for key, value in config.to_dict().items() if key not in _GENERIC}
        model = MaskedDiffusionLM(FORMATS[config.model_type].config(fields, "the config"))
        return model if dtype is None else model.to(dtype)


# passed by AutoModel itself, or asking for what is done anyway
_ALWAYS_SO = {"_from_auto", "adapter_kwargs", "trust_remote_code", "low_cpu_mem_usage", "use_safetensors"}
_GENERIC = set(PreTrainedConfig().to_dict()) - {"model_type"}
_CONFIGS = (DiffpoConfig, DreamConfig, LladaConfig)


def register() -> None:
    """Make AutoConfig and AutoModel know the model types "diffpo", "llada" and "Dream". Calling it again changes nothing."""
    for config_class in _CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, _LOADERS[config_class], exist_ok=True)


def _refuse_overrides(asked: PreTrainedConfig, stored: PreTrainedConfig) -> None:
    """The network is the one in config.json: an argument that AutoConfig turned into another value would be lost."""
    asked, stored = asked.to_dict(), stored.to_dict()
    changed = sorted(key for key in asked if asked[key] != stored.get(key) and key not in ("dtype", "_name_or_path"))
    if changed:
        raise TypeError(f"AutoModel of a diffpo model does not take {', '.join(changed)}; edit config.json instead")


def _one_device(device_map: DeviceMap | dict[str, DeviceMap]) -> str | torch.device:
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ValueError(f"device_map {device_map}: a diffpo model is put on one device")
        device_map = device_map[""]
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    return device_map or "cpu"


# transformers wants a class for each config class
_LOADERS = {
    config: type(config.__name__.replace("Config", "Loader"), (_Loader,), {"config_class": config})
    for config in _CONFIGS
}
