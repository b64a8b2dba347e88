"""When steps are captured and replayed, and what follows a failure: with a stand-in for CUDA. On a GPU: tests/gpu."""

import gc
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch

from diffpo.decoding.graphs import StepGraphs

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, *_):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Graph:
    """What torch 2.11's does to the state of the process, and does not undo where the end of a capture fails."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


class Cuda:
    """The state that captures change: the current stream, pools that record, whether the random generator works, the sync debug mode."""

    def __init__(self):
        self.current, self.default = None, Stream()
        self.current = self.default
        self.recording, self.released = [], []
        self.generator_works, self.capturing, self.broken = True, False, False
        self.mode, self.captures = 0, 0

    def wait(self):
        """What ``.item()`` does."""
        if self.capturing:
            self.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def invalidate(self, error: BaseException):
        """Something that fails in a capture and takes it along."""
        if self.capturing:
            self.broken = True
            try:
                raise error
            finally:
                del error

    def draw(self):
        if not (self.generator_works or self.capturing):
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        before, pool = self.current, pool if pool is not None else object()
        self.current, self.capturing, self.broken, self.generator_works = stream, True, False, False
        self.recording.append(pool)
        try:
            yield
        finally:
            self.capturing = False
            if self.broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.recording.remove(pool)
            self.captures, self.generator_works, self.current = self.captures + 1, True, before

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def end_recording(self, device, pool):
        assert device == 0
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def assert_as_new(self):
        assert self.current is self.default
        assert not self.recording
        assert self.mode == 0
        self.draw()


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    names = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": cuda.graph,
        "stream": cuda.stream,
        "graph_pool_handle": object,
        "current_stream": lambda device: cuda.current,
        "set_stream": lambda stream: setattr(cuda, "current", stream),
        "get_sync_debug_mode": lambda: cuda.mode,
        "set_sync_debug_mode": lambda mode: setattr(cuda, "mode", mode),
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_recording)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: cuda.released.append(pool))
    return cuda


def test_two_steps_of_a_shape_then_its_graph(cuda):
    graphs, ran = StepGraphs(DEVICE, required=False), []
    for _ in range(5):
        graphs.run("a", lambda: ran.append("a"))
        graphs.run("b", lambda: ran.append("b"))
    assert ran == ["a", "b"] * 3  # the third is the capture
    assert [graph.replays for graph in graphs.graphs.values()] == [3, 3]
    cuda.assert_as_new()


def test_a_step_that_waits_is_never_captured_and_runs_each_time(cuda):
    graphs, begun, ran = StepGraphs(DEVICE, required=False), [], []

    def step():
        begun.append(1)
        cuda.wait()
        ran.append(1)

    graphs.run("b", step)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs.*synchronizing"):
        graphs.run("b", step)
    for _ in range(3):
        graphs.run("b", step)
    assert len(ran) == 5
    assert len(begun) == 6, "the one that was to be the last before the capture begins again"
    assert cuda.captures == 0
    cuda.assert_as_new()


def test_a_step_that_waits_is_an_error_where_graphs_are_required(cuda):
    graphs = StepGraphs(DEVICE, required=True)
    graphs.run("a", cuda.wait)
    with pytest.raises(RuntimeError, match=r"cuda_graph=True.*cannot be captured.*synchronizing"):
        graphs.run("a", cuda.wait)
    cuda.assert_as_new()


def test_a_debug_mode_that_was_set_stays_set(cuda):
    cuda.mode = "error"
    graphs = StepGraphs(DEVICE, required=False)
    for _ in range(3):
        graphs.run("a", lambda: None)
    assert cuda.mode == "error"


def test_another_failure_of_the_last_step_before_a_capture_is_not_hidden(cuda):
    graphs = StepGraphs(DEVICE, required=False)
    graphs.run("a", lambda: None)
    with pytest.raises(ZeroDivisionError):
        graphs.run("a", lambda: 1 / 0)
    cuda.assert_as_new()


def test_what_cannot_be_captured_goes_on_without_any_graph(cuda):
    graphs, ran = StepGraphs(DEVICE, required=False), []

    def only_a_capture_refuses_this():
        cuda.invalidate(RuntimeError("operation not permitted when stream is capturing"))
        ran.append("b")

    for _ in range(3):
        graphs.run("a", lambda: None)
    assert list(graphs.graphs) == ["a"]
    for _ in range(2):
        graphs.run("b", only_a_capture_refuses_this)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs.*not permitted"):
        graphs.run("b", only_a_capture_refuses_this)
    assert ran == ["b"] * 3
    cuda.assert_as_new()
    assert cuda.released == [graphs.pool]
    graphs.run("a", lambda: ran.append("a"))
    assert ran[-1] == "a"
    assert not graphs.graphs


def test_where_graphs_are_required_a_failed_capture_leaves_nothing_behind_either(cuda):
    graphs = StepGraphs(DEVICE, required=True)
    step = lambda: cuda.invalidate(RuntimeError("not permitted"))  # noqa: E731
    for _ in range(2):
        graphs.run("a", step)
    with pytest.raises(RuntimeError, match=r"cuda_graph=True.*not permitted"):
        graphs.run("a", step)
    cuda.assert_as_new()


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), KeyboardInterrupt(), TypeError("a rule's")]
)
@pytest.mark.parametrize("invalidated", [False, True])
def test_what_is_no_fault_of_the_capture_comes_out_as_it_is(cuda, required, error, invalidated):
    """Out of memory, for one: the decoder then halves its rows. The end of a capture that failed raises an error of its own."""

    def step():
        if cuda.capturing:
            cuda.broken = invalidated
            raise error

    graphs = StepGraphs(DEVICE, required)
    for _ in range(2):
        graphs.run("a", step)
    with pytest.raises(type(error)) as caught:
        graphs.run("a", step)
    assert caught.value is error
    cuda.assert_as_new()


def test_tensors_of_a_step_that_ran_out_of_memory_in_a_capture_die_with_the_error(cuda):
    """Half the rows are to fit where these were, without waiting for a garbage collection."""
    alive = []

    def step():
        tensor = torch.zeros(1)
        alive.append(weakref.ref(tensor))
        cuda.invalidate(torch.OutOfMemoryError("CUDA out of memory."))

    graphs = StepGraphs(DEVICE, required=False)
    gc.disable()
    try:
        with suppress(torch.OutOfMemoryError):
            for _ in range(3):
                graphs.run("a", step)
        assert len(alive) == 3
        assert alive[-1]() is None
    finally:
        gc.enable()


def test_a_step_that_fails_is_waited_for(cuda):
    graphs = StepGraphs(DEVICE, required=False)
    cuda.default.waited_for.clear()

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("a", step)
    assert cuda.default.waited_for == [graphs.stream]
