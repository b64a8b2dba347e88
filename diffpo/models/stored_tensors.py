"""Safetensors on disk, in one file or in shards with an index: what they hold, checked before anything is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffpo.models.formats import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAPPED_BYTES = 256 * 2**20  # pages of a mapped file stay resident until it is closed


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: torch.Size
    dtype: torch.dtype


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by its stored name, from the files' headers alone.

    FileNotFoundError: no safetensors weights, or a missing shard. ValueError: a damaged file or index, or a tensor that is
    not floating point.
    """
    if (folder / WEIGHTS).exists():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise FileNotFoundError(_no_weights(folder))
    location = _weight_map(folder / INDEX)
    shards = sorted(set(location.values()))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of its {len(shards)} shards: {', '.join(missing)}")
    found = {}
    for shard in shards:
        tensors, expected = _header(folder / shard), {name for name, file in location.items() if file == shard}
        if expected != set(tensors):
            raise ValueError(
                f"{folder / shard} does not hold what {INDEX} says: missing tensors {_some(expected - set(tensors))}, "
                f"unexpected tensors {_some(set(tensors) - expected)}"
            )
        found |= tensors
    return found


def check_tensors(stored: Mapping[str, StoredTensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    """ValueError unless the stored tensors are the expected ones, name for name and shape for shape."""
    missing, unexpected = set(expected) - set(stored), set(stored) - set(expected)
    if missing or unexpected:
        raise ValueError(f"{folder}: missing tensors {_some(missing)}, unexpected tensors {_some(unexpected)}")
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise ValueError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, "
                f"the config needs {list(tensor.shape)}"
            )


@torch.no_grad()
def copy_tensors(stored: Mapping[str, StoredTensor], destinations: Mapping[str, Tensor]) -> None:
    """Fill the destinations, one tensor at a time, converting to their dtype and device."""
    for file, names in _portions(stored, destinations):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    destinations[name].copy_(tensors.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def _portions(stored: Mapping[str, StoredTensor], names: Mapping[str, Tensor]) -> Iterator[tuple[Path, list[str]]]:
    """Runs of names of one file whose bytes stay below a bound (a larger tensor comes alone)."""
    portion, size = [], 0
    for name in sorted(names, key=lambda name: (stored[name].file, name)):
        entry = stored[name]
        bytes_ = entry.shape.numel() * entry.dtype.itemsize
        if portion and (entry.file != stored[portion[0]].file or size + bytes_ > _MAPPED_BYTES):
            yield stored[portion[0]].file, portion
            portion, size = [], 0
        portion.append(name)
        size += bytes_
    if portion:
        yield stored[portion[0]].file, portion


def _header(path: Path) -> dict[str, StoredTensor]:
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                if entry.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{path}: tensor {name} has dtype {entry.get_dtype()}; supported: {', '.join(_DTYPES)} "
                        "(quantised checkpoints do not load)"
                    )
                found[name] = StoredTensor(path, torch.Size(entry.get_shape()), _DTYPES[entry.get_dtype()])
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): {error}") from error
    return found


def _weight_map(path: Path) -> dict[str, str]:
    location = read_json(path).get("weight_map")
    if not isinstance(location, dict) or not location:
        raise ValueError(f"{path} has no weight_map")
    for name, file in location.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: weight_map puts {name} into {file!r}, which is no safetensors file of this folder"
            )
    return location


def _no_weights(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if shards:
        return f"{folder} holds no {WEIGHTS} and lacks {INDEX}, the index of its {len(shards)} shards"
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt*") for path in folder.glob(pattern))
    refused = f"; pickle checkpoints ({', '.join(pickled)}) are refused, convert them to safetensors" if pickled else ""
    return f"{folder} holds no {WEIGHTS}{refused}"


def _some(names: set[str]) -> list[str]:
    return sorted(names)[:5]
