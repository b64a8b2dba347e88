"""Kept keys and values: against a loop with one unpadded prompt, against exact decoding, and how far from it they lead."""

import math

import pytest
import torch

import diffpo
from diffpo.models.transformer import rotary_angles, rotate
from diffpo.tasks import get_task

MASK = 2
LENGTHS = [3, 14, 1, 9, 6, 20]
RULE = diffpo.EntropyBounded(torch.tensor([0.0, 4.0, 0.5, 1.5, 0.2, 8.0]))


class NaiveCache:
    """One sequence at a time: the layers' keys and values in lists, those of the computed positions put in their places."""

    def __init__(self, model):
        self.model, self.kept = model, [None] * len(model.layers)

    def logits(self, tokens: list[int], computed: list[int]) -> torch.Tensor:
        """Logits [n, V] of the outputs at ``computed``, everything else as it was kept."""
        config, positions = self.model.config, torch.tensor(computed)
        x = self.model.embed_tokens(torch.tensor(tokens)[positions])[None]
        rotation = rotary_angles(positions[None], config.head_dim, config.rope_theta)
        for n, layer in enumerate(self.model.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                getattr(attention, f"{name}_proj")(h).view(1, len(computed), -1, config.head_dim) for name in "qkv"
            )
            q, k = rotate(q, rotation), rotate(k, rotation)
            if self.kept[n] is None:
                self.kept[n] = [None] * len(tokens)
            for i, position in enumerate(computed):
                self.kept[n][position] = (k[0, i], v[0, i])
            keys, values = (torch.stack(kept) for kept in zip(*self.kept[n], strict=True))
            groups = config.num_attention_heads // config.key_value_heads
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
            weight = (torch.einsum("qhd,khd->hqk", q[0], keys) / config.head_dim**0.5).softmax(-1)
            x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", weight, values).reshape(1, len(computed), -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.head(self.model.norm(x))[0]


def decode_alone(model, prompt, gen_length, block_length, gamma, mode, refresh):
    """Greedy entropy-bounded decoding of one prompt with a cache: tokens, commit steps and log-probs."""
    tokens, steps, logprob = [MASK] * gen_length, [0] * gen_length, [0.0] * gen_length
    P, shift, cache, nfe, block_step, block = len(prompt), int(model.config.logit_shift), NaiveCache(model), 0, 0, 0
    while True:
        known = tokens.index(MASK) if MASK in tokens else gen_length
        if known == gen_length:
            return tokens, steps, logprob, nfe
        if known // block_length != block:
            block, block_step = known // block_length, 0
        first, last = P + block * block_length, P + (block + 1) * block_length
        computed = list(range(P + gen_length))
        if block_step % (refresh or gen_length) != 0:
            computed = list(range(max(first - shift, 0), last if mode == "dual" else P + gen_length))
        logits = cache.logits(prompt.tolist() + tokens, computed).double()
        logits[:, MASK] = -math.inf
        nfe, block_step = nfe + 1, block_step + 1
        masked = [i for i in range(first, last) if tokens[i - P] == MASK]
        p = logits[[computed.index(max(i - shift, 0)) for i in masked]].log_softmax(dim=1)
        entropy = -torch.where(p > -math.inf, p.exp() * p, 0.0).sum(dim=1)
        order = entropy.argsort(stable=True).tolist()
        for rank, n in enumerate(order):
            if rank > 0 and entropy[order[:rank]].sum() > gamma:  # the sum without its largest member, the last
                break
            place = masked[n] - P
            tokens[place], steps[place], logprob[place] = int(p[n].argmax()), nfe, p[n].max().item()


@pytest.mark.parametrize("mode", ["prefix", "dual"])
@pytest.mark.parametrize("changes", [{}, {"logit_shift": True, "num_key_value_heads": 2}], ids=["plain", "shift"])
@pytest.mark.parametrize("refresh", [None, 2])
def test_against_one_prompt_at_a_time(random_model, random_prompts, mode, changes, refresh):
    model = random_model(seed=1, scale=0.6, vocab_size=16, eos_token_id=None, **changes)
    prompts = random_prompts(model, LENGTHS)
    out = diffpo.generate(model, prompts, 12, 4, RULE, cache=mode, cache_refresh=refresh, batch_size=5).trajectory
    exact = diffpo.generate(model, prompts, 12, 4, RULE).trajectory
    assert not torch.allclose(out.logprob, exact.logprob, atol=1e-2), "the cache must make a difference"
    for i, prompt in enumerate(prompts):
        tokens, steps, logprob, nfe = decode_alone(model, prompt, 12, 4, RULE.gamma[i].item(), mode, refresh)
        assert out.commit_step[i].tolist() == steps
        assert out.tokens[i].tolist() == tokens
        assert out.nfe[i] == nfe
        torch.testing.assert_close(out.logprob[i], torch.tensor(logprob), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
def test_a_refresh_in_every_step_is_exact(random_model, random_prompts, assert_same, mode, shift):
    model = random_model(
        seed=2, scale=0.6, vocab_size=16, logit_shift=shift, threshold_gammas=(0.0, 2.0), threshold_reads="both"
    )
    prompts = random_prompts(model, LENGTHS)
    for rule in (RULE, diffpo.PromptThreshold(sample=True)):
        exact = diffpo.generate(model, prompts, 12, 4, rule, 0.7, seed=1).trajectory
        cached = diffpo.generate(model, prompts, 12, 4, rule, 0.7, seed=1, cache=mode, cache_refresh=1, batch_size=4)
        assert_same(cached.trajectory, exact)


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_the_first_step_of_every_block_is_exact(random_model, random_prompts, mode):
    """Its log-probs are those of the exact network on the latent it saw."""
    model = random_model(seed=2, scale=0.6, vocab_size=16, logit_shift=True, eos_token_id=None)
    out = diffpo.generate(model, random_prompts(model, LENGTHS), 12, 4, RULE, 1.0, seed=1, cache=mode).trajectory
    exact = diffpo.trajectory_logprobs(model, out, range(int(out.nfe.max())))
    blocks = out.commit_step.view(6, 3, 4)
    first = (blocks == blocks.amin(dim=2, keepdim=True)).view(6, 12)
    assert (~first).sum() > 10
    torch.testing.assert_close(out.logprob[first], exact[first], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out.logprob[~first], exact[~first], atol=1e-3)


@pytest.mark.parametrize("mode", ["prefix", "dual"])
@pytest.mark.parametrize("refresh", [None, 3])
@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
def test_rows_and_static_steps_change_nothing(
    random_model, random_prompts, decode_with, assert_same, mode, refresh, shift
):
    model = random_model(seed=3, scale=0.6, vocab_size=16, logit_shift=shift)
    prompts = random_prompts(model, LENGTHS)
    options = {"temperature": 0.8, "seed": 4, "cache": mode, "cache_refresh": refresh}
    whole = diffpo.generate(model, prompts, 16, 4, RULE, **options).trajectory
    assert_same(diffpo.generate(model, prompts, 16, 4, RULE, **options, batch_size=4).trajectory, whole)
    for rows in (1, 3):
        assert_same(decode_with(static=True)(model, prompts, 16, 4, RULE, **options, batch_size=rows), whole)


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_a_cached_step_is_one_evaluation_of_fewer_positions(random_model, random_prompts, mode):
    model, shapes = random_model(seed=3, vocab_size=16, eos_token_id=None), []
    model.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    prompt = random_prompts(model, [20])
    out = diffpo.generate(model, prompt, 16, 4, diffpo.FixedSchedule(16), cache=mode)
    assert out.nfe.tolist() == [16]
    assert [rows for rows, _ in shapes] == [1] * 16
    following = {"dual": [4, 4, 4, 4], "prefix": [16, 12, 8, 4]}[mode]
    assert [width for _, width in shapes] == [width for n in following for width in (36, n, n, n)]


@pytest.mark.parametrize("mode", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
def test_a_prompt_may_be_empty(random_model, random_prompts, mode, shift):
    model = random_model(seed=1, logit_shift=shift, eos_token_id=None)
    # drawn, as all positions of an empty prompt's completion are alike at first: greedily, rounding would decide the order
    empty, options = (
        torch.zeros(0, dtype=torch.int64),
        {"rule": diffpo.FixedSchedule(2), "cache": mode, "temperature": 1.0},
    )
    alone = diffpo.generate(model, [empty], 4, **options)
    padded = diffpo.generate(model, [empty, *random_prompts(model, [5])], 4, **options)
    torch.testing.assert_close(padded.trajectory.logprob[0].sort()[0], alone.trajectory.logprob[0].sort()[0])
    assert torch.equal(padded.tokens[0], alone.tokens[0])


def rollout_gap(model, prompts, cache, **options):
    """Mean and largest |rollout - training log-prob| (nats) of the committed tokens, and the tokens."""
    out = diffpo.generate(model, prompts, temperature=1.0, seed=1, cache=cache, **options).trajectory
    scored = diffpo.trajectory_logprobs(model, out, range(int(out.nfe.max())))
    gap = (out.logprob - scored).abs()[out.committed]
    return gap.mean().item(), gap.max().item()


def test_rollout_and_training_log_probs(record_property):
    """Exact decoding: equal to rounding. Cached: the log-probs are those of the cached network, and off by what is recorded here."""
    model, task = diffpo.load("tiny-countdown"), get_task("countdown")
    prompts = [task.prompt(problem) for problem in task.problems("test", 24, 0)]
    options = {"gen_length": task.gen_length, "block_length": 6, "rule": diffpo.EntropyBounded(0.1)}
    gaps = {cache: rollout_gap(model, prompts, cache, **options) for cache in ("none", "prefix", "dual")}
    record_property("gap", gaps)
    assert gaps["none"][1] < 1e-4
    for cache in ("prefix", "dual"):
        mean, largest = gaps[cache]
        assert largest > 1e-3, "a cache that changes nothing was not used"
        assert mean < 0.5


BAD = {
    "unknown": ({"cache": "full"}, r"cache must be one of none, prefix, dual, got 'full'"),
    "refresh zero": ({"cache": "dual", "cache_refresh": 0}, r"cache_refresh.*at least 1.*got 0"),
    "refresh float": ({"cache": "dual", "cache_refresh": 2.0}, "cache_refresh"),
    "refresh without cache": ({"cache_refresh": 4}, r"cache_refresh needs cache="),
    "guidance": ({"cache": "prefix", "cfg_scale": 1.0}, r'cfg_scale 1.0 needs cache="none"'),
    "graph": ({"cuda_graph": True}, r"cuda_graph=True.*GPU.*cpu"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_errors_come_before_any_network_evaluation(random_model, forward_rows, changes, message):
    model = random_model()
    with forward_rows(model) as rows, pytest.raises(ValueError, match=message):
        diffpo.generate(model, [torch.tensor([3, 4])], 8, 4, **changes)
    assert rows == []


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_under_autocast(random_model, random_prompts, cache):
    """Keys come in bfloat16 there, the cache is float32 as the weights; tokens are as certain as bfloat16 leaves them."""
    model = random_model(seed=3)
    prompts = random_prompts(model, [5, 9])
    exact = diffpo.generate(model, prompts, 8, 4, cache=cache)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = diffpo.generate(model, prompts, 8, 4, cache=cache)
        scores = diffpo.trajectory_logprobs(model, out.trajectory, range(8))
    assert (out.tokens == exact.tokens).float().mean() > 0.7
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    if cache == "none":
        torch.testing.assert_close(scores.detach(), out.trajectory.logprob, rtol=0.05, atol=0.05)
