"""Writing a folder of an adapter, as peft saves it: small, exact, and read by ``diffpo.load``, by peft and by other tools.

Layers carry the names of the base's published files. A learned threshold lies beside it, in a file that other tools ignore.
"""

import json
import os
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpo.models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from diffpo.models.adapters import Peft, adapted_modules, plain_lora_fault, without_wrapper
from diffpo.models.file_replacement import write_atomically
from diffpo.models.lora import ADAPTER, lora_layers, published_name
from diffpo.models.sharding import one_writer, reshard, whole
from diffpo.models.threshold_file import THRESHOLD, write_threshold
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.models.weights import POLICY

Tensors = dict[str, Tensor]


def is_an_adapter(model: MaskedDiffusionLM) -> bool:
    """Whether what is trained in the model is plain LoRA of one rank and scale, and perhaps a threshold: what an adapter's folder can say."""
    layers = dict(lora_layers(model))
    if not layers or layers.keys() != set(adapted_modules(model)):
        return False
    settings = {(layer.r.get(ADAPTER), layer.lora_alpha.get(ADAPTER)) for layer in layers.values()}
    plain = all(set(layer.lora_A) == {ADAPTER} and plain_lora_fault(layer) is None for layer in layers.values())
    others = (name for name, weight in model.named_parameters() if weight.requires_grad and not name.startswith(POLICY))
    return plain and len(settings) == 1 and all(".lora_" in name for name in others)


def save_adapter(model: MaskedDiffusionLM, folder: str | os.PathLike) -> None:
    """Write the model's LoRA, without its base, into a folder. Of a sharded model every process calls this, and one writes.

    model: a MaskedDiffusionLM, or one in a peft.PeftModel. ValueError, with nothing written, for values that are not finite and for a
    model that is not `is_an_adapter`; OSError when the disk cannot take it.
    """
    model, folder = without_wrapper(model), Path(folder)
    if not is_an_adapter(model):
        raise ValueError(
            "the model has no adapter that a folder of its own can hold: plain LoRA of one rank; save the merged model"
        )
    reshard(model)
    with one_writer(model.parameters()) as writes:
        tensors = adapter_tensors(model, writes)
        if writes:
            write_adapter(model, tensors, folder)


def factors(model: MaskedDiffusionLM) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer with LoRA, by its name in the model."""
    return {name: (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for name, layer in lora_layers(model)}


def adapter_tensors(model: MaskedDiffusionLM, here: bool) -> Tensors:
    """What an adapter's folder holds, whole and on the CPU, in the process that wants it ``here``; every process takes part."""
    kept: Tensors = {}
    for name, pair in factors(model).items():
        for side, weight in zip("AB", pair, strict=True):
            values = whole(weight)
            if here:
                kept[f"{PREFIX}{published_name(model, name)}.lora_{side}.weight"] = values.cpu().contiguous()
    for name, tensor in model.state_dict().items():
        if name.startswith(POLICY):
            values = whole(tensor)
            if here:
                kept[name] = values.cpu()
    return kept


def write_adapter(model: MaskedDiffusionLM, tensors: Tensors, folder: Path) -> None:
    """As ``save_adapter``, in one process: ``tensors`` are the model's ``adapter_tensors``."""
    damaged = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise ValueError(f"weights that are not finite are not saved: {', '.join(damaged[:8])}")
    folder.mkdir(parents=True, exist_ok=True)
    policy = {name.removeprefix(POLICY): tensor for name, tensor in tensors.items() if name.startswith(POLICY)}
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(POLICY)}
    if policy:
        write_atomically(folder / THRESHOLD, lambda path: write_threshold(policy, model.config, Path(path)))
    write_atomically(folder / ADAPTER_WEIGHTS, partial(save_file, own, metadata={"format": "pt"}))
    text = json.dumps(_settings(model), indent=2) + "\n"
    write_atomically(folder / ADAPTER_CONFIG, lambda path: Path(path).write_text(text))


def _settings(model: MaskedDiffusionLM) -> dict:
    """adapter_config.json. Layers by their whole names: the short one of LLaDA's down projection is the head's too."""
    names = [published_name(model, name) for name, _ in lora_layers(model)]
    layer: Peft = next(lora_layers(model))[1]
    base, revision = None, None
    if model.source is not None:
        base, revision = model.source.name, model.source.revision
        base = os.path.abspath(base) if os.path.isdir(base) else base
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": layer.r[ADAPTER],
        "lora_alpha": layer.lora_alpha[ADAPTER],
        "use_rslora": bool(layer.use_rslora[ADAPTER]),
        "target_modules": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
