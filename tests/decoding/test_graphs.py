"""When steps are captured and replayed, and what follows a failure: with a stand-in for CUDA. On a GPU: tests/gpu."""

from contextlib import contextmanager

import pytest
import torch

from diffpo.decoding.graphs import StepGraphs


class Stream:
    def __init__(self, *_):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Graph:
    replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch):
    """The current stream, and how a capture ends."""

    class Cuda:
        current, end_of_capture = Stream(), None

    @contextmanager
    def capture(graph, pool, stream):
        try:
            yield
        finally:
            if Cuda.end_of_capture is not None:
                raise Cuda.end_of_capture

    @contextmanager
    def on_stream(stream):
        yield

    names = {"Stream": Stream, "CUDAGraph": Graph, "graph": capture, "stream": on_stream}
    names |= {"graph_pool_handle": object, "current_stream": lambda device: Cuda.current}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Cuda


def test_two_steps_of_a_shape_then_its_graph(cuda):
    graphs, ran = StepGraphs(torch.device("cuda"), required=False), []
    for _ in range(5):
        graphs.run("a", lambda: ran.append("a"))
        graphs.run("b", lambda: ran.append("b"))
    assert ran == ["a", "b"] * 3  # the third is the capture
    assert [graph.replays for graph in graphs.graphs.values()] == [3, 3]


def test_what_cannot_be_captured_goes_on_without_any_graph(cuda):
    graphs, ran = StepGraphs(torch.device("cuda"), required=False), []
    for _ in range(3):
        graphs.run("a", lambda: None)
    assert list(graphs.graphs) == ["a"]
    for _ in range(2):
        graphs.run("b", lambda: None)
    cuda.end_of_capture = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(RuntimeWarning, match="without CUDA graphs.*not permitted"):
        graphs.run("b", lambda: ran.append("b"))
    assert ran == ["b"] * 2  # the capture, which runs nothing, and the step
    graphs.run("a", lambda: ran.append("a"))
    assert ran[-1] == "a"
    assert not graphs.graphs


@pytest.mark.parametrize("required", [False, True])
def test_out_of_memory_in_a_capture_is_out_of_memory(cuda, required):
    """The decoder then halves its rows; the end of a capture that failed raises an error of its own."""

    def step():
        if len(ran) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        ran.append(1)

    graphs, ran = StepGraphs(torch.device("cuda"), required), []
    for _ in range(2):
        graphs.run("a", step)
    cuda.end_of_capture = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        graphs.run("a", step)


def test_a_step_that_fails_is_waited_for(cuda):
    graphs = StepGraphs(torch.device("cuda"), required=False)
    cuda.current.waited_for.clear()

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("a", step)
    assert cuda.current.waited_for == [graphs.stream]
