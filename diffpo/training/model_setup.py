"""The model as a run trains it: loaded in the right dtypes, with adapters where they are asked for.

What is trained is kept in fp32: in bf16 an Adam step of 2e-4 changes no weight above 0.1. What is frozen, and all arithmetic, has the
run's dtype, by default that of the checkpoint (``diffpo/models/modules.py``). So fully trained weights take 16 bytes each (weight,
gradient, two moments), and 2 of the base of LoRA. bf16 weights with fp32 copies in the optimizer would take as much, and save the
conversions; but then gradients add up in bf16 over the parts of a batch, a checkpoint holds two models, and FSDP2, whose mixed precision
keeps fp32 shards as here, would be another code path.
"""

from collections.abc import Iterable

import torch
from torch import nn

from diffpo.models.checkpoints import Checkpoint
from diffpo.models.lora import add_lora, check_lora
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.training.config import TrainConfig
from diffpo.training.distributed import ALONE, World

_ADAPTERS = 2  # a purpose in the random key, beside those of the trainer


def compute_dtype(config: TrainConfig, stored: torch.dtype) -> torch.dtype:
    """Of the network's arithmetic and its frozen weights. Weights in float16 are taken as bfloat16: small gradients are 0 in the first."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if stored == torch.float16 else stored


def trains_all(config: TrainConfig) -> bool:
    """Whether the model's own weights are trained."""
    return "model" in config.algorithm.train and config.lora.rank is None


def shards(config: TrainConfig, world: World) -> bool:
    """Whether the model is spread over the processes."""
    return config.distributed.shard and world.size > 1


def adapted_layers(config: TrainConfig, model: MaskedDiffusionLM) -> list[str]:
    """The layers that get adapters. ValueError that names the field for settings that do not fit the model, which needs no weights yet."""
    lora = config.lora
    return [] if lora.rank is None else check_lora(model, lora.rank, lora.targets)


def loaded(
    config: TrainConfig, checkpoint: Checkpoint, device: torch.device, world: World = ALONE
) -> MaskedDiffusionLM:
    """The checkpoint's model with its weights and, where the run has them, fresh adapters."""
    names, dtype = adapted_layers(config, checkpoint.model), compute_dtype(config, checkpoint.model.dtype)
    # what will be spread becomes fp32 block by block, when it is a shard
    wide = torch.promote_types(dtype, checkpoint.model.dtype if shards(config, world) else torch.float32)
    model = checkpoint.load(device, wide if trains_all(config) else dtype)
    model.compute_dtype = dtype
    if config.lora.rank is not None:
        rank, alpha = config.lora.rank, config.lora.alpha or config.lora.rank
        add_lora(model, names, rank, alpha, config.seed, _ADAPTERS)
    return model


def keep_in_fp32(model: MaskedDiffusionLM, parameters: Iterable[nn.Parameter]) -> None:
    """Convert 16-bit parameters that are to be trained to fp32, in place; the model goes on computing in the dtype it has."""
    model.compute_dtype = model.dtype
    for parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
