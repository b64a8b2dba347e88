"""The learned threshold of a published model: a file of its own, so that other tools load the folder as before.

Safetensors content. The ending is another one because tools read every *.safetensors of a folder.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffpo.models.folder_files import find, parse_json
from diffpo.models.model_config import ModelConfig
from diffpo.models.stored_tensors import Stored, read_headers
from diffpo.models.threshold import policy_shapes

THRESHOLD = "diffpo_threshold.st"


def add_threshold_fields(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the settings of the folder's threshold file, or as it was when there is none."""
    path = find(folder, THRESHOLD)
    if path is None:
        return config
    read_headers(path)
    try:
        with safe_open(path, framework="pt") as file:  # bounded by read_headers
            settings = file.metadata() or {}
        (gammas,) = parse_json(f'{{"gammas": {settings["gammas"]}}}', f"{path}: gammas").values()
        fields = {
            "threshold_gammas": gammas,
            "threshold_order": settings.get("order") or settings["proxy"],  # its name in earlier versions
            "threshold_reads": settings.get("reads", "completion"),
        }
        return ModelConfig(**config.model_dump() | fields)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable threshold file: {error!r}") from error


def stored_threshold(config: ModelConfig, folder: Path) -> Stored:
    """The tensors of the folder's threshold file by their names in ThresholdPolicy; ValueError unless they fit the config."""
    path = find(folder, THRESHOLD)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {THRESHOLD}, the model has a learned threshold")
    bins, stored = len(config.threshold_gammas or ()), read_headers(path)
    expected = policy_shapes(config.hidden_size, bins, config.threshold_reads)
    if {name: tensor.shape for name, tensor in stored.items()} != expected:
        raise ValueError(f"{path} holds another threshold: {[(n, list(t.shape)) for n, t in stored.items()][:4]}")
    return stored


def write_threshold(tensors: dict[str, Tensor], config: ModelConfig, path: Path) -> None:
    """The tensors of a ThresholdPolicy by their names in it, and the config's settings of it."""
    settings = {
        "gammas": json.dumps(config.threshold_gammas),
        "order": config.threshold_order,
        "reads": config.threshold_reads,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata=settings)
