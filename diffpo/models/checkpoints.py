"""Checkpoints: a folder with config.json, model.safetensors and a tokenizer. Safetensors only; no pickle, no remote code."""

import difflib
import json
import os
import tempfile
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffpo.models.transformer import MaskedDiffusionLM, ModelConfig

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def shipped_models() -> list[str]:
    return sorted(folder.name for folder in SHIPPED.glob("*") if (folder / CONFIG).exists())


def load(name_or_path: str | os.PathLike, device: str | torch.device = "cpu") -> MaskedDiffusionLM:
    """The model stored under a shipped name ("tiny-countdown"), in a local folder, or on the hub ("owner/name").

    Raises FileNotFoundError for an unknown name or missing file and ValueError for an unsupported model type, a field or
    tensor that does not fit, or a vocabulary that does not match the tokenizer. A hub id needs the network unless cached.
    """
    folder = resolve(name_or_path)
    config = read_config(folder)
    model = MaskedDiffusionLM(config)
    read_weights(model, folder)
    model.tokenizer = read_tokenizer(folder, config)
    return model.to(device).eval()


def resolve(name_or_path: str | os.PathLike) -> Path:
    """The local folder of a shipped name, a path or a hub id."""
    name = os.fspath(name_or_path)
    if Path(name).is_dir():
        return Path(name)
    if name in shipped_models():
        return SHIPPED / name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name)
    near = difflib.get_close_matches(name, shipped_models(), n=3, cutoff=0.0)
    raise FileNotFoundError(
        f"model {name!r} is neither a folder nor a shipped model; did you mean {', '.join(near) or 'a path'}? "
        "(a hub id is written owner/name)"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:
        raise FileNotFoundError(
            f"model {hub_id!r} is no local folder and could not be fetched from the hub: {error}"
        ) from error


def read_config(folder: Path) -> ModelConfig:
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: not a diffpo checkpoint folder")
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    if fields.get("model_type") != "diffpo":
        raise ValueError(f"{path}: model_type {fields.get('model_type')!r} is not supported; supported: 'diffpo'")
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(model: MaskedDiffusionLM, folder: Path) -> None:
    """Copy every tensor by name; a missing, unexpected or wrongly shaped tensor is an error and names itself."""
    path = folder / WEIGHTS
    if not path.exists():
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        hint = (
            f"; pickle checkpoints ({', '.join(pickled)}) are refused, convert them to safetensors" if pickled else ""
        )
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}{hint}")
    expected = stored_tensors(model)
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if found != set(expected):
                missing, unexpected = sorted(set(expected) - found), sorted(found - set(expected))
                raise ValueError(f"{path}: missing tensors {missing[:5]}, unexpected tensors {unexpected[:5]}")
            for name, parameter in expected.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{path}: tensor {name} has shape {list(tensor.shape)}, the config needs {list(parameter.shape)}"
                    )
                parameter.data.copy_(tensor)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def read_tokenizer(folder: Path, config: ModelConfig):
    """The folder's tokenizer, or None when it holds none."""
    if not (folder / "tokenizer.json").exists():
        return None
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {config.vocab_size}"
        )
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id != config.mask_token_id:
        raise ValueError(
            f"{folder}: the tokenizer's mask id is {tokenizer.mask_token_id}, the config's mask_token_id {config.mask_token_id}"
        )
    return tokenizer


def stored_tensors(model: MaskedDiffusionLM) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint holds, by name: all, except a head that is tied to the embedding."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return tensors


def save_checkpoint(model: MaskedDiffusionLM, folder: str | os.PathLike) -> None:
    """Write the checkpoint. Everything is written aside first and then renamed; an error on the way restores the old
    checkpoint. (A kill within the microseconds between two renames can leave new weights beside the old config.)"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored_tensors(model).items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        new, old = Path(staging, "new"), Path(staging, "old")
        new.mkdir(), old.mkdir()
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(new)
        (new / CONFIG).write_text(model.config.model_dump_json(indent=2) + "\n")
        _replace_files(new, folder, old)


def _replace_files(new: Path, folder: Path, backup: Path) -> None:
    """Move the files of ``new`` into ``folder``, config last, and drop a tokenizer that is not the new model's."""
    arriving = sorted((path.name for path in new.iterdir()), key=lambda name: (name == CONFIG, name))
    stale = [name for name in TOKENIZER_FILES if name not in arriving and (folder / name).exists()]
    for name in arriving:
        with open(new / name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(new / name, 0o644)
    for name in [*arriving, *stale]:
        if (folder / name).exists():
            os.link(folder / name, backup / name)
    try:
        for name in arriving:
            os.replace(new / name, folder / name)
        for name in stale:
            (folder / name).unlink()
    except BaseException:
        for name in arriving:
            if (backup / name).exists():
                os.rename(backup / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise


def write_atomically(target: Path, write) -> None:
    """Call ``write(path)`` on a temporary file beside ``target``, flush it to disk, then rename it over ``target``."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
