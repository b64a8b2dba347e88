"""surrogate_loss on a GPU: what the interpreter cannot show. Values on small inputs are compared in tests/kernels, on the GPU too."""

import pytest
import torch
from torch import Tensor

from diffpo_kernels import surrogate_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def inputs(rows: int, length: int, seed: int = 0, bins: int = 4, device: str = "cuda") -> dict:
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> Tensor:
        return (-torch.rand(rows, length, generator=generator) * 2).to(device)

    tokens_B = torch.randint(0, length + 1, (rows, 1), generator=generator)
    return {
        "logprob": logprobs().requires_grad_(),
        "old": logprobs(),
        "advantage": torch.randn(rows, generator=generator).to(device),
        "mask": (torch.arange(length) < tokens_B).to(device),
        "behaviour": logprobs(),
        "reference": logprobs(),
        "step_bin": torch.randint(-1, bins, (rows, length), generator=generator).to(device),
        "bins": bins,
        "kl_coefficient": 0.1,
    }


def evaluate(arguments: dict) -> dict[str, Tensor]:
    """Loss, gradient of three times the loss, and the diagnostics."""
    result = surrogate_loss(**arguments)
    (gradient,) = torch.autograd.grad(3 * result.loss, arguments["logprob"])
    return {"loss": result.loss.detach(), "gradient": gradient} | result.diagnostics


def in_float64(arguments: dict) -> dict:
    return arguments | {
        name: value.detach().double().requires_grad_(name == "logprob")
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize(
    ("rows", "length", "bins"), [(512, 13, 4), (512, 1024, 4), (40, 1500, 128), (70_000, 3, 2), (1, 300_000, 1)]
)
def test_matches_float64_at_real_sizes(rows: int, length: int, bins: int, normalisation: str) -> None:
    arguments = inputs(rows, length, bins=bins) | {"normalisation": normalisation}
    exact = evaluate(in_float64(arguments) | {"backend": "reference"})
    theirs = evaluate(arguments | {"backend": "reference"})
    ours = evaluate(arguments | {"backend": "triton"})
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        allowed = (theirs[name] - truth).abs() + 1e-5 * truth.abs().clamp(min=1)
        assert ((ours[name] - truth).abs() <= allowed).all(), name


def test_repeats_exactly() -> None:
    arguments = inputs(2000, 700) | {"backend": "triton"}
    first = evaluate(arguments)
    for _ in range(5):
        for name, value in evaluate(arguments).items():
            assert torch.equal(value, first[name]), name


def test_float64_goes_to_the_reference() -> None:
    arguments = in_float64(inputs(5, 9))
    for name, value in evaluate(arguments | {"backend": "reference"}).items():
        torch.testing.assert_close(evaluate(arguments)[name], value)


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_the_host_never_waits(normalisation: str) -> None:
    arguments = inputs(64, 100) | {"normalisation": normalisation, "backend": "triton"}
    evaluate(arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_a_graph_replays_with_other_inputs(normalisation: str) -> None:
    options = {"normalisation": normalisation, "backend": "triton"}
    captured = inputs(64, 100, seed=1) | options
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            evaluate(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = evaluate(captured)

    other = inputs(64, 100, seed=2) | options
    with torch.no_grad():
        for name, value in other.items():
            if isinstance(value, Tensor):
                captured[name].copy_(value)
    graph.replay()
    for name, value in evaluate(other).items():
        assert torch.equal(outputs[name], value), name


def test_compiles_to_the_same() -> None:
    arguments = inputs(64, 100) | {"backend": "triton"}
    expected = evaluate(arguments)
    result = torch.compile(surrogate_loss, fullgraph=True)(**arguments)
    (gradient,) = torch.autograd.grad(3 * result.loss, arguments["logprob"])
    torch.testing.assert_close(gradient, expected["gradient"])
    torch.testing.assert_close(result.loss.detach(), expected["loss"])
    for name, value in result.diagnostics.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors() -> None:
    expected = evaluate(inputs(8, 20) | {"backend": "triton"})
    for name, value in evaluate(inputs(8, 20, device="cuda:1") | {"backend": "triton"}).items():
        assert torch.equal(value.cpu(), expected[name].cpu()), name
