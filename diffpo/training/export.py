"""What a run leaves as its model: a whole one, or the adapter alone."""

from pathlib import Path

from diffpo.models.adapter_saving import is_an_adapter, save_adapter
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.training.config import TrainConfig

_SMALL = 2 * 10**9  # bytes of weights


def exports_adapter(config: TrainConfig, model: MaskedDiffusionLM) -> bool:
    """Whether the adapter is written instead of the merged model.

    By default it is for a base above 2 GB: merged, each run would write all of it once more (16 GB for LLaDA-8B, and as much memory), and
    the small sums would be rounded to bf16. A small model is one folder that needs nothing else.
    """
    if config.export != "auto":
        return config.export == "adapter"
    weights = sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" not in name)
    return config.lora.rank is not None and is_an_adapter(model) and weights * model.dtype.itemsize > _SMALL


def export(config: TrainConfig, model: MaskedDiffusionLM, folder: Path) -> None:
    """Write the trained model, with its threshold, in a form that ``diffpo.load`` and other tools read."""
    if exports_adapter(config, model):
        save_adapter(model, folder)
    else:
        model.save(folder)
