"""Reading a checkpoint: a folder with config.json, safetensors and a tokenizer, in diffpo's own format or a published one."""

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffpo.device import choose_device
from diffpo.models.adapter_folder import Adapter, adapter_in, refuse_adapter
from diffpo.models.file_replacement import write_atomically
from diffpo.models.folder_files import find
from diffpo.models.formats import CONFIG, FORMATS, PublishedFormat, format_of, read_json
from diffpo.models.generation_config import GENERATION_CONFIG, generation_eos_ids
from diffpo.models.hub import download
from diffpo.models.model_config import ModelConfig
from diffpo.models.saving import save_checkpoint
from diffpo.models.stored_tensors import Stored, check_tensors, copy_tensors, stored_tensors, without_tied_head
from diffpo.models.threshold_file import THRESHOLD, add_threshold_fields, stored_threshold
from diffpo.models.tokenizer_files import PublishedFiles, read_tokenizer
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.models.weights import POLICY, weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "load",
    "open_checkpoint",
    "read_config",
    "read_weights",
    "save_checkpoint",
    "shipped_models",
    "write_atomically",
]

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
_CARRIED = (GENERATION_CONFIG, "*.py")  # auto_map in config.json names the *.py: kept for other tools, never run
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """Where a model was loaded from.

    name: as given to ``load``. revision: the commit on the hub; None for a folder or a shipped model. config: the content of
    config.json. files: what is saved back as it was.
    """

    name: str
    revision: str | None
    config: dict
    files: PublishedFiles


def shipped_models() -> list[str]:
    return sorted(folder.name for folder in SHIPPED.glob("*") if (folder / CONFIG).exists())


def load(
    name_or_path: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> MaskedDiffusionLM:
    """The model of a shipped name ("tiny-countdown"), a local folder, or a hub id ("GSAI-ML/LLaDA-8B-Instruct").

    What loads, from safetensors in one file or in shards:
      - diffpo's own checkpoints, among them the shipped ones;
      - LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5, and what is fine-tuned from them (model_type "llada");
      - Dream-v0-Base-7B, Dream-v0-Instruct-7B, Dream-Coder and DiffuCoder (model_type "Dream");
      - folders of plain LoRA, as peft saves them, for one of these: merged into their base, which they name.
    Not yet: mixtures of experts (LLaDA-MoE, LLaDA2), block-causal models (SDAR, Fast-dLLM-v2), quantised weights. Never:
    pickle files and remote code (``auto_map`` is ignored: the network is diffpo's own).

    device, dtype: where and as what the weights are stored; device "auto" is a GPU where there is one, as in the commands; dtype None
    keeps that of the checkpoint's embedding. Tensors go one at a time into their final memory, so that no second copy of the model
    exists. revision: a branch, tag or commit, for
    hub ids. A hub id needs the network unless it is cached; HF_HUB_OFFLINE=1 forbids it.

    ``model.source`` records name and commit; ``model.save`` writes the format that was read, for other tools to load.

    Buffers that follow from the config (rotary tables) and a tied head stored twice are accepted; config keys without
    influence on the network are ignored. The folder may be anybody's: only regular files in it are read, within bounds, and the
    tokenizer is tried in a process of its own first.

    Raises, before memory is allocated: FileNotFoundError for an unknown name or a missing file or shard; ValueError for a
    model that is not supported, a config key that cannot be honoured, a missing, unexpected or misshapen tensor, another adapter, a
    damaged file, a link out of the folder, a tokenizer with more tokens or another mask id than the model, or a device or
    dtype that cannot be used.
    """
    device, dtype = _device(device), _dtype(dtype)
    if torch.device(device).type == "meta":
        raise ValueError("device: a model on the meta device has no weights: give a device with memory")
    return open_checkpoint(name_or_path, revision).load(device, dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been looked through and of which no weight has been read.

    folder, commit: as of ``resolve``. base: that of the model that an adapter is for, where the folder holds one, else None. model: on the meta device, in the dtype of the stored embedding, with tokenizer and source; its
    shapes are all that it has, until ``load`` gives it memory.
    """

    folder: Path
    commit: str | None
    model: MaskedDiffusionLM
    stored: Stored
    base: "Checkpoint | None" = None
    adapter: Adapter | None = None

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> MaskedDiffusionLM:
        """The model with its weights, as ``load`` says. ValueError for one that the machine's memory cannot hold."""
        dtype = dtype or self.model.dtype
        _refuse_too_large(self.model, device, dtype)
        _allocate(self.model, device, dtype)
        copy_tensors(self.stored, weights(self.model))
        if self.adapter is not None:
            self.adapter.merge_into(self.model)
        return self.model.eval()


def open_checkpoint(
    name_or_path: str | os.PathLike, revision: str | None = None, cached_only: bool = False
) -> Checkpoint:
    """What ``load`` would load, checked as it says, but for device and dtype, and read up to the weights. cached_only: of the hub, only
    what is on this machine."""
    folder, commit = resolve(name_or_path, revision, cached_only)
    adapter = adapter_in(folder)
    if adapter is not None:
        return _with_adapter(os.fspath(name_or_path), commit, adapter, cached_only)
    fields, config = _read_config(folder)
    known = FORMATS[config.model_type]
    stored = _stored(config, folder)
    tokenizer = read_tokenizer(folder, config, known.mask_token)
    files = PublishedFiles.read(folder, tokenizer, _CARRIED if isinstance(known, PublishedFormat) else _CARRIED[:1])
    model = _without_memory(config, tokenizer).to(stored["embed_tokens.weight"].dtype)
    model.generation_eos_ids = generation_eos_ids(folder, config.vocab_size)
    model.source = Source(os.fspath(name_or_path), commit, fields, files)
    return Checkpoint(folder, commit, model, stored)


def _with_adapter(name: str, commit: str | None, adapter: Adapter, cached_only: bool) -> Checkpoint:
    """The base of an adapter, with the threshold that lies beside the adapter."""
    folder = adapter.folder
    if not adapter.base:
        raise ValueError(
            f"{folder} holds an adapter that names no base model: write its folder or hub id into adapter_config.json as base_model_name_or_path"
        )
    try:
        if adapter_in(resolve(adapter.base, adapter.revision, cached_only)[0]) is not None:
            raise ValueError(
                f"{folder}: the base of the adapter, {adapter.base}, is an adapter itself: merge that one first"
            )
        base = open_checkpoint(adapter.base, adapter.revision, cached_only)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds an adapter, and its base is not there ({error}): put it there, or name another place as "
            "base_model_name_or_path in adapter_config.json"
        ) from error
    config = add_threshold_fields(base.model.config, folder)
    model, stored = base.model, base.stored
    if find(folder, THRESHOLD) is not None:
        model = _without_memory(config, base.model.tokenizer).to(base.model.dtype)
        kept = {name: tensor for name, tensor in stored.items() if not name.startswith(POLICY)}
        stored = kept | {POLICY + name: tensor for name, tensor in stored_threshold(config, folder).items()}
    adapter.pairs(model)
    assert base.model.source is not None
    model.generation_eos_ids = base.model.generation_eos_ids
    model.source = replace(base.model.source, name=name, revision=commit)
    return Checkpoint(folder, commit, model, stored, base, adapter)


def read_config(folder: Path) -> ModelConfig:
    """The config of a checkpoint folder of any format, a learned threshold included."""
    return _read_config(folder)[1]


def read_weights(model: MaskedDiffusionLM, folder: Path) -> None:
    """Fill the model's tensors, shards too, in place, from a folder in the model's format; whatever does not fit is an error."""
    copy_tensors(_stored(model.config, folder), weights(model))


def resolve(
    name_or_path: str | os.PathLike, revision: str | None = None, cached_only: bool = False
) -> tuple[Path, str | None]:
    """The local folder of a path, a shipped name or a hub id, and the commit of the last one."""
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(f"a model is a shipped name, a folder or a hub id, got {type(name_or_path).__name__}")
    name = os.fspath(name_or_path)
    local = Path(name) if os.path.isdir(name) else SHIPPED / name if name in shipped_models() else None
    if local is not None:
        if revision is not None:
            raise ValueError(f"revision {revision!r}: {name} is a local folder; only a hub id has revisions")
        return local, None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return download(name, revision, cached_only)
    near = difflib.get_close_matches(name, shipped_models(), n=3, cutoff=0.0)
    raise FileNotFoundError(
        f"model {name!r} is neither a folder nor a shipped model; did you mean {', '.join(near) or 'a path'}? "
        "(a hub id is written owner/name)"
    )


def _read_config(folder: Path) -> tuple[dict, ModelConfig]:
    refuse_adapter(folder)
    path = folder / CONFIG
    inner = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))[:5])
    instead = f"; its folders that do are {inner}" if inner else ""
    if find(folder, CONFIG) is None:
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: not a checkpoint folder{instead}")
    fields = read_json(path)
    if instead and "model_type" not in fields:  # the folder of a run
        raise ValueError(f"{folder} holds no model: its {CONFIG} names no model_type{instead}")
    if find(folder, GENERATION_CONFIG) is not None:
        read_json(folder / GENERATION_CONFIG)
    known = format_of(fields, path)
    config = known.config(fields, path)
    return fields, add_threshold_fields(config, folder) if isinstance(known, PublishedFormat) else config


def _stored(config: ModelConfig, folder: Path) -> Stored:
    """Where every tensor of the model lies in the folder's files, by its name in the model: the tensors fit the config."""
    known = FORMATS[config.model_type]
    separate = isinstance(known, PublishedFormat) and config.threshold_gammas is not None

    def fitting(stored: Stored) -> Stored:
        if config.tie_word_embeddings:
            embedding, head = known.tensor_name("embed_tokens.weight"), known.tensor_name("lm_head.weight")
            stored = without_tied_head(stored, embedding, head, folder)
        shapes = _shapes(config, len(stored), folder)
        kept = [name for name in shapes if not (separate and name.startswith(POLICY))]
        check_tensors(stored, {known.tensor_name(name): shapes[name] for name in kept}, folder)
        return {name: stored[known.tensor_name(name)] for name in kept}

    stored = stored_tensors(folder, fitting)
    if separate:
        stored |= {POLICY + name: tensor for name, tensor in stored_threshold(config, folder).items()}
    return stored


def _shapes(config: ModelConfig, most_layers: int, folder: Path) -> dict[str, torch.Size]:
    """The shapes of the model's tensors, from a model of one layer: a config may claim more layers than can be built."""
    layers = config.num_hidden_layers
    if layers > most_layers:
        raise ValueError(f"{folder}: the config asks for {layers} layers, the files hold {most_layers} tensors")
    single = _without_memory(config.model_copy(update={"num_hidden_layers": 1}))
    shapes: dict[str, torch.Size] = {}
    for name, tensor in weights(single).items():
        repeated = range(layers) if name.startswith("layers.0.") else [0]
        shapes |= {name.replace("layers.0.", f"layers.{layer}.", 1): tensor.shape for layer in repeated}
    return shapes


def _without_memory(config: ModelConfig, tokenizer: "PreTrainedTokenizerBase | None" = None) -> MaskedDiffusionLM:
    with torch.device("meta"), _NothingDrawn():
        return MaskedDiffusionLM(config, tokenizer)


class _NothingDrawn(TorchFunctionMode):
    """Initial values are not drawn: on the meta device a draw imports torch._dynamo, which takes as long as torch, and then half a load."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        drawing = func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
        return kwargs["tensor"] if drawing else func(*args, **kwargs)


def _refuse_too_large(model: MaskedDiffusionLM, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError for a model that the machine's memory cannot hold, instead of the system ending the process."""
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"the model needs {needed / 1e9:.0f} GB as {dtype}, the machine has {there / 1e9:.0f} GB of memory"
        )


def _allocate(model: MaskedDiffusionLM, device: torch.device, dtype: torch.dtype) -> None:
    """Memory, uninitialised, for the parameters of a model on the meta device; a parameter used twice stays one.

    A threshold's are fp32 at least: it is small, and what it was trained as.
    """
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    of_threshold = set(model.threshold.parameters()) if model.threshold is not None else set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in allocated:
                kept_as = torch.promote_types(dtype, torch.float32) if parameter in of_threshold else dtype
                allocated[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=kept_as, device=device))
            setattr(module, name, allocated[parameter])
    if model.threshold is not None:  # bins stay in fp32: 0.001 nats is not a bf16 number
        model.threshold.gammas = torch.tensor(model.config.threshold_gammas, dtype=torch.float32, device=device)
    unset = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not unset, f"buffers without values: {unset}"


def _device(device: str | torch.device) -> torch.device:
    device = choose_device("auto") if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported, only {', '.join(str(known) for known in _DTYPES)}")
    return chosen
