"""The tensors of a model that a checkpoint holds, by their names in the model."""

from typing import TYPE_CHECKING

from torch import Tensor

from diffpo.models.adapters import adapted_modules, merged_modules
from diffpo.models.sharding import is_shard, whole

if TYPE_CHECKING:
    from diffpo.models.transformer import MaskedDiffusionLM

POLICY = "threshold."  # the learned threshold's tensors; beside a published format they have a file of their own


def weights(model: "MaskedDiffusionLM") -> dict[str, Tensor]:
    """The model's own tensors: all, except a head tied to the embedding. ValueError for a model with adapters."""
    adapted = adapted_modules(model)
    if adapted:
        raise ValueError(f"the model has adapters, on {', '.join(adapted[:3])}: load into a model without them")
    return _untied(model, dict(model.state_dict()))


def whole_weights(model: "MaskedDiffusionLM", here: bool) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: adapters merged, and shards whole, which takes every process.

    here: whether they are wanted in this process; elsewhere the result is empty. ValueError for a tied head that an adapter has parted from
    the embedding, and for adapters that cannot be merged.
    """
    adapted = adapted_modules(model)
    apart = [name for name in adapted if name.split(".")[0] in ("lm_head", "embed_tokens")]
    if apart and model.config.tie_word_embeddings:
        raise ValueError(
            f"the head is tied to the embedding, and the adapter on {apart[0]} changes one of the two: a checkpoint cannot say so; "
            "load the model with tie_word_embeddings false before adding it"
        )
    kept: dict[str, Tensor] = {}
    for name, tensor in _untied(model, dict(model.state_dict())).items():
        if not any(name.startswith(f"{module}.") for module in adapted):
            values = whole(tensor)  # in every process
            if here:
                kept[name] = values.cpu() if is_shard(tensor) else values
    for name, module in merged_modules(model):
        for inner, tensor in module.state_dict().items():
            values = whole(tensor)
            if here:
                kept[f"{name}.{inner}"] = values.cpu()
    return kept


def _untied(model: "MaskedDiffusionLM", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return tensors
