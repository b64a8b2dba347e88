"""Models whose weights are shards (FSDP2): whole tensors out of them and into them, and one process that writes for all.

A shard is a DTensor. Inside a forward of the module that ``fully_shard`` was given, its weights are whole. Outside of one they are
shards, or still whole between a forward and the backward pass.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether a tensor is spread over processes."""
    if not (distributed.is_available() and distributed.is_initialized()):  # no shard without a process group
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, without its graph; all of a shard's, for which every process has to ask."""
    values = tensor.detach()
    return values.full_tensor() if is_shard(values) else values


def call(module: nn.Module, x: Tensor, *others: object) -> Tensor:
    """``module(x, *others)``, which of a sharded model may also be asked outside a forward, without a gradient: its shards are gathered.

    ValueError for a shard that needs a gradient, which would be lost.
    """
    shards = {name: weight for name, weight in module.named_parameters() if is_shard(weight)}
    if not shards or any(map(_gathers_itself, module.modules())):
        return module(x, *others)
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in shards.values()):
        raise ValueError(
            "a sharded weight is used outside a forward of the model: compute what needs a gradient in `read` of "
            "model(tokens, read=...), or under torch.no_grad()"
        )
    return functional_call(module, {name: whole(weight).to(x.dtype) for name, weight in shards.items()}, (x, *others))


def _gathers_itself(module: nn.Module) -> "TypeGuard[FSDPModule]":
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


@torch.no_grad()
def fill(destination: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into a tensor or a shard, converting dtype and device. Every process holds the source."""
    if is_shard(destination):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = destination.device_mesh, destination.placements
        source = distribute_tensor(source.to(destination.device), mesh, placements, src_data_rank=None)
    destination.copy_(source)


def reshard(model: nn.Module) -> bool:
    """Whether the model is sharded. If so, all its weights are shards from here on: the root's stay whole after a forward, and would be
    old ones after an optimizer's step."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    parts = [module for module in model.modules() if _gathers_itself(module)]
    for module in parts:
        module.reshard()
    return bool(parts)


def shard(model: nn.Module, mesh: "DeviceMesh", dtype: torch.dtype) -> None:
    """Spread a model of blocks, ``model.layers``, over the processes of a mesh with one dimension, in place; each block is gathered when
    it is computed, in ``dtype``. Trained weights are kept, and their gradients summed, in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if dtype.itemsize < 4:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # rotary angles stay in fp32
    for module in (*model.get_submodule("layers").children(), model):
        for weight in module.parameters():
            if weight.requires_grad and not is_shard(weight) and weight.dtype.itemsize < 4:
                weight.data = weight.data.float()
        fully_shard(module, mesh=mesh, mp_policy=policy)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it the weights of a sharded model are whole in every process, and passes without a gradient ask no other process: each may
    make as many as it likes."""
    if not reshard(model):
        yield
        return
    parts = [module for module in model.modules() if _gathers_itself(module)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not parts[0], recurse=False)  # the root is used again at once
        reshard(model)


def refuse_unsharded_parameters(model: nn.Module) -> None:
    """ValueError if some trainable parameters are shards and others not: those would be trained apart in each process."""
    if not reshard(model):
        return
    apart = [name for name, weight in model.named_parameters() if weight.requires_grad and not is_shard(weight)]
    if apart:
        raise ValueError(
            f"{len(apart)} trainable parameters of a sharded model are not sharded, first: {apart[0]}; their gradients would differ "
            "between processes. Add adapters and thresholds first, then call fully_shard on each block and on the model"
        )


@contextmanager
def one_writer(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Whether this process is the one that writes for those that share the tensors; all wait for it, and fail where it fails."""
    mesh = next((tensor.device_mesh for tensor in tensors if is_shard(tensor)), None)
    if mesh is None:
        yield True
        return
    error: Exception | None = None
    try:
        place = mesh.get_coordinate()
        yield place is not None and not any(place)
    except Exception as raised:
        error = raised
    if _any_failed(mesh, error is not None) and error is None:
        error = OSError("the process that writes the checkpoint failed: its own message says why")
    if error is not None:
        raise error


def _any_failed(mesh: "DeviceMesh", failed: bool) -> bool:
    from torch.distributed.tensor import DTensor, Partial

    own = torch.tensor([float(failed)], device=mesh.device_type)
    return bool(DTensor.from_local(own, mesh, [Partial()] * mesh.ndim).full_tensor().item())
