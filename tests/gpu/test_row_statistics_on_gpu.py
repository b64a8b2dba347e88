"""row_statistics on a GPU: graphs, no waiting for the device, sizes that only fit there. tests/kernels runs there too."""

import pytest
import torch

from diffpo_kernels import RowStatistics, backends, row_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
VOCABULARY = 126464
MASK_ID = 126336


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.unavailable_reason("row_statistics", request.param, "cuda")
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def inputs(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, temperatures (0, 0.5, 1, 1.5 in turn) and uniform numbers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits_NV = torch.randn(rows, vocabulary, device="cuda", generator=generator).mul(4).bfloat16()
    temperature_N = torch.arange(rows, device="cuda") % 4 / 2
    return logits_NV, temperature_N, torch.rand(rows, device="cuda", generator=generator)


def assert_close(result: RowStatistics, expected: RowStatistics) -> None:
    """Tokens may differ where a number falls on the border of two, in float32: in one row of hundreds."""
    same_N = result.token == expected.token
    assert (~same_N).sum() <= 0.01 * len(same_N)
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got[same_N], wanted[same_N], rtol=3e-6, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 5, 64, 300])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY + 1, 152064])
def test_equals_reference_at_full_size(backend: str, rows: int, vocabulary: int) -> None:
    arguments = (*inputs(rows, vocabulary), [MASK_ID])
    assert_close(row_statistics(*arguments, backend=backend), row_statistics(*arguments, backend="reference"))


def test_a_graph_replays_with_changed_inputs(backend: str) -> None:
    buffers = inputs(8, 5000, seed=1)
    row_statistics(*buffers, [7], backend=backend)  # compiles, outside the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = row_statistics(*buffers, [7], backend=backend)
    for seed in (2, 3):
        logits_NV, temperature_N, uniform_N = inputs(8, 5000, seed=seed)
        temperature_N = temperature_N.roll(seed)
        for buffer, value in zip(buffers, (logits_NV, temperature_N, uniform_N), strict=True):
            buffer.copy_(value)
        graph.replay()
        eager = row_statistics(logits_NV, temperature_N, uniform_N, [7], backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_a_graph_may_ban_ids_never_seen_before(backend: str) -> None:
    buffers = inputs(8, 5000, seed=4)
    row_statistics(*buffers, [11, 4000, 4001], backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = row_statistics(*buffers, [13, 4100, 4103], backend=backend)
    graph.replay()
    eager = row_statistics(*buffers, [13, 4100, 4103], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_the_host_never_waits(backend: str) -> None:
    buffers = inputs(8, 5000, seed=5)
    row_statistics(*buffers, [7], backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        row_statistics(*buffers, [7], backend=backend)
        row_statistics(*buffers, [17, 19], backend=backend)  # ids that are not on the device yet
        row_statistics(buffers[0], backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_logits(backend: str) -> None:
    rows = 2**31 // VOCABULARY + 2
    if torch.cuda.mem_get_info()[0] < rows * VOCABULARY * 2 * 1.2:
        pytest.skip("not enough memory")
    logits_NV = torch.zeros(rows, VOCABULARY, dtype=torch.bfloat16, device="cuda")
    tail, temperature_N, uniform_N = inputs(3, seed=6)
    logits_NV[-3:] = tail
    temperatures, numbers = torch.zeros(rows, device="cuda"), torch.zeros(rows, device="cuda")
    temperatures[-3:], numbers[-3:] = temperature_N, uniform_N
    result = row_statistics(logits_NV, temperatures, numbers, [MASK_ID], backend=backend)
    # A batch of three rows may be cut into other chunks: equal but for rounding.
    assert_close(
        RowStatistics(*(field[-3:] for field in result)),
        row_statistics(tail, temperature_N, uniform_N, [MASK_ID], backend="reference"),
    )
    assert result.token[:-3].eq(0).all()


def test_draws_follow_the_distribution(backend: str, chi_square) -> None:
    vocabulary, draws = 5000, 200_000
    row_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(7)) * 2
    uniform_N = torch.rand(draws, device="cuda", generator=torch.Generator("cuda").manual_seed(8))
    token_N = row_statistics(row_V.cuda().expand(draws, vocabulary), 0.7, uniform_N, [3], backend=backend).token
    expected_V = (row_V / 0.7).index_fill(0, torch.tensor(3), -torch.inf).softmax(0)
    assert chi_square(torch.bincount(token_N.cpu(), minlength=vocabulary), expected_V) > 1e-4
