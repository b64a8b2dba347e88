"""Adapters that peft has put into a model: LoRA's weights as one matrix, and the weights of a checkpoint with all of them merged.

peft is never imported here: a model that holds its modules has done so.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn

from diffpo.models.sharding import is_shard, whole

Peft = Any  # an object of one of peft's classes
Model = TypeVar("Model", bound=nn.Module)


def without_wrapper(model: Model) -> Model:
    """The model inside of a peft.PeftModel, whose layers the adapters are; any other model itself."""
    return model.get_base_model() if _is(model, "PeftModel") else model


def replacement(module: nn.Module) -> nn.Module:
    """The module that runs in place of this one: peft's trained copy (``modules_to_save``) where that is active, else the module."""
    if not _is(module, "ModulesToSaveWrapper"):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def adapted_weight(layer: Peft, name: str) -> Tensor:
    """The weight of a linear layer with its active LoRA adapters in it; differentiable. ``name``: what an error calls the layer.

    ValueError for what is no sum of weight and LoRA's product: other kinds of adapters, DoRA, a bias, dropout while training.
    """
    fault = plain_lora_fault(layer)
    if fault:
        raise ValueError(
            f"the adapter on {name} cannot be used: {fault}; put plain LoRA without dropout there, or name {name} in modules_to_save, "
            "or leave it without an adapter"
        )
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged:
        return weight
    for adapter in _active(layer):
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules that an adapter changes or replaces."""
    return [name for name, _ in _outermost(model)]


def added_parameters(model: nn.Module) -> set[str]:
    """The names of the adapters' own parameters: what a model has none of with its adapters off."""
    return {
        f"{name}.{inner}"
        for name, module in _outermost(model)
        for inner, _ in module.named_parameters()
        if not inner.startswith(("base_layer.", "original_module."))
    }


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is as if nothing had been added to it.

    peft's own switch also says which parameters are trained: turned on again, adapters that were frozen would be.
    """
    on = [module for _, module in _outermost(model) if not module.disable_adapters]
    for module in on:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in on:
            module._disable_adapters = False


def merged_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each adapted module's name and what it is with its active adapters merged: a copy with whole weights, or the trained module that runs
    in its place. The model stays as it is.

    A shard's values are gathered, so every process has to go through all of them. ValueError for a module that peft cannot merge.
    """
    for name, module in _outermost(model):
        if _is(module, "ModulesToSaveWrapper"):
            yield name, replacement(module)
        elif _is(module, "BaseTunerLayer") and hasattr(module, "merge"):
            yield name, _merged(_whole_copy(module))
        else:
            raise ValueError(f"the adapter on {name}, a {type(module).__name__}, cannot be merged into its weights")


def _merged(layer: Peft) -> nn.Module:
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
    else:
        layer.merge()
    return layer.get_base_layer()


def _whole_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(
        module, {id(weight): nn.Parameter(whole(weight).clone(), requires_grad=False) for weight in module.parameters()}
    )


def _outermost(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Peft]]:
    for name, child in model.named_children():
        if _is(child, "BaseTunerLayer") or _is(child, "AuxiliaryTrainingWrapper"):
            yield prefix + name, child
        else:
            yield from _outermost(child, f"{prefix}{name}.")


def plain_lora_fault(layer: nn.Module) -> str | None:
    """What makes a layer another one than a weight plus LoRA's product, or None."""
    if not (_is(layer, "LoraLayer") and isinstance(layer.get_base_layer(), nn.Linear)):
        return f"it is a {type(layer).__name__}"
    if any(adapter in layer.lora_variant for adapter in _active(layer)):
        return "it is a variant of LoRA (such as DoRA)"
    if any(layer.lora_bias[adapter] for adapter in _active(layer)):
        return "it has a bias (lora_bias)"
    if layer.training and any(getattr(layer.lora_dropout[adapter], "p", 0) > 0 for adapter in _active(layer)):
        return "it has dropout (lora_dropout)"
    if any(map(is_shard, layer.parameters())):
        return "its weights are sharded apart from the model's root"
    return None


def _active(layer: Peft) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _is(module: nn.Module, kind: str) -> TypeGuard[Peft]:
    """Whether a module is of one of peft's classes."""
    return any(base.__name__ == kind and base.__module__.startswith("peft.") for base in type(module).__mro__)
