"""Writing a checkpoint folder: config.json, safetensors and a tokenizer, in diffpo's own format or a published one."""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpo.models.adapters import without_wrapper
from diffpo.models.file_replacement import disk_faults, replace_files
from diffpo.models.formats import CONFIG, FORMATS, PublishedFormat
from diffpo.models.sharding import one_writer, reshard
from diffpo.models.stored_tensors import INDEX, SHARDS, WEIGHTS
from diffpo.models.threshold_file import THRESHOLD, write_threshold
from diffpo.models.tokenizer_files import TOKENIZER_FILES
from diffpo.models.weights import POLICY, whole_weights

if TYPE_CHECKING:
    from diffpo.models.transformer import MaskedDiffusionLM

SHARD_BYTES = 5 * 10**9  # as transformers writes them


def save_checkpoint(model: "MaskedDiffusionLM", folder: str | os.PathLike, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the checkpoint in the format of ``model.config.model_type``, in shards if it is larger than ``shard_bytes``.

    model: a MaskedDiffusionLM, or one in a peft.PeftModel. Weights are written in the dtype that it computes in. Active adapters are merged into the weights that are written (those of disabled
    ones are not), the model's own stay. Of a sharded model every process calls this, one writes, and all return when it has.

    Everything is written aside first and then renamed; an error on the way restores the old checkpoint. (A kill within the
    microseconds between two renames can leave new weights beside the old config.)
    ValueError, with nothing written, for weights that are not finite, adapters that cannot be merged, and a folder without a name. OSError
    when the disk cannot take it, also in the other processes.
    """
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"folder must be a path, got {type(folder).__name__}")
    if not os.fspath(folder):
        raise ValueError("folder: the name is empty; give the folder to save into")
    model, folder = without_wrapper(model), Path(folder)
    reshard(model)
    with one_writer(model.parameters()) as writes:
        tensors = whole_weights(model, writes)
        if writes:
            write_checkpoint(model, tensors, folder, shard_bytes, model.dtype)


def write_checkpoint(
    model: "MaskedDiffusionLM",
    tensors: dict[str, Tensor],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """As ``save_checkpoint``, in one process: ``tensors`` are the model's ``whole_weights``. dtype: that they are written in, but for a
    threshold's; None: as they are."""
    damaged = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise ValueError(f"weights that are not finite are not saved: {', '.join(damaged[:8])}")
    fields = _config_fields(model, dtype or tensors["embed_tokens.weight"].dtype)
    if folder.is_file():
        raise FileExistsError(f"folder: {folder} is a file; give the folder to save into")
    folder.mkdir(parents=True, exist_ok=True)
    with disk_faults(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        new, old = Path(staging, "new"), Path(staging, "old")
        new.mkdir()
        old.mkdir()
        _write_weights(model, tensors, new, shard_bytes, dtype)
        _write_published_files(model, new)
        (new / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        replace_files(new, folder, old, stale=_checkpoint_files(folder), last=CONFIG)


def _config_fields(model: "MaskedDiffusionLM", dtype: torch.dtype) -> dict:
    if model.config.model_type not in FORMATS:
        raise ValueError(f"model_type {model.config.model_type!r} is not supported; supported: {', '.join(FORMATS)}")
    fields = FORMATS[model.config.model_type].fields(model.config, model.source.config if model.source else None)
    stored = str(dtype).removeprefix("torch.")
    return fields | {key: stored for key in ("torch_dtype", "dtype") if key in fields}


def _write_weights(
    model: "MaskedDiffusionLM", tensors: dict[str, Tensor], folder: Path, shard_bytes: int, dtype: torch.dtype | None
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    known = FORMATS[model.config.model_type]
    separate = isinstance(known, PublishedFormat)
    policy = {name: tensor for name, tensor in tensors.items() if separate and name.startswith(POLICY)}
    tensors = {known.tensor_name(name): tensor for name, tensor in tensors.items() if name not in policy}
    dtypes = {name: t.dtype if dtype is None or name.startswith(POLICY) else dtype for name, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name].to(dtypes[name]).cpu().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        plan.metadata["total_size"] = sum(t.numel() * dtypes[name].itemsize for name, t in tensors.items())
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if policy:
        own = {name.removeprefix(POLICY): tensor for name, tensor in policy.items()}
        write_threshold(own, model.config, folder / THRESHOLD)


def _write_published_files(model: "MaskedDiffusionLM", folder: Path) -> None:
    files = model.source.files if model.source else None
    if files is not None and files.describe(model.tokenizer):
        carried = files.tokenizer | files.others
    else:
        carried = files.others if files else {}
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    for name, content in carried.items():
        (folder / name).write_bytes(content)


def _checkpoint_files(folder: Path) -> list[str]:
    """The files of the checkpoint in a folder, whatever wrote it."""
    shards = [path.name for path in folder.glob(SHARDS)]
    return [name for name in (*TOKENIZER_FILES, WEIGHTS, INDEX, THRESHOLD, *shards) if (folder / name).exists()]
