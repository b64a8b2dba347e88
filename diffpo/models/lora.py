"""LoRA through peft: which layers a target means, and a model with fresh adapters.

Adapters are fp32 whatever the model is stored as (see modules.py); the rest is frozen. Their initial values are keyed, by seed and
layer: A uniform in +-1/sqrt(its inputs), as peft's, B zero, so that the model begins as it came.
"""

import difflib
import importlib.util
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffpo.keyed_random import uniform
from diffpo.models.adapters import Peft, adapted_modules
from diffpo.models.formats import FORMATS
from diffpo.models.modules import Linear

if TYPE_CHECKING:
    from diffpo.models.transformer import MaskedDiffusionLM

ADAPTER = "default"  # peft's name of an adapter that has no other
_HEAD = "lm_head"


def published_name(model: "MaskedDiffusionLM", module: str) -> str:
    """What a module of the model is called in the checkpoints of its format."""
    return FORMATS[model.config.model_type].tensor_name(f"{module}.weight").removesuffix(".weight")


def target_modules(model: "MaskedDiffusionLM", targets: Sequence[str] | None = None) -> list[str]:
    """The linear layers that ``targets`` mean, by their names in the model; None: all of the blocks.

    A target is the end of a layer's name here ("q_proj", "layers.3.mlp.up_proj") or in the published files ("ff_proj"). Where the head's
    published name ends as that of a layer of the blocks does (LLaDA's "ff_out"), the block's is meant; "lm_head" is the head.
    ValueError, with the nearest names, for one that matches nothing.
    """
    linear = lora_targets(model)
    if targets is None:
        return [name for name in linear if name != _HEAD]
    names = {name: (name, published_name(model, name)) for name in linear}
    chosen = set()
    for target in targets:
        found = {name for name, known in names.items() if any(_ends_with(one, target) for one in known)}
        if target != _HEAD and len(found) > 1:
            found -= {_HEAD}
        if not found:
            raise ValueError(f"{target!r} matches no linear layer of the model; nearest: {_nearest(target, names)}")
        chosen |= found
    if _HEAD in chosen and model.config.tie_word_embeddings:
        raise ValueError(f"{_HEAD} is tied to the embedding, and an adapter would change one of the two: leave it out")
    return [name for name in linear if name in chosen]


def lora_targets(model: "MaskedDiffusionLM") -> list[str]:
    """All layers that may have an adapter: the linear ones of the blocks, and the head, by their names in a model without adapters."""
    linear = [
        name.removesuffix(".weight")
        for name, weight in model.named_parameters()
        if name.endswith(".weight") and weight.dim() == 2 and ".lora_" not in name
    ]
    linear = [name.removesuffix(".base_layer") for name in linear]
    tied = [_HEAD] if model.config.tie_word_embeddings else []
    return [name for name in linear if name.startswith("layers.") or name == _HEAD] + tied


def check_lora(model: "MaskedDiffusionLM", rank: int, targets: Sequence[str] | None = None) -> list[str]:
    """As `target_modules`. ValueError that names the field also for a rank above the smaller side of a matrix, and without peft."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            "lora.rank: adapters need peft: pip install 'diffpo[lora]', or leave lora.rank out to train all weights"
        )
    try:
        names = target_modules(model, targets)
    except ValueError as error:
        raise ValueError(f"lora.targets: {error}") from None
    weights = dict(model.named_parameters())
    smallest, name = min((min(weights[f"{name}.weight"].shape), name) for name in names)
    if rank > smallest:
        raise ValueError(f"lora.rank: {rank} is more than {smallest}, the rank of {name} itself: choose a smaller one")
    return names


def add_lora(model: "MaskedDiffusionLM", names: Sequence[str], rank: int, alpha: int, *key: int) -> None:
    """Put fresh LoRA on the layers ``names``, scaled by alpha / rank, in place, and freeze everything else.

    key: what the draws are keyed by, beside the layer's name. Nothing is drawn from a global generator. ValueError for a model that has
    adapters.
    """
    import peft

    if adapted_modules(model):
        raise ValueError("the model has adapters already")
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(names), lora_dropout=0.0, init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says about adapters on the meta device, which are replaced below
        peft.inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)
    model.requires_grad_(False)
    for name, layer in lora_layers(model):
        weight = layer.get_base_layer().weight
        outputs, inputs = weight.shape
        first = _drawn(rank, inputs, *key, zlib.crc32(name.encode())).to(weight.device)
        layer.lora_A[ADAPTER] = _linear(first)
        layer.lora_B[ADAPTER] = _linear(torch.zeros(outputs, rank, device=weight.device))
        layer.cast_input_dtype_enabled = False  # these layers do so themselves


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Peft]]:
    """The layers with LoRA and their names, in the model's order."""
    for name in adapted_modules(model):
        module = model.get_submodule(name)
        if hasattr(module, "lora_A"):
            yield name, module


def _drawn(rank: int, inputs: int, *key: int) -> Tensor:
    row, column = torch.arange(rank)[:, None], torch.arange(inputs)
    return (2 * uniform(*key, row, column) - 1) / math.sqrt(inputs)


def _linear(weight: Tensor) -> Linear:
    with torch.device("meta"):
        layer = Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def _ends_with(name: str, target: str) -> bool:
    return name == target or (bool(target) and name.endswith(f".{target}"))


def _nearest(target: str, names: dict[str, tuple[str, str]]) -> str:
    short = {one.rpartition(".")[2] for known in names.values() for one in known}
    return ", ".join(difflib.get_close_matches(target, sorted(short), n=3, cutoff=0.0))
