"""Checkpoints of a run: complete or absent, newest first, bitwise resumable. Safetensors and JSON only."""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffpo.models.checkpoints import read_weights
from diffpo.models.transformer import MaskedDiffusionLM

KEPT = 2  # checkpoints; an older one survives a fault in the newest


def save_state(folder: Path, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write ``folder``/<update> under a temporary name and rename it, then drop all but the newest checkpoints.

    state: JSON values, among them "update", the number of finished updates. OSError is left to the caller.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"{state['update']:06d}", folder / f".{state['update']:06d}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save(temporary)
        save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(folder)[KEPT:]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; half-written ones carry another name and do not count."""
    return sorted((path for path in folder.glob("[0-9]*") if path.is_dir()), reverse=True)


def load_state(folder: Path, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore the newest readable checkpoint and return its state, or None if there is none at all.

    Unreadable ones are skipped with a warning; ValueError if there are some but none can be read.
    """
    for path in checkpoints(folder):
        try:
            tensors = load_file(path / "optimizer.safetensors")
            state = json.loads((path / "state.json").read_text())
            read_weights(model, path)
        except (OSError, ValueError, SafetensorError) as error:
            warnings.warn(f"checkpoint {path} is not readable and was skipped: {error}", stacklevel=2)
            continue
        _restore_optimizer(model, optimizer, tensors)
        return state
    if checkpoints(folder):
        raise ValueError(f"none of the checkpoints in {folder} is readable; --overwrite starts again")
    return None


def _optimizer_tensors(model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every optimizer value as a tensor named <parameter>/<value>."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer, tensors: dict) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        if parameter not in parameters:
            raise ValueError(
                f"the checkpoint has optimizer state of {parameter}, which this model lacks: was the mode changed?"
            )
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameters[parameter]][key] = tensor if key == "step" else tensor.to(model.device)
