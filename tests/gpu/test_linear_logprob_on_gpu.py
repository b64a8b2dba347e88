"""linear_logprob at full vocabulary on a GPU: memory, 64-bit offsets, determinism, no waiting. Values are tested in tests/kernels."""

import pytest
import torch
from torch import Tensor

from diffpo_kernels import linear_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

V = 126464
MIB = 2**20


def inputs(
    rows: int, width: int, dtype: torch.dtype = torch.bfloat16, train_head: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    hidden_ND = torch.randn(rows, width, generator=generator, device="cuda").to(dtype).requires_grad_()
    head_VD = (torch.randn(V, width, generator=generator, device="cuda") / width**0.5).to(dtype)
    target_N = torch.randint(V, (rows,), generator=generator, device="cuda")
    return hidden_ND, head_VD.requires_grad_(train_head), target_N


def run(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, entropy: bool = True, **options: object) -> list[Tensor]:
    """Outputs, then gradients, for upstream gradients that differ between rows."""
    out = linear_logprob(hidden_ND, head_VD, target_N, 0.9, None, [V - 1], entropy, **options)
    out = out if entropy else (out,)
    upstream = [torch.linspace(-1, 1 + i, len(target_N), device="cuda") for i in range(len(out))]
    trained = [tensor for tensor in (hidden_ND, head_VD) if tensor.requires_grad]
    return [*(one.detach() for one in out), *torch.autograd.grad(out, trained, upstream)]


# 4096 rows are one chunk, which is kept; 9000 are several, formed twice; a frozen head never keeps one.
@pytest.mark.parametrize(("rows", "train_head"), [(4096, True), (9000, True), (9000, False)])
def test_peak_memory_is_a_chunk(rows: int, train_head: bool) -> None:
    width = 512
    problem = inputs(rows, width, train_head=train_head)
    run(*inputs(64, width))  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(*problem, entropy=train_head)
    torch.cuda.synchronize()
    returned = sum(tensor.numel() * tensor.element_size() for tensor in results)
    extra = torch.cuda.max_memory_allocated() - before - returned
    small = 4 * rows * width * 4  # the gradient of hidden in float32, and products on their way into it
    assert extra <= 1280 * MIB + small + 64 * MIB, f"{extra / MIB:.0f} MiB"


def test_more_than_2_to_the_31_logits() -> None:
    rows = 17_100
    assert rows * V > 2**31
    hidden_ND, head_VD, target_N = inputs(rows, 64)
    whole = run(hidden_ND, head_VD, target_N, chunk_bytes=2 * rows * V)
    upstream_N = torch.linspace(-1, 1, rows, device="cuda"), torch.linspace(-1, 2, rows, device="cuda")
    last = slice(rows - 20, rows)
    tail_ND = hidden_ND.detach()[last].requires_grad_()
    out = linear_logprob(tail_ND, head_VD, target_N[last], 0.9, None, [V - 1], True, backend="reference")
    (expected_ND,) = torch.autograd.grad(out, tail_ND, [up[last] for up in upstream_N])
    torch.testing.assert_close(whole[0][last], out[0].detach(), rtol=1e-4, atol=1e-2)  # bfloat16 logits of two products
    torch.testing.assert_close(whole[1][last], out[1].detach(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(whole[2][last], expected_ND, rtol=0.05, atol=2e-2 * expected_ND.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_any_logits(dtype: torch.dtype) -> None:
    problem = inputs(300, 512, dtype)
    with torch.no_grad():
        one, other = (
            linear_logprob(*problem, 0.9, None, [V - 1], True, chunk_bytes=size, backend="triton") for size in (None, 0)
        )
    for got, expected in zip(other, one, strict=True):
        tolerance = (
            1e-4 if dtype == torch.float32 else 2e-2
        )  # the two products may round a logit to neighbouring numbers
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("chunk_bytes", [None, 50 * MIB])
def test_two_runs_are_bitwise_equal(train_head: bool, chunk_bytes: int | None) -> None:
    hidden_MD, head_VD, _ = inputs(40, 256, train_head=train_head)
    rows_N = torch.randint(40, (500,), device="cuda")  # each row about twelve times
    target_N = torch.randint(V, (500,), device="cuda")
    first, second = (
        run(hidden_MD, head_VD, target_N, entropy=train_head, rows=rows_N, chunk_bytes=chunk_bytes) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("chunk_bytes", [None, 50 * MIB])
def test_the_host_never_waits(train_head: bool, chunk_bytes: int | None) -> None:
    hidden_MD, head_VD, target_N = inputs(500, 256, train_head=train_head)
    sources = hidden_MD.detach()[:200].requires_grad_(), hidden_MD.detach()[200:].requires_grad_()
    rows_N, temperature_N = torch.randint(500, (500,), device="cuda"), torch.full((500,), 0.7, device="cuda")

    def step() -> None:
        out_N = linear_logprob(
            sources, head_VD, target_N, temperature_N, banned_ids=[5, 9], rows=rows_N, chunk_bytes=chunk_bytes
        )
        out_N.sum().backward()

    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("chunk_bytes", [None, 0])
def test_replays_in_a_graph(chunk_bytes: int | None) -> None:
    hidden_ND, head_VD, target_N = inputs(100, 256)
    temperature_N = torch.full((100,), 0.7, device="cuda")

    @torch.no_grad()
    def call() -> tuple[Tensor, Tensor]:
        return linear_logprob(
            hidden_ND, head_VD, target_N, temperature_N, None, [7], True, chunk_bytes=chunk_bytes, backend="triton"
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    temperature_N.fill_(1.3)
    with torch.no_grad():
        hidden_ND.mul_(0.5)
    graph.replay()
    for got, expected in zip(captured, call(), strict=True):
        assert torch.equal(got, expected)
