"""Checkpoints of a run: whole or absent, finite, newest first, bitwise resumable. Safetensors and JSON only.

A checkpoint is a model folder with optimizer.safetensors, state.json and, written last, manifest.json with the SHA-256 of every file.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffpo.models.checkpoints import read_config, read_weights
from diffpo.models.file_replacement import write_atomically
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.runs.run_files import names_of_model

KEPT = 2  # checkpoints; an older one survives a fault in the newest
OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"


class NotFiniteError(FloatingPointError):
    """A weight or a value of the optimizer is NaN or infinite."""


def save_state(folder: Path, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write ``folder``/<update> under a temporary name and rename it, then drop all but the newest checkpoints: what was saved there,
    and nothing else.

    state: JSON values, among them "update", the number of finished updates. NotFiniteError before anything is written; OSError when it
    cannot be, with the older checkpoints as they were.
    """
    tensors = _optimizer_tensors(model, optimizer)
    check_finite(model, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"{state['update']:06d}", folder / f".{state['update']:06d}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save(temporary)
        write_atomically(temporary / OPTIMIZER, lambda path: save_file(tensors, path))
        _write_json(temporary / STATE, state)
        _write_json(temporary / MANIFEST, {path.name: _digest(path) for path in sorted(temporary.iterdir())})
        if target.is_dir():  # damaged, or it would have been resumed from
            _remove(target, [*_listed(target), *names_of_model(target)])
            if target.exists():
                raise OSError(f"{target} holds what no run wrote: move it away")
        os.replace(temporary, target)
    except SafetensorError as error:  # its own type for a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in [path for path in checkpoints(folder) if _listed(path)][KEPT:]:
        _remove(old, _listed(old))


def _remove(checkpoint: Path, names: Iterable[str]) -> None:
    """Delete these files, the manifest last, and the folder unless somebody else put anything into it."""
    with contextlib.suppress(OSError):
        for name in [*(set(names) - {MANIFEST}), MANIFEST]:
            (checkpoint / name).unlink(missing_ok=True)
        checkpoint.rmdir()


def _listed(checkpoint: Path) -> list[str]:
    """The files that its manifest names; none if it cannot be read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return [name for name in manifest if Path(name).name == name]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def check_finite(model: MaskedDiffusionLM, others: dict[str, torch.Tensor] | None = None) -> None:
    """NotFiniteError, with its name, for a tensor of the model or of ``others`` that holds NaN or an infinity."""
    for name, tensor in [*model.named_parameters(), *(others or {}).items()]:
        if not torch.isfinite(tensor).all():
            raise NotFiniteError(f"{name} is not finite, so it is not saved")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; half-written ones carry another name and do not count."""
    found = (path for path in folder.glob("*") if re.fullmatch("[0-9]{6,}", path.name))
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=lambda p: int(p.name), reverse=True)


@dataclass(frozen=True)
class Saved:
    """An undamaged checkpoint that fits the model. state: as given to ``save_state``."""

    path: Path
    state: dict


def load_state(folder: Path, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore the ``newest`` checkpoint and return its state, or None if there is none at all."""
    saved = newest(folder, model)
    return None if saved is None else restore(saved, model, optimizer)


def newest(folder: Path, model: MaskedDiffusionLM) -> Saved | None:
    """The newest undamaged checkpoint, or None if there is none at all. Damaged ones are skipped with a warning.

    ValueError if there are only such, or if it is of another model. Nothing is changed.
    """
    for path in checkpoints(folder):
        try:
            _check_digests(path)
            state = json.loads((path / STATE).read_text())
            if state["update"] != int(path.name):
                raise ValueError(f"{STATE} is of update {state['update']}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"checkpoint {path} is not readable and was skipped: {error}", stacklevel=2)
            continue
        stored = read_config(path)
        if stored != model.config:
            raise ValueError(f"resume: {path} is of another model, {stored}, now {model.config}")
        return Saved(path, state)
    if checkpoints(folder):
        raise ValueError(f"none of the checkpoints in {folder} is readable; --overwrite starts again")
    return None


def restore(saved: Saved, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer) -> dict:
    """Fill the model and the optimizer, in place, and return the state."""
    tensors = load_file(saved.path / OPTIMIZER)
    read_weights(model, saved.path)
    _restore_optimizer(model, optimizer, tensors)
    return saved.state


def _check_digests(path: Path) -> None:
    """ValueError or OSError unless every file that was saved is there with the same bytes."""
    manifest = json.loads((path / MANIFEST).read_text())
    if not isinstance(manifest, dict) or not {OPTIMIZER, STATE, "config.json"} <= manifest.keys():
        raise ValueError(f"{MANIFEST} does not list its files")
    for name, digest in manifest.items():
        if Path(name).name != name or _digest(path / name) != digest:
            raise ValueError(f"{name} is not what was saved")


def _digest(path: Path) -> str:
    """SHA-256 of a file; a link is not followed."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path.name} is no file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, allow_nan=False)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


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
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameters[parameter]][key] = tensor if key == "step" else tensor.to(model.device)
