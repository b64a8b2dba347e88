"""The learned threshold of a published model: a file of its own, so that other tools load the folder as before.

Safetensors content. The ending is another one because tools read every *.safetensors of a folder.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffpo.models.threshold import ThresholdPolicy
from diffpo.models.transformer import ModelConfig

THRESHOLD = "diffpo_threshold.st"


def add_threshold_fields(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the bins and the proxy of the folder's threshold file, or as it was when there is none."""
    path = folder / THRESHOLD
    if not path.exists():
        return config
    try:
        with safe_open(path, framework="pt") as file:
            settings = file.metadata() or {}
        fields = {"threshold_gammas": json.loads(settings["gammas"]), "threshold_proxy": settings["proxy"]}
        return ModelConfig(**config.model_dump() | fields)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable threshold file: {error!r}") from error


@torch.no_grad()
def read_threshold(threshold: ThresholdPolicy, folder: Path) -> None:
    """Fill the policy from the folder's threshold file; ValueError if it does not fit."""
    path = folder / THRESHOLD
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {THRESHOLD}, the model has a learned threshold")
    expected = threshold.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable threshold file: {error}") from error
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in expected.items()}:
        raise ValueError(f"{path} holds another threshold: {[(n, list(t.shape)) for n, t in tensors.items()]}")
    for name, tensor in tensors.items():
        expected[name].copy_(tensor)


def write_threshold(threshold: ThresholdPolicy, config: ModelConfig, path: Path) -> None:
    settings = {"gammas": json.dumps(config.threshold_gammas), "proxy": config.threshold_proxy}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in threshold.state_dict().items()}
    save_file(tensors, path, metadata=settings)
