"""Folders of an adapter (LoRA, as peft saves it): read and merged into their base model. Others are recognised and refused, because
ignoring an adapter gives another model's numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffpo.models.folder_files import find, read_json, shown
from diffpo.models.lora import lora_targets, published_name
from diffpo.models.sharding import fill
from diffpo.models.stored_tensors import StoredTensor, read_headers
from diffpo.models.tensor_names import hint
from diffpo.models.transformer import MaskedDiffusionLM

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # which peft puts in front of a model's names
_FILES = (ADAPTER_CONFIG, "adapter_model*", "adapters.safetensors", "adapters.npz")
# keys of peft's config that change what is added, and the values at which they do not
_PLAIN: dict[str, tuple] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
}


@dataclass(frozen=True)
class Adapter:
    """Plain LoRA in a folder. base, revision: the model that it changes, as in ``load``, None if the folder does not say; rank; scale: of B A, which is added to a weight."""

    folder: Path
    base: str | None
    revision: str | None
    rank: int
    scale: float

    def pairs(self, model: MaskedDiffusionLM) -> dict[str, tuple[StoredTensor, StoredTensor]]:
        """A [rank, inputs] and B [outputs, rank] of each layer that has them, by its name in the model, from the file's header.

        ValueError for tensors that are not those of LoRA on this model's linear layers.
        """
        stored = read_headers(self.folder / ADAPTER_WEIGHTS)
        layers = {name: model.get_parameter(f"{name}.weight").shape for name in lora_targets(model)}
        found = {}
        for name, (outputs, inputs) in layers.items():
            for known in {name, published_name(model, name)}:
                a, b = (stored.pop(f"{PREFIX}{known}.lora_{side}.weight", None) for side in "AB")
                if a is None and b is None:
                    continue
                if a is None or b is None or (a.shape, b.shape) != ((self.rank, inputs), (outputs, self.rank)):
                    raise ValueError(f"{self.folder}: the adapter on {known} does not fit: rank {self.rank} and the layer's weight need "
                                     f"[{self.rank}, {inputs}] and [{outputs}, {self.rank}]")  # fmt: skip
                found[name] = (a, b)
        if stored or not found:
            first = ", ".join(shown(name)[1:-1] for name in sorted(stored)[:3]) or "none"
            raise ValueError(
                f"{self.folder}: the adapter is of another model than {shown(self.base)}: it holds {first}{hint((), stored)}"
            )
        return found

    @torch.no_grad()
    def merge_into(self, model: MaskedDiffusionLM) -> None:
        """Add scale B A to the weights, in fp32 and rounded once."""
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            for name, (a, b) in self.pairs(model).items():
                weight = model.get_parameter(f"{name}.weight")
                added = file.get_tensor(b.name).float() @ file.get_tensor(a.name).float()
                weight.copy_(weight.float() + self.scale * added.to(weight.device))

    def read_into(self, factors: dict[str, tuple[Tensor, Tensor]], model: MaskedDiffusionLM) -> None:
        """Fill a model's own adapters, A and B by layer, as they were saved. ValueError, with nothing changed, for others."""
        pairs = self.pairs(model)
        if _shapes(pairs) != _shapes(factors):
            raise ValueError(f"{self.folder} holds other adapters than the model")
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            for name, (a, b) in pairs.items():
                for destination, stored in zip(factors[name], (a, b), strict=True):
                    fill(destination, file.get_tensor(stored.name))


def _shapes(pairs: Mapping[str, tuple[Tensor | StoredTensor, Tensor | StoredTensor]]) -> dict[str, tuple]:
    return {name: (a.shape, b.shape) for name, (a, b) in pairs.items()}


def adapter_in(folder: Path) -> Adapter | None:
    """The adapter of a folder that holds one and no model; None for any other folder.

    ValueError for one that is more than plain LoRA.
    """
    if not (find(folder, ADAPTER_CONFIG) and find(folder, ADAPTER_WEIGHTS)) or find(folder, "config.json"):
        return None
    fields = read_json(folder / ADAPTER_CONFIG)
    kind, rank, alpha = (fields.get(key) for key in ("peft_type", "r", "lora_alpha"))
    acting = [key for key, plain in _PLAIN.items() if key in fields and fields[key] not in plain]
    if kind != "LORA" or acting:
        what = f"{acting[0]} {shown(fields[acting[0]])}" if acting else f"peft_type {shown(kind)}"
        raise ValueError(
            f"{folder} holds an adapter with {what}; only plain LoRA is read: {_how_to_merge(_base(folder), folder)}"
        )
    if (
        type(rank) is not int
        or not 0 < rank < 2**20
        or type(alpha) not in (int, float)
        or not math.isfinite(alpha or 0)
    ):
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} has r {shown(rank)} and lora_alpha {shown(alpha)}")
    base, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(base, str | None) or not isinstance(revision, str | None):
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} has base {shown(base)} and revision {shown(revision)}")
    scale = float(alpha or 0) / (math.sqrt(rank) if fields.get("use_rslora") is True else rank)
    return Adapter(folder, base, revision, rank, scale)


def refuse_adapter(folder: Path) -> None:
    """ValueError, with the way to merge it, if a folder holds an adapter beside base weights, or in a form that is not read."""
    patterns = (*_FILES, f"*/{ADAPTER_CONFIG}")  # named adapters have folders of their own
    found = sorted({str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)})
    if found:
        base = _base(folder) if ADAPTER_CONFIG in found else None
        raise ValueError(
            f"{folder} holds an adapter ({', '.join(found)}), which would be ignored; {_how_to_merge(base, folder)}. If the weights beside "
            "it are the merged ones, remove the adapter's files"
        )


def merge_command(base: str, adapter: str) -> str:
    """How to write base model and adapter as one checkpoint."""
    return (
        f"with base = {base} as the tool that trained the adapter loads it, "
        f"peft.PeftModel.from_pretrained(base, {adapter!r}).merge_and_unload().save_pretrained('merged'), "
        "then copy the base's tokenizer files to 'merged'"
    )


def _how_to_merge(base: str | None, folder: Path) -> str:
    return (
        f"merge it into its base model, {base or 'which the folder does not name'}, and load the result: "
        f"{merge_command(base or 'BASE', str(folder))}"
    )


def _base(folder: Path) -> str | None:
    """base_model_name_or_path of the adapter's config."""
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return shown(name).strip("'\"") if isinstance(name, str) and name else None
