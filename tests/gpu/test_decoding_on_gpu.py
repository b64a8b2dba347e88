"""Decoding on a GPU: graphs replayed, nothing waited for, variable-length attention, running out of memory. Results: tests/decoding."""

import gc
import warnings

import pytest
import torch

import diffpo
from diffpo.decoding import decoder, graphs
from diffpo.decoding.options import EngineOptions
from diffpo.models import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

LENGTHS = [3, 30, 1, 17, 8, 40, 2, 25, 5, 12, 33, 6]


@pytest.fixture
def model(random_model):
    return random_model(
        seed=1,
        scale=0.6,
        vocab_size=64,
        max_position_embeddings=256,
        threshold_gammas=(0.0, 1.0, 3.0),
        threshold_reads="both",
    )


@pytest.fixture
def prompts(model, random_prompts):
    return random_prompts(model, LENGTHS)


RULES = [
    diffpo.FixedSchedule(8),
    diffpo.EntropyBounded(1.0),
    diffpo.ConfidenceThreshold(0.4),
    diffpo.PromptThreshold(sample=True),
]


def share_of_equal_tokens(a, b) -> float:
    """A GPU's matmul rounds otherwise than a CPU's, and otherwise for other shapes: near ties may fall the other way."""
    return (a.tokens.cpu() == b.tokens.cpu()).float().mean().item()


def test_a_model_is_loaded_onto_the_gpu():
    assert diffpo.load("tiny-countdown").device.type == "cuda"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_graphs_give_what_the_ordinary_loop_gives(model, prompts, rule, temperature, cache):
    options = {"rule": rule, "temperature": temperature, "seed": 5, "cache": cache}
    on_cpu = diffpo.generate(model, prompts, 32, 8, **options)
    model.cuda()
    eager = diffpo.generate(model, prompts, 32, 8, **options, cuda_graph=False, batch_size=5)
    graphed = diffpo.generate(model, prompts, 32, 8, **options, cuda_graph=True, batch_size=5)
    assert share_of_equal_tokens(eager, on_cpu) > 0.97
    assert share_of_equal_tokens(graphed, eager) > 0.97
    same = (graphed.trajectory.commit_step == eager.trajectory.commit_step).all(dim=1) & (
        graphed.tokens == eager.tokens
    ).all(dim=1)
    assert same.float().mean() > 0.7
    torch.testing.assert_close(graphed.trajectory.logprob[same], eager.trajectory.logprob[same], rtol=1e-2, atol=1e-2)


def test_steps_are_replayed(model, prompts, monkeypatch):
    calls = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (calls.append(1), replay(self))[1])
    out = diffpo.generate(model.cuda(), prompts[:1], 64, 8, diffpo.FixedSchedule(64), cuda_graph=True)
    assert len(calls) >= 64 - 1 - graphs._EAGER_STEPS
    assert out.nfe.tolist() == [64]


def test_a_replayed_step_never_waits(model, prompts):
    """Between the first steps and the end of a decode nothing copies from the device but the flags, and those without waiting."""
    model.cuda()
    options = diffpo.DecodingOptions(64, 64, diffpo.FixedSchedule(64), 0.8).resolved(model)
    columns = len(prompts[5]) + 64
    with torch.no_grad():
        mode = decoder.StepMode(static=True, graphs=True, lag=1)
        decode = decoder.Decoder(model, 1, columns, 64, EngineOptions(), mode)
        decode.admit([decoder.Job(0, prompts[5], columns, 0, options)])
        decode.step()
        for _ in range(5):
            decode.step()
            decode.ended()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                decode.step()
                decode.ended()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(decode.rows.nfe[0]) == 16


def test_a_rule_that_cannot_be_captured(model, prompts):
    class Looks(diffpo.EntropyBounded):
        def plan(self, step):
            step.gamma.sum().item()
            return super().plan(step)

    model.cuda()
    expected = diffpo.generate(model, prompts, 32, 8, diffpo.EntropyBounded(1.0), cuda_graph=False)
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        out = diffpo.generate(model, prompts, 32, 8, Looks(1.0))
    assert share_of_equal_tokens(out, expected) > 0.97
    with pytest.raises(RuntimeError, match="cannot be captured"):
        diffpo.generate(model, prompts, 32, 8, Looks(1.0), cuda_graph=True)


@pytest.mark.parametrize("queries", [40, 8])
def test_variable_length_attention_equals_a_mask(queries):
    if (kernel := attention.variable_length_kernel("cuda", torch.bfloat16)) is None:
        pytest.skip("no variable-length kernel")
    assert kernel is not None
    padding = torch.tensor([0, 5, 32, 17], device="cuda")
    q, k, v = (
        torch.randn(4, n, h, 64, device="cuda", dtype=torch.bfloat16) for n, h in ((queries, 8), (40, 2), (40, 2))
    )
    bounded = attention.left_padding(padding, queries, 40, torch.bfloat16)
    got = attention.attend(q, k, v, bounded)
    expected = attention.attend(q.float(), k.float(), v.float(), attention.Padding(bounded.mask))
    real = torch.arange(40 - queries, 40, device="cuda") >= padding[:, None]
    torch.testing.assert_close(got[real].float(), expected[real], rtol=2e-2, atol=2e-2)


def test_a_bf16_model_with_padding_in_graphs(model, prompts):
    model.cuda().bfloat16()
    options = {"rule": diffpo.EntropyBounded(1.0), "batch_size": 4}
    exact = diffpo.generate(model, prompts, 32, 8, **options, cuda_graph=False)
    for cache in ("none", "prefix", "dual"):
        out = diffpo.generate(model, prompts, 32, 8, **options, cache=cache, cuda_graph=True)
        assert out.trajectory.logprob.isfinite().all()
        assert not (out.tokens == model.mask_id).any()
    assert share_of_equal_tokens(diffpo.generate(model, prompts, 32, 8, **options), exact) > 0.8


def test_really_out_of_memory(model, prompts):
    model.cuda()
    gc.collect()
    torch.cuda.empty_cache()  # what other tests left would be memory enough
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (torch.cuda.memory_reserved() + 2**26) / torch.cuda.mem_get_info()[1])
    )
    try:
        with pytest.warns(RuntimeWarning, match="out of memory with"):
            out = diffpo.generate(model, prompts * 400, 64, 64, diffpo.EntropyBounded(float("inf")), cache="dual")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert out.tokens.shape == (len(prompts) * 400, 64)


def assert_nothing_captures():
    """The next to use the GPU finds the stream, the random generator and the allocator as they were."""
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device="cuda").isfinite().all()
    graph, numbers = torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
    with torch.cuda.graph(graph):
        numbers.add_(1)
    graph.replay()
    assert numbers.tolist() == [1, 1, 1]
    gc.collect()
    torch.cuda.empty_cache()
    reserved, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((reserved + 2**30) / total)
    try:
        torch.empty(3 * 2**28, dtype=torch.uint8, device="cuda")
        torch.empty(7 * 2**27, dtype=torch.uint8, device="cuda")  # fits only where the block before is given back
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("required", [False, True])
def test_a_capture_that_fails_leaves_nothing_behind(required):
    numbers = torch.zeros(8, device="cuda")

    def step():
        numbers.add_(torch.rand(8, device="cuda"))
        if torch.cuda.is_current_stream_capturing():  # so that the rehearsal finds nothing
            numbers.sum().item()

    steps = graphs.StepGraphs(numbers.device, required)
    for _ in range(graphs._EAGER_STEPS):
        steps.run("a", step)
    with pytest.raises(RuntimeError) if required else pytest.warns(RuntimeWarning, match="cannot be captured"):
        steps.run("a", step)
    assert_nothing_captures()
    if not required:
        steps.run("a", step)
    assert numbers.isfinite().all()


def test_a_step_that_waits_is_never_captured(monkeypatch):
    captured = []
    begin = torch.cuda.CUDAGraph.capture_begin
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "capture_begin", lambda self, *a, **k: (captured.append(1), begin(self, *a, **k))[1]
    )
    numbers = torch.zeros(8, device="cuda")

    def step():
        numbers.sum().item()  # before anything is written, as in a denoising step
        numbers.add_(1)

    steps = graphs.StepGraphs(numbers.device, required=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            steps.run("a", step)
    assert [str(warning.message)[:30] for warning in caught] == ["decoding without CUDA graphs: "]
    assert not captured
    assert numbers.tolist() == [5.0] * 8
    assert torch.cuda.get_sync_debug_mode() == 0
    assert_nothing_captures()
