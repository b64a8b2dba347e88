"""Checkpoints of a run: whole or absent, finite, newest first, bitwise resumable. Safetensors and JSON only.

A checkpoint is a model folder with optimizer.safetensors, state.json and, written last, manifest.json with the SHA-256 of every file. Of a
model with LoRA alone it is the adapter's folder, without the base, which does not change and is known by its digest. That of a model with
other adapters, which its weights have merged, also holds what was trained as it was: trained.safetensors. Of a
model that is spread over processes there are others, see ``sharded_checkpoints``; `newest` and `restore` know both.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffpo.models.adapter_folder import ADAPTER_CONFIG, Adapter, adapter_in
from diffpo.models.adapter_saving import adapter_tensors, factors, is_an_adapter, write_adapter
from diffpo.models.adapters import adapted_modules
from diffpo.models.checkpoints import read_config, read_weights
from diffpo.models.file_replacement import write_atomically
from diffpo.models.saving import write_checkpoint
from diffpo.models.sharding import fill, one_writer, reshard, whole
from diffpo.models.stored_tensors import copy_tensors
from diffpo.models.threshold_file import add_threshold_fields, stored_threshold
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.models.weights import POLICY, whole_weights
from diffpo.runs.run_folder import differences
from diffpo.training.checkpoint_folder import MANIFEST, STATE, checkpoints, completed, digest
from diffpo.training.finite import NotFiniteError as NotFiniteError
from diffpo.training.finite import check_finite
from diffpo.training.sharded_checkpoints import SHARDED, restore_shards, stored_config

OPTIMIZER, TRAINED = "optimizer.safetensors", "trained.safetensors"

# the files of a checkpoint that one process writes, whole or an adapter alone, and of one that all write
_KINDS = ({STATE, OPTIMIZER, "config.json"}, {STATE, OPTIMIZER, ADAPTER_CONFIG}, {STATE, SHARDED})

Tensors = dict[str, torch.Tensor]


def save_state(folder: Path, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write ``folder``/<update> under a temporary name and rename it, then drop all but the newest checkpoints: what was saved there,
    and nothing else. Of a sharded model every process calls this, and one writes.

    state: JSON values, among them "update", the number of finished updates. NotFiniteError before anything is written; OSError when it
    cannot be, with the older checkpoints as they were.
    """
    reshard(model)
    alone = is_an_adapter(model)
    check_finite(_trained(model) if alone else dict(model.named_parameters()))
    check_finite(_optimizer_values(model, optimizer))
    with one_writer(model.parameters()) as writes:
        weights = adapter_tensors(model, writes) if alone else whole_weights(model, writes)
        own = {OPTIMIZER: _gathered(_optimizer_values(model, optimizer), writes)}
        if adapted_modules(model) and not alone:  # which the weights have merged
            own[TRAINED] = _gathered(_trained(model), writes)
        if writes:
            _write(folder, partial(write_adapter if alone else write_checkpoint, model, weights), own, state)


def _write(folder: Path, write_model: Callable[[Path], None], own: dict[str, Tensors], state: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{state['update']:06d}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_model(temporary)
        for name, tensors in own.items():
            write_atomically(temporary / name, partial(save_file, tensors))
        completed(folder, temporary, {}, state)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class Saved:
    """An undamaged checkpoint that fits the model. state: as given to ``save_state``."""

    path: Path
    state: dict


def newest(folder: Path, model: MaskedDiffusionLM, base: str | None = None) -> Saved | None:
    """The newest undamaged checkpoint, or None if there is none at all. Damaged ones are skipped with a warning.

    base: digest of the weights that the model was loaded from, to be compared with "base" in the state of an adapter's checkpoint.
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
        adapter = adapter_in(path) is not None
        # of a sharded model with adapters, these alone are there
        if (adapter or (_is_sharded(path) and adapted_modules(model))) and state.get("base", base) != base:
            raise ValueError(
                f"resume: {path} is an adapter for other weights, which --allow-config-change cannot change: give the model that it was "
                "trained on, or begin a new run"
            )
        if adapter:
            stored = add_threshold_fields(replace(model.config, threshold_gammas=None), path)
        else:
            stored = stored_config(path) if _is_sharded(path) else read_config(path)
        if stored != model.config:
            changes = "; ".join(differences(asdict(stored), asdict(model.config)))
            raise ValueError(
                f"resume: {path} is of another model, which --allow-config-change cannot change: {changes}; begin a new run"
            )
        return Saved(path, state)
    if checkpoints(folder):
        raise ValueError(f"none of the checkpoints in {folder} is readable; --overwrite starts again")
    return None


def restore(saved: Saved, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer) -> dict:
    """Fill the model and the optimizer, in place, and return the state. Of a sharded model every process calls this.

    With adapters, what is trained is filled, and the rest has to be as it was. ValueError, with nothing changed, for a model whose
    adapters, or optimizer whose parameters, are not those of the checkpoint.
    """
    if _is_sharded(saved.path):
        restore_shards(saved.path, model, optimizer)
        return saved.state
    reshard(model)
    tensors, parameters = load_file(saved.path / OPTIMIZER), dict(model.named_parameters())
    try:
        if not {name.rpartition("/")[0] for name in tensors} <= parameters.keys():
            raise OtherAdaptersError
        adapter = adapter_in(saved.path)
        if adapter is not None:
            _read_adapter(adapter, model)
        else:
            _read_model(saved.path, model)
    except OtherAdaptersError as error:
        raise ValueError(
            f"resume: {saved.path} is of a model with other adapters, or of one where others were trained"
        ) from error
    for name, tensor in tensors.items():
        of, _, key = name.rpartition("/")
        value = tensor
        if key != "step":  # which AdamW keeps on the CPU
            fill(value := torch.empty_like(parameters[of]), tensor)
        optimizer.state[parameters[of]][key] = value
    return saved.state


def _is_sharded(path: Path) -> bool:
    return (path / SHARDED).exists()


class OtherAdaptersError(ValueError):
    """A checkpoint's adapters are not those of the model."""


def _read_adapter(adapter: Adapter, model: MaskedDiffusionLM) -> None:
    if not is_an_adapter(model):
        raise OtherAdaptersError
    try:
        adapter.read_into(factors(model), model)
    except ValueError as error:
        raise OtherAdaptersError from error
    stored = stored_threshold(model.config, adapter.folder) if model.threshold is not None else {}
    copy_tensors(stored, {name: model.get_parameter(POLICY + name) for name in stored})


def _read_model(path: Path, model: MaskedDiffusionLM) -> None:
    """The weights, or, with adapters, what was trained: the rest has to be as it was."""
    stored = load_file(path / TRAINED) if (path / TRAINED).exists() else {}
    if _shapes(stored) != _shapes(_trained(model) if adapted_modules(model) else {}):
        raise OtherAdaptersError
    for name, tensor in stored.items():
        fill(model.get_parameter(name), tensor)
    if not stored:
        read_weights(model, path)


def _check_digests(path: Path) -> None:
    """ValueError or OSError unless every file that was saved is there with the same bytes."""
    manifest = json.loads((path / MANIFEST).read_text())
    known = isinstance(manifest, dict) and any(kind <= manifest.keys() for kind in _KINDS)
    if not known:
        raise ValueError(f"{MANIFEST} does not list its files")
    for name, expected in manifest.items():
        if Path(name).name != name or digest(path / name) != expected:
            raise ValueError(f"{name} is not what was saved")


def _trained(model: MaskedDiffusionLM) -> Tensors:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer_values(model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer) -> Tensors:
    """Every optimizer value as a tensor named <parameter>/<value>."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _gathered(tensors: Tensors, here: bool) -> Tensors:
    """The tensors on the CPU, shards whole, in the process that wants them ``here``; every process takes part."""
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu().contiguous() for name, tensor in gathered if here}
