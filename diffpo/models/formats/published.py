"""What the published families have in common: a table of config keys, a table of tensor names, and strictness."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffpo.models.folder_files import shown
from diffpo.models.formats.config_keys import refuse_keys_that_act, with_rope_theta
from diffpo.models.model_config import REQUIRED, ModelConfig

_THRESHOLD = ("threshold_gammas", "threshold_order", "threshold_reads")  # stored in a file of its own


@dataclass(frozen=True)
class PublishedFormat:
    """One family of checkpoints, as its authors published it.

    keys: ModelConfig field -> key of config.json. defaults: fields whose key the published files lack or may omit.
    fixed: keys that change the network -> the values it can honour; a missing key counts as honoured. inert: keys without
    influence on inference. modules, layer_modules: module name -> published name, outside and inside of the layers, whose
    prefix is ``layers``. mask_token: its spelling. template: the keys that a checkpoint without an original starts from.
    """

    model_type: str
    keys: Mapping[str, str]
    defaults: Mapping[str, object]
    fixed: Mapping[str, tuple]
    inert: frozenset[str]
    modules: Mapping[str, str]
    layers: str
    layer_modules: Mapping[str, str]
    mask_token: str
    template: Mapping[str, object]
    resolve: Callable[[dict, str | Path], dict] = field(default=lambda fields, where: fields)

    def config(self, fields: dict, where: str | Path) -> ModelConfig:
        """The ModelConfig that the keys of a config.json ask for. ValueError, naming the key: one that is missing, has the
        wrong type, or asks for a network other than the one implemented. ``where``: what the message starts with."""
        fields = with_rope_theta(fields, where)
        self._refuse_what_changes_the_network(fields, where)
        fields = self.resolve(fields, where)
        values = dict(self.defaults)
        values |= {name: fields[key] for name, key in self.keys.items() if fields.get(key) is not None}
        missing = [self.keys[name] for name in REQUIRED if name not in values]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        try:
            config = ModelConfig(model_type=self.model_type, **values)
        except ValueError as error:
            raise ValueError(f"{where}: {self._in_published_names(str(error))}") from error
        if fields.get("head_dim") not in (None, config.head_dim):
            raise ValueError(f"{where}: head_dim {shown(fields['head_dim'])} is not supported, only {config.head_dim}")
        for name in self.keys.keys() - self.keys.values() - self.inert:  # transformers' names beside the family's own
            if fields.get(name) not in (None, getattr(config, name)):
                raise ValueError(f"{where}: {name} {shown(fields[name])} contradicts {self.keys[name]}")
        return config

    def fields(self, config: ModelConfig, original: dict | None = None) -> dict:
        """config.json for this config: the original one with what has changed since, or a new one from the template.

        ValueError for a config that this format cannot express, naming the field.
        """
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            raise ValueError(f"head_dim {config.head_dim} cannot be expressed in the {self.model_type} format")
        if original is None:
            result, before = dict(self.template) | {"vocab_size": config.vocab_size}, {}
        else:
            result, before = dict(original), self.config(original, "the original config.json").model_dump()
        for name, value in config.model_dump().items():
            if name in self.keys and (name not in before or before[name] != value):
                result[self.keys[name]] = value
        readable = self.config(result, f"the {self.model_type} config.json").model_dump()
        for name, value in config.model_dump().items():
            if name not in _THRESHOLD and readable[name] != value:
                raise ValueError(f"{name} {value!r} cannot be expressed in the {self.model_type} format")
        return result

    def tensor_name(self, name: str) -> str:
        """ "layers.3.mlp.up_proj.weight" -> the name of that tensor in the published files."""
        module, kind = name.rsplit(".", 1)
        if module.startswith("layers."):
            _, index, module = module.split(".", 2)
            return f"{self.layers}.{index}.{self.layer_modules[module]}.{kind}"
        return f"{self.modules[module]}.{kind}"

    def _refuse_what_changes_the_network(self, fields: dict, where: str | Path) -> None:
        for key, honoured in self.fixed.items():
            if key in fields and fields[key] not in honoured:
                values = " or ".join(repr(value) for value in honoured)
                raise ValueError(f"{where}: {key} {shown(fields[key])} is not supported, only {values}")
        known = self.inert | set(self.keys) | set(self.keys.values()) | set(self.fixed) | {"head_dim"}
        refuse_keys_that_act(fields, known, self.model_type, where)

    def _in_published_names(self, message: str) -> str:
        fields = re.compile(rf"\b({'|'.join(self.keys)})\b")
        return fields.sub(lambda match: self.keys[match[1]], message)
