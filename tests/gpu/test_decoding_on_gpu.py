"""Decoding on a GPU: graphs replayed, nothing waited for, variable-length attention, running out of memory. Results: tests/decoding."""

import pytest
import torch

import diffpo
from diffpo.decoding import decoder, graphs
from diffpo.models import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

LENGTHS = [3, 30, 1, 17, 8, 40, 2, 25, 5, 12, 33, 6]


@pytest.fixture
def model(random_model):
    return random_model(seed=1, scale=0.6, vocab_size=64, max_position_embeddings=256, threshold_gammas=(0.0, 1.0, 3.0))


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
    settings = decoder.Settings(
        64, 64, diffpo.FixedSchedule(64), decoder.Sampling(0.8), static=True, graphs=True, lag=1
    )
    model.cuda()
    ids = prompts[5][None].cuda()
    with torch.no_grad():
        decode = decoder.Decoder(model, ids, torch.ones_like(ids, dtype=torch.bool), settings, 1)
        decode._admit(torch.zeros(1, dtype=torch.int64))
        decode._step(1)
        for _ in range(5):
            decode._step(0)
            decode._finished()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                decode._step(0)
                decode._finished()
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
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (torch.cuda.memory_reserved() + 2**26) / torch.cuda.mem_get_info()[1])
    )
    try:
        with pytest.warns(RuntimeWarning, match="out of memory with"):
            out = diffpo.generate(model, prompts * 400, 64, 64, diffpo.EntropyBounded(float("inf")), cache="dual")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert out.tokens.shape == (len(prompts) * 400, 64)
    assert free > 0
