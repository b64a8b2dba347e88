"""Time, memory and ceilings, each measured the same way for everyone.

Time is wall-clock on the CPU and between two events on a GPU, in interleaved rounds: every round calls each contestant once, in a new
random order, so that noise hits all alike; reported is the median. On a GPU the second-level cache is emptied before each call, by
reading (writing would leave dirty lines whose write-back the call would pay for). Then the device spins until the host has enqueued the
whole call, so that the events enclose device time only, for everyone: a time counts only if the device was still before the first event
when the host was done, else the spin is lengthened and the call repeated. A call that 16 ms do not suffice for waits for the device
itself or fills its queue; it is timed without a spin, host time included, and reported as host-bound. What the host costs is in
wall_seconds: the median wall-clock time of single calls, each waited for, caches warm.
"""

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.profiler import ProfilerActivity, profile

from kernel_cases.case import SEED, Call, generator

_EVICTION_BYTES = 2**30  # several times any second-level cache
# Cycles: a quarter of a millisecond to 16 ms at 2 GHz, longer at less.
_SPINS = (500_000, 2_000_000, 8_000_000, 32_000_000)
_GRAPH_CALLS = 20


class Clock:
    """Seconds of one call on a device. host_bound: the calls whose host time could not be kept out of theirs."""

    def __init__(self, device: torch.device):
        self.device = device
        # Weak, as a call holds its inputs, which must not outlive its case.
        self.host_bound: WeakSet[Call] = WeakSet()
        self._tried: WeakKeyDictionary[Call, int] = WeakKeyDictionary()  # how many of _SPINS were too short
        if device.type == "cuda":
            self._buffer = torch.zeros(_EVICTION_BYTES // 4, device=device)
            self._sink = torch.zeros((), device=device)

    def seconds(self, call: Call) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        for i in range(self._tried.get(call, 0), len(_SPINS)):
            seconds, hidden = self._between_events(call, _SPINS[i])
            if hidden:
                return seconds
            self._tried[call] = i + 1
        self.host_bound.add(call)
        return self._between_events(call, 0)[0]

    def _between_events(self, call: Call, spin: int) -> tuple[float, bool]:
        """Seconds, and whether the host had enqueued the whole call before the device began with it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.amax(self._buffer, dim=0, out=self._sink)
        torch.cuda._sleep(spin)
        start.record()
        call()
        end.record()
        hidden = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, hidden


def wall_seconds(call: Call, device: torch.device, budget: float = 0.05) -> float:
    """Median wall-clock time of a call that is waited for: 3 to 50 calls, no more once they add up to `budget` seconds."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 50 and sum(times) < budget):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median_and_quartiles(times)[0]


def interleaved_seconds(calls: Mapping[str, Call], clock: Clock, budget: float) -> dict[str, list[float]]:
    """Times by name. A call takes part in at least 3 rounds and at most 200, and in no more once its times add up to `budget` seconds."""
    shuffle = random.Random(SEED).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(200):
        order = [name for name in calls if len(times[name]) < 3 or sum(times[name]) < budget]
        shuffle(order)
        for name in order:
            times[name].append(clock.seconds(calls[name]))
    return times


def median_and_quartiles(times: list[float]) -> tuple[float, tuple[float, float]]:
    low, middle, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    )
    return middle, (low, high)


def graph_seconds(call: Call, device: torch.device) -> float:
    """Median time of a call inside a CUDA graph: a graph of 20 calls is replayed, so that its launch hardly counts."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_GRAPH_CALLS):
            call()
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _GRAPH_CALLS)
    return median_and_quartiles(times[5:])[0]


def extra_bytes(call: Call, device: torch.device) -> int:
    """Peak, during a call, of the tensor memory that the call takes and gives back: neither its inputs nor its results.

    From the allocator's events that the profiler records, which see every tensor in every thread, those inside compiled code and custom
    operators too, but not what native code takes from malloc.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = call()  # alive until the recording ends, so that what is freed in it was temporary
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    del results
    tree = recorded.profiler.kineto_results.experimental_event_tree()
    events = sorted((event for event in _flat(tree) if event.name == "[memory]"), key=lambda event: event.start_time_ns)
    blocks = [event.extra_fields for event in events]
    return peak_of_temporaries([(block.ptr, block.alloc_size) for block in blocks if block.device.type == device.type])


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak GPU memory during a call beyond what was allocated before it, results included, as torch's allocator counts it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def peak_of_temporaries(events: Sequence[tuple[int, int]]) -> int:
    """From (address, size), the size negative where a block is freed: the largest sum of blocks alive at once that are freed later."""
    changes = [0] * len(events)
    allocated: dict[int, int] = {}
    for i, (address, size) in enumerate(events):
        if size > 0:
            allocated[address] = i
        elif address in allocated:
            changes[allocated.pop(address)], changes[i] = -size, size
    return max(itertools.accumulate(changes), default=0)


def _flat(tree: Sequence[Any]) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _flat(event.children)


def ceilings(clock: Clock, quick: bool = False) -> dict[str, float]:
    """What this device does at best, measured now: bytes/s of a copy (read plus written) and FLOP/s of a square matrix product."""
    on_gpu = clock.device.type == "cuda"
    size = 2**30 if on_gpu else 2**27 if quick else 2**28
    side = 8192 if on_gpu else 1024 if quick else 2048
    dtypes = (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)
    products = {f"matmul {str(dtype).removeprefix('torch.')}": _matmul_rate(clock, side, dtype) for dtype in dtypes}
    return {"copy": _copy_rate(clock, size)} | products


def _copy_rate(clock: Clock, size: int) -> float:
    source = torch.rand(size // 4, generator=generator(clock.device), device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / _median(clock, lambda: target.copy_(source))


def _matmul_rate(clock: Clock, side: int, dtype: torch.dtype) -> float:
    random = generator(clock.device)
    left, right = (torch.randn(side, side, generator=random, device=clock.device).to(dtype) for _ in range(2))
    return 2 * side**3 / _median(clock, lambda: left @ right)


def _median(clock: Clock, call: Call) -> float:
    return median_and_quartiles(interleaved_seconds({"": call}, clock, budget=0.5)[""])[0]
