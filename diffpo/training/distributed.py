"""The processes of one training, as torchrun starts them, and what they say to each other. One process is the same code and says nothing.

All processes run the same program and come to the same points in the same order, whatever the data. At each point they first say whether all
is well: an error of one is raised in all, in the same place, so that none waits for one that has left.
"""

import json
import os
import socket
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from diffpo.device import choose_device
from diffpo.runs.faults import ProcessError, described, stopped
from diffpo.tasks.grading import TaskError
from diffpo.training.rendezvous import fresh_store, leave_together

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # of waiting for a process that is alive and does not come
# what the others raise for an error of one process; the first that fits
_KINDS = (
    BrokenPipeError,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    FloatingPointError,
    TaskError,
    ValueError,
    SystemExit,
)


class World:
    """``size`` processes, this one being number ``rank``, and number ``local_rank`` on its machine. The first writes, locks and prints.

    job: what names the start of torchrun, the same after its restarts; empty without torchrun. group: of torch.distributed, None for the
    default one. local_size: processes on this machine.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        job: str = "",
        group: "distributed.ProcessGroup | None" = None,
        local_size: int = 1,
    ):
        self.local_size = local_size
        self.rank, self.size, self.local_rank, self.job, self.group = rank, size, local_rank, job, group
        self.broken = False  # a process has left the others
        self._common: BaseException | None = None  # the last error that all have raised

    @property
    def first(self) -> bool:
        return self.rank == 0

    def apart(self) -> "World":
        """The same processes, for what another thread has to say."""
        group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        return World(self.rank, self.size, self.local_rank, self.job, group, self.local_size)

    def device(self, name: str) -> torch.device:
        """Where this process computes; of several GPUs its own. ValueError for one that there is not."""
        device = choose_device(name)
        if device.type != "cuda" or self.size == 1:
            return device
        if device.index is not None:
            raise ValueError(
                f"device: each of {self.size} processes takes a GPU of its own: give cuda, without a number"
            )
        there = torch.cuda.device_count()
        if self.local_rank >= there:
            raise ValueError(
                f"device: this machine has {there} GPUs, and process {self.local_rank} on it has none left: give torchrun "
                f"--nproc-per-node {there}"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def mesh(self, device: torch.device) -> "DeviceMesh":
        """All processes in a row."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device.type, (self.size,), mesh_dim_names=("shard",))

    def share(self, work: Tensor) -> Tensor:
        """Which pieces are this process's, int64, ascending. work: [B], what each is expected to take.

        Sorted by work and cut into runs of equal work: the pieces of one process are alike, and padding is little.
        """
        order = work.argsort(descending=True, stable=True)
        sorted_work = work[order].double()
        ends = sorted_work.cumsum(dim=0)
        owner = ((ends - sorted_work / 2) * self.size / ends[-1:]).long().clamp(max=self.size - 1)
        return order[owner == self.rank].sort().values

    def agreed(self, act: Callable[[], T]) -> T:
        """What ``act`` returns here. An error of one process is raised in all: ``act`` may do what the others do not."""
        if self.size == 1:
            return act()
        point = f"the end of {act.__qualname__}"
        try:
            result = act()
        except (Exception, SystemExit) as error:
            if error is not self._common and not isinstance(error, ProcessError):
                self._meet(point, error=error)
            raise
        self._meet(point)
        return result

    @contextmanager
    def in_passes(self) -> Iterator[None]:
        """Around passes of a sharded model, each of which takes all processes: what goes wrong in one cannot be told to the others, so it
        leaves at once, with its own message, and they find it gone."""
        try:
            yield
        except ProcessError:
            raise
        except Exception as error:
            if error is self._common:
                raise
            if isinstance(error, distributed.DistError) or "gloo" in str(error):
                raise self._lost() from error
            self._common, self.broken = error, True
            if not self.first:
                print(f"process {self.rank}: {described(error)}", file=sys.stderr)
            raise

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return any(self._meet("any", int(flag)))

    def gather(self, data: bytes) -> list[bytes]:
        """What each process gives."""
        lengths = self._meet("gather", len(data))
        if self.size == 1:
            return [data]
        return self._all_gather_bytes(data, lengths)

    def gather_json(self, value: Any) -> list[Any]:
        """JSON values, as `gather`."""
        return [json.loads(data) for data in self.gather(json.dumps(value).encode())]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The JSON value that the first process makes."""
        return self.gather_json(make() if self.first else None)[0]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place: the same bits in each."""
        self._meet("sum")
        if self.size > 1:
            with self._asking():
                distributed.all_reduce(tensor, group=self.group)
        return tensor

    def as_first_(self, tensors: Iterable[Tensor]) -> None:
        """Give them the values that they have in the first process."""
        self._meet("as_first")
        if self.size > 1:
            with self._asking():
                for tensor in tensors:
                    distributed.broadcast(tensor, 0, group=self.group)

    def _meet(self, point: str, value: int = 0, error: BaseException | None = None) -> list[int]:
        """Come to a point together. Each process's ``value``; or one's error, raised in all."""
        if self.size == 1:
            return [value]
        name = zlib.crc32(point.encode())
        met = [row.tolist() for row in self._all_gather(torch.tensor([name, error is not None, value]))]
        if all(row[:2] == [name, 0] for row in met):
            return [row[2] for row in met]
        told = json.dumps(_told(point, error)).encode()
        lengths = [int(row) for row in self._all_gather(torch.tensor([len(told)]))]
        heard = [json.loads(data) for data in self._all_gather_bytes(told, lengths)]
        failed = [rank for rank, words in enumerate(heard) if words["kind"]]
        if not failed:
            points = ", ".join(f"process {rank} at {words['point']}" for rank, words in enumerate(heard))
            self._common = ProcessError(f"the processes are not at the same point: {points}")
        elif heard[failed[0]]["kind"] == heard[self.rank]["kind"]:  # all have it, or this process alone
            self._common = error
        else:
            self._common = _heard(failed[0], heard[failed[0]])
        assert self._common is not None
        self.broken |= isinstance(self._common, ProcessError)  # where it happened, nobody handles it
        raise self._common

    def _all_gather_bytes(self, data: bytes, lengths: list[int]) -> list[bytes]:
        own = torch.zeros(max(lengths), dtype=torch.uint8)
        if data:
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [bytes(row[:n].numpy()) for row, n in zip(self._all_gather(own), lengths, strict=True)]

    def _all_gather(self, own: Tensor) -> list[Tensor]:
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with self._asking():
            distributed.all_gather(rows, own, group=self.group)
        return rows

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> ProcessError:
        self.broken = True
        return ProcessError("another process has ended, or does not answer: its own message says why")


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started together; alone without it. Of several, the first prints, and the others' warnings are not shown.

    In its environment: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and TORCHELASTIC_RUN_ID.
    """
    env = os.environ
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    run = env.get("TORCHELASTIC_RUN_ID")
    world = World(
        rank, size,
        local_rank=int(env.get("LOCAL_RANK", 0)), local_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
        job="" if run is None else f"{run} {socket.gethostname()} {os.getppid()}",
    )  # fmt: skip
    if size == 1:
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store = fresh_store(TIMEOUT)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(stopped(f"before the start: process {rank} does not reach the others: {error}")) from None
    with (
        open(os.devnull, "w") as nowhere,
        warnings.catch_warnings(),
        redirect_stdout(sys.stdout if rank == 0 else nowhere),
    ):
        if not world.first:
            warnings.simplefilter("ignore")
        yield world
    if not world.broken:
        with suppress(RuntimeError):  # all is done
            leave_together(store, rank, size)
            distributed.destroy_process_group()


def _told(point: str, error: BaseException | None) -> dict[str, Any]:
    """What the others hear of an error, as JSON values."""
    if error is None:
        return {"point": point, "kind": ""}
    kind = next((kind.__name__ for kind in _KINDS if isinstance(error, kind)), type(error).__name__)
    words: dict[str, Any] = {"point": point, "kind": kind, "message": str(error)}
    if isinstance(error, OSError) and error.errno:
        words |= {"errno": error.errno, "message": str(error.strerror), "file": str(error.filename or "")}
    if isinstance(error, SystemExit):
        words |= {"message": " ".join(getattr(error, "__notes__", [])), "code": error.code}
    return words


def _heard(rank: int, words: dict[str, Any]) -> BaseException:
    """Another process's error, as it is raised here."""
    kind = next((kind for kind in _KINDS if kind.__name__ == words["kind"]), None)
    message = f"process {rank}: {words['message']}"
    if kind is None:
        return ProcessError(f"process {rank}: {words['kind']}: {words['message']}")
    if "errno" in words:
        return OSError(words["errno"], message, *filter(None, [words["file"]]))
    if kind is SystemExit:
        return SystemExit(stopped(message, words["code"]) if words["message"] else words["code"])
    return (_OthersMistakeError if kind is ValueError else kind)(message)


class _OthersMistakeError(ProcessError, ValueError):
    """A user's mistake, as long as nothing has begun."""
