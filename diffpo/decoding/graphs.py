"""CUDA graphs of the static step, one for each combination of shapes, and flags that are read from the device without waiting for it."""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_EAGER_STEPS = (
    2  # before a capture: kernels compile, libraries allocate their workspaces, and rare shapes never pay for a capture
)


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
        """One step of the shapes that ``key`` stands for."""
        if key not in self.graphs and self.enabled and self.seen[key] >= _EAGER_STEPS:
            self._capture(key, step)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self.seen[key] += 1
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                step()
        finally:  # a step that ran out of memory leaves kernels behind, which must not meet what is allocated next
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _capture(self, key: Hashable, step: Callable[[], None]) -> None:
        """Capture without running; what cannot be captured (a rule that looks at its numbers, say) goes on without graphs.

        Then the earlier graphs go too: torch gives a stream's matrix-product workspace back with the first of its graphs that dies.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(
                error.__context__, torch.OutOfMemoryError
            ):  # then the end of the capture fails too, and hides it
                raise error.__context__ from None
            if self.required:
                raise RuntimeError(f"cuda_graph=True, but the denoising step cannot be captured: {error}") from error
            warnings.warn(
                f"decoding without CUDA graphs: the step cannot be captured ({error})", RuntimeWarning, stacklevel=2
            )
            self.enabled = False
            self.graphs.clear()
        else:
            self.graphs[key] = graph


class Flags:
    """Copies of a small device tensor, one after each step, read ``lag`` steps later, with the prompts whose rows they are about."""

    def __init__(self, lag: int):
        self.lag = lag
        self.pending: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, flags: Tensor, prompts: Tensor) -> None:
        if not flags.is_cuda:
            self.pending.append((flags.clone(), prompts.clone(), None))
            return
        on_host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        on_host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((on_host, prompts.clone(), event))

    def pop(self) -> tuple[Tensor, Tensor] | None:
        """The flags of ``lag`` steps ago and the prompts that were in flight then, or None where there are none yet."""
        if len(self.pending) <= self.lag:
            return None
        flags, prompts, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        return flags[:, : len(prompts)], prompts
