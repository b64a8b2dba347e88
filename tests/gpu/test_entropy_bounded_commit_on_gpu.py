"""entropy_bounded_commit_ on a GPU: no waiting, CUDA graphs, one launch, large grids and offsets. Its results are in tests/kernels."""

import math

import pytest
import torch
from torch import Tensor

from diffpo_kernels import backends, entropy_bounded_commit_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

OPERATOR = "entropy_bounded_commit_"
MASK = 99
BLOCK = 8


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.unavailable_reason(OPERATOR, request.param, "cuda")
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


class Decode:
    """The state of a decode on the GPU and its inputs; `step` runs the operator on it."""

    def __init__(self, rows: int, length: int, gamma: float = 1.0):
        generator = torch.Generator("cuda").manual_seed(0)
        self.tokens = torch.full((rows, length), MASK, device="cuda")
        self.proposal = torch.randint(0, 50, (rows, length), generator=generator, device="cuda")
        self.entropy = torch.rand(rows, length, generator=generator, device="cuda")
        self.proposal_logprob = -self.entropy
        self.logprob = torch.zeros(rows, length, device="cuda")
        self.commit_step = torch.zeros_like(self.tokens)
        self.nfe = torch.zeros(rows, dtype=torch.int64, device="cuda")
        self.start = torch.zeros_like(self.nfe)
        self.end = torch.full_like(self.nfe, BLOCK)
        self.gamma = torch.full((rows,), gamma, device="cuda")

    def step(self, backend: str, max_window: int | None = BLOCK) -> Tensor:
        return entropy_bounded_commit_(
            self.tokens, self.proposal, self.entropy, self.entropy, self.gamma, MASK, self.start, self.end,
            proposal_logprob=self.proposal_logprob, logprob=self.logprob, commit_step=self.commit_step, nfe=self.nfe,
            advance=True, max_window=max_window, backend=backend,
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        return [self.tokens, self.logprob, self.commit_step, self.nfe, self.start, self.end]

    def assert_equals(self, other: "Decode") -> None:
        for mine, theirs in zip(self.state(), other.state(), strict=True):
            assert torch.equal(mine, theirs)


def test_none_is_triton() -> None:
    assert backends.preferred(OPERATOR, "cuda") == "triton"


def test_never_waits_for_the_device(backend: str) -> None:
    decode = Decode(4, 32)
    decode.step(backend)  # compiled, and the allocator warm
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode.step(backend)
        decode.gamma = 0.5
        decode.step(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replayed_graph_sees_a_changed_gamma(backend: str) -> None:
    captured, eager = Decode(4, 32), Decode(4, 32)
    initial = [tensor.clone() for tensor in captured.state()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step(backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        committed = captured.step(backend)
    for tensor, value in zip(captured.state(), initial, strict=True):
        tensor.copy_(value)

    for gamma in (0.0, 2.0, 0.3, math.inf, 1.0, 0.0):
        captured.gamma.fill_(gamma)
        eager.gamma.fill_(gamma)
        graph.replay()
        expected = eager.step("reference")
        assert torch.equal(committed, expected)
        captured.assert_equals(eager)


def test_a_whole_decode_in_one_graph(backend: str) -> None:
    """Steps after the last block change nothing, so a graph may hold as many as the longest row needs."""
    captured, eager = Decode(3, 24), Decode(3, 24)
    for decode in (captured, eager):
        decode.gamma.copy_(torch.tensor([0.0, 1.0, math.inf]))
    Decode(3, 24).step(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(25):
            captured.step(backend)
    graph.replay()
    while (eager.tokens == MASK).any():
        eager.step("reference")
    captured.assert_equals(eager)
    assert captured.nfe[0] == 24
    assert captured.nfe[2] == 3


def test_is_one_launch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        pytest.skip("plain torch")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # poisoning is a launch too
    decode = Decode(4, 32)
    decode.step(backend)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decode.step(backend)
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in on_device if "commit" in name]
    assert len(ours) == 1, on_device or "the profiler recorded nothing on the device"
    kernels = [name for name in on_device if "Sync" not in name]  # some versions record the synchronisation as well
    assert kernels == ours


def test_other_numbers_compile_no_other_kernel() -> None:
    if (reason := backends.unavailable_reason(OPERATOR, "triton", "cuda")) is not None:
        pytest.skip(reason)
    from diffpo_kernels.entropy_bounded_commit import triton_kernels

    compiled = triton_kernels.entropy_bounded_commit_kernel.device_caches[torch.cuda.current_device()][0]
    tokens = torch.full((2, 48), MASK, device="cuda")
    values = torch.rand(2, 48, device="cuda")
    sizes = []
    for gamma, mask_id, end, rule in ((0.5, MASK, 40, "joint"), (0.0, 2**40, 33, "ranked"), (math.inf, 0, 48, "joint")):
        entropy_bounded_commit_(tokens, tokens, values, values, gamma, mask_id, 0, end, rule=rule, backend="triton")
        sizes.append(len(compiled))
    assert sizes[0] > 0
    assert set(sizes) == {sizes[0]}


@pytest.mark.parametrize("rows", [70_000])  # more than the 65535 blocks of a grid's second and third axis
def test_many_rows(backend: str, rows: int) -> None:
    decode, expected = Decode(rows, 16), Decode(rows, 16)
    for _ in range(3):
        assert torch.equal(decode.step(backend), expected.step("reference"))
    decode.assert_equals(expected)


@pytest.mark.parametrize("window", [8, 33, 512, 1024, 1025, 2048])
def test_long_windows(backend: str, window: int) -> None:
    decode, expected = Decode(64, 2048, gamma=0.02 * window), Decode(64, 2048, gamma=0.02 * window)
    for either in (decode, expected):
        either.end.fill_(window)
    for _ in range(4):
        assert torch.equal(decode.step(backend, window), expected.step("reference", window))
    decode.assert_equals(expected)


def test_offsets_above_2_to_the_31(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    stride = 2**31 + 16
    buffer = torch.zeros(stride + 8, dtype=torch.int64, device="cuda")
    tokens = buffer.as_strided((2, 8), (stride, 1)).fill_(MASK)
    entropy = torch.zeros(stride + 8, device="cuda").as_strided((2, 8), (stride, 1))
    entropy.copy_(torch.arange(16.0).reshape(2, 8))
    proposal = torch.arange(16, device="cuda").reshape(2, 8)
    entropy_bounded_commit_(tokens, proposal, entropy, entropy, math.inf, MASK, 2, 8, backend=backend)
    assert torch.equal(tokens[:, 2:], proposal[:, 2:])
    assert (tokens[:, :2] == MASK).all()
    assert int((buffer != 0).sum()) == 16
