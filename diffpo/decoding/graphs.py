"""CUDA graphs of the static step, one for each combination of shapes, and flags that are read from the device without waiting for it."""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

# before a capture: kernels compile, libraries allocate their workspaces, and rare shapes never pay for a capture
_EAGER_STEPS = 2
_WAITED = "synchronizing CUDA operation"  # in what torch raises under the debug mode


class StepGraphs:
    """Runs steps that only read and write tensors at fixed addresses: as they are at first, then from a captured graph.

    Warm-up and capture share one side stream, and all graphs share one memory pool: they never run at the same time, and nothing in the
    pool lives from one step to the next.
    """

    def __init__(self, device: torch.device, required: bool):
        self.device, self.required, self.enabled = device, required, True
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.seen: Counter[Hashable] = Counter()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """One step of the shapes that ``key`` stands for.

        A step may be begun again from its start: what it reads it overwrites only after the last thing that can wait for the device.
        """
        if key not in self.graphs and self.enabled and self.seen[key] >= _EAGER_STEPS:
            self._capture(key, step)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self.seen[key] += 1
        if self.enabled and self.seen[key] == _EAGER_STEPS:
            self._rehearse(step)
        else:
            self._run(step)

    def _run(self, step: Callable[[], None]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                step()
        finally:  # a step that ran out of memory leaves kernels behind, which must not meet what is allocated next
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _rehearse(self, step: Callable[[], None]) -> None:
        """The last step before the capture, in which nothing may wait for the device: no capture survives that, nor does its process
        unharmed (see ``_recover``)."""
        try:
            with _waiting_is_an_error():
                self._run(step)
        except RuntimeError as error:
            if _WAITED not in str(error):
                raise
            self._give_up(error)
        else:
            return
        self._run(step)

    def _capture(self, key: Hashable, step: Callable[[], None]) -> None:
        """Capture without running; what cannot be captured goes on without graphs."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        failure: BaseException | None = None  # the step's: the end of a capture that has failed fails too
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                try:
                    step()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            failure = failure or error
        try:
            if failure is None:
                self.graphs[key] = graph
                return
            self._recover(graph, current)
            if isinstance(failure, torch.OutOfMemoryError) or not isinstance(failure, RuntimeError):
                raise failure  # not inside the except above, where it would get a context that refers to it
            self._give_up(failure)
        finally:
            failure = None  # or the tensors of its frames would wait for a garbage collection

    def _give_up(self, failure: RuntimeError) -> None:
        """Go on without graphs, the earlier ones too: torch gives a stream's matrix-product workspace back with the first of its graphs
        that dies."""
        if self.required:
            raise RuntimeError(f"cuda_graph=True, but the denoising step cannot be captured: {failure}") from failure
        warnings.warn(
            f"decoding without CUDA graphs: the step cannot be captured ({failure})", RuntimeWarning, stacklevel=2
        )
        self.enabled = False
        self.graphs.clear()

    def _recover(self, failed: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
        """Put back what torch leaves behind when the end of a capture fails (2.11 to 2.13).

        The side stream stays the current one. The allocator counts a capture into the pool as under way, asks ``failed`` about it, which
        must therefore be alive here, and no longer frees cached blocks when memory runs out. The random generator refuses to work
        outside captures until one succeeds, be it an empty one.
        """
        torch.cuda.set_stream(current)
        with suppress(RuntimeError):  # the capture did end, and the pool with it
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
                pass


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Flags:
    """Copies of a small device tensor, one after each step, read some steps later, with the ids of the rows they are about."""

    def __init__(self) -> None:
        self.pending: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, flags: Tensor, ids: Tensor) -> None:
        if not flags.is_cuda:
            self.pending.append((flags.clone(), ids.clone(), None))
            return
        on_host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        on_host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((on_host, ids.clone(), event))

    def pop(self, lag: int) -> tuple[Tensor, Tensor] | None:
        """The flags of ``lag`` steps ago and the ids of the rows in flight then, or None where there are none yet."""
        if len(self.pending) <= lag:
            return None
        while len(self.pending) > lag:  # more than one where the lag has become shorter
            flags, ids, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        return flags[:, : len(ids)], ids
