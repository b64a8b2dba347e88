"""Checkpoints of a model that is spread over processes: each writes its own shards, while the training goes on.

<update>/shard-<process>-*.safetensors   the shards of the weights and the optimizer, by torch.distributed.checkpoint, with their offsets
<update>/sharded.json                    the model's configuration
<update>/state.json, manifest.json       as in ``checkpointing``

Any number of processes reads them. They become visible under their name when all is written.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, distributed

from diffpo.models.adapters import adapted_modules
from diffpo.models.model_config import ModelConfig
from diffpo.models.sharding import reshard
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.training.checkpoint_folder import completed, digest
from diffpo.training.distributed import World
from diffpo.training.finite import check_finite

SHARDED = "sharded.json"
_FILE_BYTES = 2 * 10**9  # of a shard's file: DCP makes each in memory
_OPTIMIZER = "optimizer/"
_STEP = "/step"

Tensors = dict[str, Tensor]


class ShardedSaver:
    """Saves in the background, one checkpoint at a time. All processes make one, and call it alike."""

    def __init__(self, world: World):
        self._world, self._apart = world, world.apart()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, folder: Path, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Begin to write ``folder``/<update>; the weights may change as soon as it returns. Waits for the one before.

        OSError if that one could not be written; the new one is begun all the same. NotFiniteError before anything is written.
        """
        failed: OSError | None = None
        try:
            self.finish()
        except OSError as error:
            failed = error
        tensors = tensors_of(model, optimizer)
        check_finite(tensors)
        self._pending = self._begin(folder, tensors, asdict(model.config), state)
        if failed is not None:
            raise failed

    def finish(self) -> None:
        """Wait until what was begun is written. OSError if it could not be, in all processes."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._world.agreed(pending.result)

    def _begin(self, folder: Path, tensors: Tensors, config: dict, state: dict) -> "Future[None]":
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        temporary = folder / f".{state['update']:06d}.partial"

        def make() -> None:
            if self._world.first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        self._world.agreed(make)
        writer = HuggingFaceStorageWriter(str(temporary), file_of_each(tensors), save_distributed=True)
        written = async_save(tensors, storage_writer=writer, process_group=self._apart.group)
        assert isinstance(written, Future)
        return self._thread.submit(self._complete, written, folder, temporary, config, state)

    def _complete(self, written: Future, folder: Path, temporary: Path, config: dict, state: dict) -> None:
        """In the background: what is left to do when the shards are written."""
        try:
            self._apart.agreed(lambda: _result(written))
            own = sorted(temporary.glob(f"shard-{self._world.rank + 1:05d}-*"))
            digests = self._apart.agreed(lambda: {path.name: digest(path) for path in own})
            manifest = {name: value for part in self._apart.gather_json(digests) for name, value in part.items()}

            def rename() -> None:
                if self._world.first:
                    completed(folder, temporary, {SHARDED: {"config": config}}, state, manifest)

            self._apart.agreed(rename)
        finally:
            if self._world.first:
                shutil.rmtree(temporary, ignore_errors=True)


def _result(written: Future) -> None:
    """OSError if a shard could not be written, here or in another process."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        written.result()
    except CheckpointException as error:  # which is no Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"process {rank}: {cause.strerror}", *filter(None, [cause.filename])) from None
        raise RuntimeError(f"process {rank}: {cause}") from cause


def tensors_of(model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer) -> Tensors:
    """What is saved, by name: the weights, with adapters those that are trained, and the optimizer's values."""
    reshard(model)
    tensors = {name: parameter.detach() for name, parameter in _saved_parameters(model)}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            value = torch.as_tensor(value)
            tensors[f"{_OPTIMIZER}{name}/{key}"] = value if value.dim() else value[None]  # safetensors cuts no scalar
    return tensors


def restore_shards(path: Path, model: MaskedDiffusionLM, optimizer: torch.optim.Optimizer) -> None:
    """Fill the model and the optimizer from a checkpoint, in place; ValueError, with nothing changed, if it is not of such a model."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reshard(model)
    reader = HuggingFaceStorageReader(str(path))
    parameters, stored = dict(model.named_parameters()), reader.read_metadata().state_dict_metadata
    tensors: Tensors = {name: parameter.detach() for name, parameter in _saved_parameters(model)}
    values = {name: name.removeprefix(_OPTIMIZER).rpartition("/") for name in stored if name.startswith(_OPTIMIZER)}
    if tensors.keys() != stored.keys() - values.keys() or not {of for of, _, _ in values.values()} <= parameters.keys():
        raise ValueError(f"resume: {path} is of a model with other adapters, or of one where others were trained")
    if any(tensor.shape != getattr(stored[name], "size", None) for name, tensor in tensors.items()):
        raise ValueError(f"resume: {path} is of a model with adapters of another rank")
    for name, (of, _, key) in values.items():
        tensors[name] = torch.zeros(1) if key == "step" else torch.empty_like(parameters[of].detach())
    load(tensors, storage_reader=reader, no_dist=not distributed.is_initialized())
    for name, (of, _, key) in values.items():
        optimizer.state[parameters[of]][key] = tensors[name][0] if key == "step" else tensors[name]


def stored_config(path: Path) -> ModelConfig:
    """The configuration of the model that a sharded checkpoint is of."""
    return ModelConfig(**json.loads((path / SHARDED).read_text())["config"])


def file_of_each(tensors: Tensors) -> dict[str, int]:
    """The number of the file, from 1 on, into which each process writes its shard of a tensor."""
    size = distributed.get_world_size()
    files, total = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + total // _FILE_BYTES
        total += -(-tensor.numel() // size) * tensor.element_size()
    return files


def _saved_parameters(model: MaskedDiffusionLM) -> Iterator[tuple[str, Tensor]]:
    adapted = bool(adapted_modules(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not adapted:
            yield name, parameter
