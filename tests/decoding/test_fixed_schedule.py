"""FixedSchedule against LLaDA's reference decoding loop, token for token."""

import pytest
import torch

import diffpo

MASK, PAD = 2, 0


def reference_decoding(model, prompts, gen_length, block_length, steps, cfg_scale=0.0):
    """The published loop at temperature 0: the whole batch in lock step, the whole sequence through the head in each step.

    Returns tokens [B, L], the step that committed each [B, L] and the number of steps that committed something.
    """
    B, P = len(prompts), max(len(prompt) for prompt in prompts)
    x = torch.full((B, P + gen_length), MASK)
    attention_mask = torch.ones(B, P + gen_length, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        x[i, :P] = torch.cat([torch.full((P - len(prompt),), PAD), prompt])
        attention_mask[i, : P - len(prompt)] = 0
    is_prompt = attention_mask.bool() & (torch.arange(P + gen_length) < P)
    step_of, evaluations = torch.zeros_like(x), 0
    assert gen_length % block_length == 0
    blocks = gen_length // block_length
    assert steps % blocks == 0
    per_block = steps // blocks
    for block in range(blocks):
        first, last = P + block * block_length, P + (block + 1) * block_length
        masked_per_row = (x[:, first:last] == MASK).sum(dim=1).tolist()
        for step in range(per_block):
            counts = [n // per_block + (1 if step < n % per_block else 0) for n in masked_per_row]
            if not any(counts):
                continue  # more steps than tokens: the reference evaluates and commits nothing
            logits = model.logits(x, attention_mask)
            if cfg_scale > 0:
                without_prompt = model.logits(torch.where(is_prompt, MASK, x), attention_mask)
                logits = without_prompt + (cfg_scale + 1) * (logits - without_prompt)
            logits[..., MASK] = -torch.inf
            proposal = logits.argmax(dim=-1)
            confidence = logits.softmax(dim=-1).gather(2, proposal[..., None])[..., 0]
            confidence[x != MASK] = -torch.inf
            confidence[:, last:] = -torch.inf
            evaluations += 1
            for i in range(B):
                chosen = confidence[i].topk(counts[i]).indices
                x[i, chosen] = proposal[i, chosen]
                step_of[i, chosen] = evaluations
    return x[:, P:], step_of[:, P:], evaluations


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"attention_bias": True},
        {"logit_shift": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1, "attention_bias": True, "logit_shift": True, "vocab_size": 12},
    ],
    ids=["plain", "grouped", "bias", "shift", "tied", "all"],
)
@pytest.mark.parametrize(
    ("lengths", "gen_length", "block_length", "steps"),
    [
        ([5, 5, 5], 12, 12, 12),
        ([1, 9, 4, 6], 12, 4, 6),
        ([3, 8], 16, 8, 10),  # 8 tokens in 5 steps: 2 2 2 1 1
        ([7], 12, 6, 2),
        ([2, 3], 9, 3, 6),
        ([4, 4], 1, 1, 1),
    ],
)
def test_token_for_token(random_model, random_prompts, forward_rows, changes, lengths, gen_length, block_length, steps):
    for seed in range(2):
        model = random_model(seed=seed, **changes)
        prompts = random_prompts(model, lengths, seed)
        tokens, step_of, evaluations = reference_decoding(model, prompts, gen_length, block_length, steps)
        with forward_rows(model) as rows:
            out = diffpo.generate(model, prompts, gen_length, block_length, diffpo.FixedSchedule(steps))
        assert torch.equal(out.tokens, tokens)
        assert torch.equal(out.trajectory.commit_step, step_of)
        assert out.nfe.tolist() == [evaluations] * len(lengths) == [steps] * len(lengths)
        assert rows == [len(lengths)] * steps


@pytest.mark.parametrize("cfg_scale", [0.5, 2.0])
@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
def test_classifier_free_guidance(random_model, random_prompts, forward_rows, cfg_scale, shift):
    for seed in range(3):
        model = random_model(seed=seed, logit_shift=shift, vocab_size=20)
        prompts = random_prompts(model, [2, 7, 5], seed)
        tokens, step_of, evaluations = reference_decoding(model, prompts, 12, 4, 6, cfg_scale)
        with forward_rows(model) as rows:
            out = diffpo.generate(model, prompts, 12, 4, diffpo.FixedSchedule(6), cfg_scale=cfg_scale)
        assert torch.equal(out.tokens, tokens)
        assert torch.equal(out.trajectory.commit_step, step_of)
        assert out.nfe.tolist() == [evaluations] * 3
        assert sum(rows) == 2 * 3 * evaluations  # a guided step evaluates the network twice
        assert not torch.equal(tokens, diffpo.generate(model, prompts, 12, 4, diffpo.FixedSchedule(6)).tokens)


def test_more_steps_than_tokens_spend_one_step_a_token(random_model, random_prompts):
    model = random_model(seed=5)
    prompts = random_prompts(model, [3, 6])
    tokens, step_of, evaluations = reference_decoding(model, prompts, 8, 4, 20)
    out = diffpo.generate(model, prompts, 8, 4, diffpo.FixedSchedule(20))
    assert torch.equal(out.tokens, tokens)
    assert torch.equal(out.trajectory.commit_step, step_of)
    assert out.nfe.tolist() == [evaluations] * 2 == [8, 8]


def test_the_default_is_one_block_and_one_token_a_step(random_model, random_prompts):
    model = random_model(seed=6)
    prompts = random_prompts(model, [3, 6])
    tokens, step_of, _ = reference_decoding(model, prompts, 8, 8, 8)
    out = diffpo.generate(model, prompts, 8)
    assert torch.equal(out.tokens, tokens)
    assert torch.equal(out.trajectory.commit_step, step_of)


def test_every_position_is_decoded_also_after_an_eos(random_model, random_prompts):
    model = random_model(seed=7, vocab_size=8)
    out = diffpo.generate(model, random_prompts(model, [4] * 20), 12, 4, diffpo.FixedSchedule(6))
    after_eos = (out.tokens == 1).cumsum(dim=1).roll(1, dims=1).bool()
    after_eos[:, 0] = False
    assert after_eos.any(), "no row with an EOS: the test says nothing"
    assert (out.trajectory.commit_step > 0).all()
    assert (out.tokens[after_eos] != 1).any()


def test_order_and_tokens_at_a_temperature(random_model, random_prompts, chi_square):
    """Two positions, two steps: the first committed is the one whose *drawn* token has the larger untempered probability."""
    temperature, count = 1.5, 6000
    model = random_model(seed=3, scale=0.4, vocab_size=7)
    (prompt,) = random_prompts(model, [4])
    out = diffpo.generate(
        model, prompt.expand(count, -1), 2, rule=diffpo.FixedSchedule(2), temperature=temperature, seed=1
    )
    logits = model.logits(torch.cat([prompt, torch.tensor([MASK, MASK])])[None])[0, -2:].double()
    logits[:, MASK] = -torch.inf
    drawn, confidence = (logits / temperature).softmax(1), logits.softmax(1)
    probability = torch.zeros(2, 7, dtype=torch.float64)  # first position, its token
    for a in range(7):
        for b in range(7):
            first = 0 if confidence[0, a] > confidence[1, b] else 1
            probability[first, (a, b)[first]] += drawn[0, a] * drawn[1, b]
    first = out.trajectory.commit_step.argmin(dim=1)
    cell = first * 7 + out.tokens.gather(1, first[:, None])[:, 0]
    assert 0.1 < (first == 0).float().mean() < 0.9
    assert chi_square(torch.bincount(cell, minlength=14), probability.flatten()) > 1e-3
