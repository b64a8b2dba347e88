"""Safetensors on disk, in one file or in shards with an index: what they hold, checked before anything is read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffpo.models.folder_files import find, read_json, read_start, shown
from diffpo.models.sharding import fill
from diffpo.models.tensor_names import hint, is_derived

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAPPED_BYTES = 256 * 2**20  # pages of a mapped file stay resident until it is closed
_HEADER_BYTES = 8 * 2**20  # that of an 8B model takes 40 kB
_COMPARED_BYTES = 32 * 2**20
_PICKLES = ("*.bin", "*.pt*", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, under the name it has there."""

    file: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype


Stored = dict[str, StoredTensor]


def stored_tensors(folder: Path, fitting: Callable[[Stored], Stored]) -> Stored:
    """``fitting(tensors)`` of a folder's tensors by their stored names, from the files' headers alone; buffers that a model
    computes anew are left out.

    ``fitting`` raises ValueError for tensors that are not those of the model. A folder may hold one file and shards, one of
    them from an earlier save: the set that fits is taken.

    FileNotFoundError: no safetensors weights, or a missing shard. ValueError: a damaged file or index, tensors that do not fit
    or are not floating point, or two sets that both fit.
    """
    found = {name: read for name, read in ((WEIGHTS, _one_file), (INDEX, _shards)) if find(folder, name)}
    if not found:
        raise FileNotFoundError(_no_weights(folder))
    sets: dict[str, Stored] = {}
    faults: dict[str, Exception] = {}
    for name, read in found.items():
        try:
            sets[name] = fitting(read(folder))
        except (ValueError, FileNotFoundError) as error:
            faults[name] = error
    if sets and all(stored == next(iter(sets.values())) for stored in sets.values()):  # an index may name the one file
        return next(iter(sets.values()))
    if sets:
        raise ValueError(f"{folder} holds two sets of weights, {WEIGHTS} and the shards of {INDEX}; remove one of them")
    if len(faults) == 1:
        raise _with_other_weights(next(iter(faults.values())), folder)
    raise ValueError(f"{folder} holds two sets of weights, and neither fits: {faults[WEIGHTS]}; {faults[INDEX]}")


def check_tensors(stored: Mapping[str, StoredTensor], expected: Mapping[str, torch.Size], folder: Path) -> None:
    """ValueError unless the stored tensors are the expected ones, name for name and shape for shape."""
    missing, unexpected = set(expected) - set(stored), set(stored) - set(expected)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: missing tensors {_some(missing)}, unexpected tensors {_some(unexpected)}{hint(missing, unexpected)}"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, the config needs {list(shape)}"
            )


def without_tied_head(stored: Stored, embedding: str, head: str, folder: Path) -> Stored:
    """The tensors of a model whose head is its embedding, when files may hold both, equal, or the head's name alone.

    ValueError, naming both: two that differ.
    """
    if head not in stored:
        return stored
    others = {name: tensor for name, tensor in stored.items() if name != head}
    if embedding not in stored:
        return others | {embedding: stored[head]}
    if not _equal(stored[embedding], stored[head]):
        raise ValueError(
            f"{folder}: the config ties {head} to {embedding}, but the files hold two that differ; set tie_word_embeddings "
            "(weight_tying in LLaDA) to false in config.json if the model was trained untied, or remove the one that is stale"
        )
    return others


def copy_tensors(stored: Mapping[str, StoredTensor], destinations: Mapping[str, Tensor]) -> None:
    """Fill the destinations, one tensor at a time, converting to their dtype and device."""
    for file, names in _portions(stored, destinations):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    fill(destinations[name], tensors.get_tensor(stored[name].name))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def read_headers(path: Path) -> Stored:
    """The tensors of a safetensors file, a regular file that exists; ValueError if it is damaged or holds other dtypes."""
    _refuse_header_size(path)
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                if is_derived(name, entry.get_shape()):
                    continue
                if entry.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{path}: tensor {shown(name)[1:-1]} has dtype {entry.get_dtype()}; supported: {', '.join(_DTYPES)} "
                        "(quantised checkpoints do not load)"
                    )
                found[name] = StoredTensor(path, name, torch.Size(entry.get_shape()), _DTYPES[entry.get_dtype()])
    except (SafetensorError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): {error}") from error
    return found


def _refuse_header_size(path: Path) -> None:
    """Before the library is asked: its own bound of 100 MB of JSON takes a multiple of that to parse."""
    size, start = path.stat().st_size, read_start(path, 8)
    length = int.from_bytes(start, "little")
    if size == 0:
        raise ValueError(f"{path} is not a readable safetensors file: it is empty")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"{path} is not a readable safetensors file: it is truncated, or no safetensors file at all")
    if length > _HEADER_BYTES:
        raise ValueError(
            f"{path} is not a readable safetensors file: a header of {length} bytes, at most {_HEADER_BYTES} are read"
        )


def _portions(stored: Mapping[str, StoredTensor], names: Mapping[str, Tensor]) -> Iterator[tuple[Path, list[str]]]:
    """Runs of names of one file whose bytes stay below a bound (a larger tensor comes alone)."""
    portion: list[str] = []
    size = 0
    for name in sorted(names, key=lambda name: (stored[name].file, name)):
        entry = stored[name]
        bytes_ = _bytes(entry)
        if portion and (entry.file != stored[portion[0]].file or size + bytes_ > _MAPPED_BYTES):
            yield stored[portion[0]].file, portion
            portion, size = [], 0
        portion.append(name)
        size += bytes_
    if portion:
        yield stored[portion[0]].file, portion


def _bytes(entry: StoredTensor) -> int:
    return entry.shape.numel() * entry.dtype.itemsize


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers, compared some rows at a time."""
    if a.shape != b.shape or not a.shape:
        return False
    rows = a.shape[0]
    step = max(1, rows * _COMPARED_BYTES // max(_bytes(a), 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        with safe_open(a.file, framework="pt") as first, safe_open(b.file, framework="pt") as second:
            one, other = first.get_slice(a.name)[part], second.get_slice(b.name)[part]
        if not torch.equal(one, other.to(one.dtype)):
            return False
    return True


def _one_file(folder: Path) -> Stored:
    return read_headers(folder / WEIGHTS)


def _shards(folder: Path) -> Stored:
    """The tensors of all shards, each where the index says."""
    contents: dict[str, set[str]] = {}
    for name, shard in _weight_map(folder / INDEX).items():
        contents.setdefault(shard, set()).add(name)
    missing = [shard for shard in sorted(contents) if find(folder, shard) is None]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of its {len(contents)} shards: {', '.join(missing[:5])}"
        )
    found: Stored = {}
    for shard, expected in sorted(contents.items()):
        tensors = read_headers(folder / shard)
        lost = {name for name in expected - set(tensors) if not is_derived(name)}
        if lost or set(tensors) - expected:
            raise ValueError(
                f"{folder / shard} does not hold what {INDEX} says: missing tensors {_some(lost)}, "
                f"unexpected tensors {_some(set(tensors) - expected)}"
            )
        found |= tensors
    return found


def _weight_map(path: Path) -> dict[str, str]:
    location = read_json(path).get("weight_map")
    if not isinstance(location, dict) or not location:
        raise ValueError(f"{path} has no weight_map")
    for name, file in location.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise ValueError(
                f"{path}: weight_map puts {shown(name)} into {shown(file)}, which is no safetensors file of this folder"
            )
    return location


def _is_file_name(name: str) -> bool:
    plain = Path(name).name == name and name.isprintable() and len(name.encode()) <= 255
    return plain and name.endswith(".safetensors")


def _with_other_weights(fault: Exception, folder: Path) -> Exception:
    """The fault of the only set of weights, and that there are shards which no index names."""
    unnamed = sorted(path.name for path in folder.glob(SHARDS))
    if unnamed and find(folder, INDEX) is None:
        return type(fault)(f"{fault}; the folder also holds {len(unnamed)} shards, but not their index {INDEX}")
    return fault


def _no_weights(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob(SHARDS))
    if shards:
        return f"{folder} holds no {WEIGHTS} and lacks {INDEX}, the index of its {len(shards)} shards"
    pickled = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
    if pickled:
        return (
            f"{folder} holds no {WEIGHTS}; pickle checkpoints ({', '.join(pickled[:5])}) are refused, because reading one can "
            "run code: convert them to safetensors where you trust them, with transformers' save_pretrained or "
            f"safetensors.torch.save_file(torch.load(path, weights_only=True), '{WEIGHTS}')"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    renamed = f"; if {others[0]} holds the weights, rename it to {WEIGHTS}" if others else ""
    return f"{folder} holds no {WEIGHTS}{renamed}"


def _some(names: set[str]) -> list[str]:
    return [name if len(name) <= 200 else shown(name) for name in sorted(names)[:5]]
