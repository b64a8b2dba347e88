"""Seeds, batch layout and the sampling distribution."""

import pytest
import torch

import diffpo

MASK = 2
RULES = [
    diffpo.FixedSchedule(6),
    diffpo.ConfidenceThreshold(0.5),
    diffpo.EntropyBounded(1.0),
    diffpo.PromptThreshold(sample=True),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_size_changes_nothing(random_model, random_prompts, rule, temperature):
    model = random_model(seed=1, scale=0.5, vocab_size=16, threshold_gammas=(0.0, 0.5, 2.0))
    prompts = random_prompts(model, [5, 2, 7, 3, 5, 1, 6, 4, 4])
    whole = diffpo.generate(model, prompts, 12, 4, rule, temperature=temperature, seed=3)
    for batch_size in (1, 2, 4, 100):
        split = diffpo.generate(model, prompts, 12, 4, rule, temperature=temperature, seed=3, batch_size=batch_size)
        for name in ("tokens", "commit_step", "nfe", "length", "prompt_ids", "prompt_mask", "key"):
            assert torch.equal(getattr(split.trajectory, name), getattr(whole.trajectory, name)), name
        for name, action in whole.trajectory.actions.items():
            assert torch.equal(split.trajectory.actions[name].choice, action.choice), name
        torch.testing.assert_close(split.trajectory.logprob, whole.trajectory.logprob, rtol=1e-4, atol=1e-5)


def test_seed(random_model, random_prompts):
    model = random_model(seed=2, scale=0.3)
    prompts = random_prompts(model, [5] * 8)

    def tokens(**options):
        return diffpo.generate(model, prompts, 8, 4, diffpo.EntropyBounded(2.0), **options).tokens

    drawn = tokens(temperature=1.0, seed=0)
    torch.manual_seed(123)  # the global generator plays no part
    assert torch.equal(tokens(temperature=1.0, seed=0), drawn)
    assert not torch.equal(tokens(temperature=1.0, seed=1), drawn)
    assert torch.equal(tokens(seed=0), tokens(seed=1)), "an argmax needs no seed"


def test_equal_prompts_get_different_draws(random_model, random_prompts):
    model = random_model(seed=2, scale=0.3)
    (prompt,) = random_prompts(model, [5])
    out = diffpo.generate(model, prompt.expand(50, -1), 8, rule=diffpo.EntropyBounded(5.0), temperature=1.0)
    assert len(out.tokens.unique(dim=0)) > 40


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_single_tokens_follow_the_tempered_softmax(random_model, random_prompts, chi_square, temperature):
    model = random_model(seed=3, scale=0.5, vocab_size=12)
    (prompt,) = random_prompts(model, [5])
    out = diffpo.generate(model, prompt.expand(4000, -1), 1, temperature=temperature, seed=7)
    logits = model.logits(torch.cat([prompt, torch.tensor([MASK])])[None])[0, -1].detach()
    logits[MASK] = -torch.inf
    expected = (logits / temperature).log_softmax(dim=0)
    assert chi_square(torch.bincount(out.tokens[:, 0], minlength=12), expected.exp()) > 1e-3
    torch.testing.assert_close(out.trajectory.logprob[:, 0], expected[out.tokens[:, 0]], rtol=1e-4, atol=1e-5)
    assert out.trajectory.temperature == temperature


def test_guided_tokens_follow_the_guided_softmax(random_model, random_prompts, chi_square):
    model = random_model(seed=4, scale=0.3, vocab_size=12)
    (prompt,) = random_prompts(model, [5])
    out = diffpo.generate(model, prompt.expand(4000, -1), 1, temperature=0.8, cfg_scale=0.7, seed=7)
    guided = model.logits(torch.cat([prompt, torch.tensor([MASK])])[None])[0, -1].detach()
    free = model.logits(torch.full((1, 6), MASK))[0, -1].detach()
    logits = free + 1.7 * (guided - free)
    logits[MASK] = -torch.inf
    expected = (logits / 0.8).log_softmax(dim=0)
    assert chi_square(torch.bincount(out.tokens[:, 0], minlength=12), expected.exp()) > 1e-3
    torch.testing.assert_close(out.trajectory.logprob[:, 0], expected[out.tokens[:, 0]], rtol=1e-4, atol=1e-5)


def test_positions_of_one_step_are_drawn_independently(random_model, random_prompts, chi_square):
    model = random_model(seed=5, scale=0.4, vocab_size=6, eos_token_id=None)
    (prompt,) = random_prompts(model, [5])
    out = diffpo.generate(model, prompt.expand(4000, -1), 2, rule=diffpo.FixedSchedule(1), temperature=1.0)
    logits = model.logits(torch.cat([prompt, torch.tensor([MASK, MASK])])[None])[0, -2:].detach()
    logits[:, MASK] = -torch.inf
    first, second = logits.softmax(dim=1)
    cell = out.tokens[:, 0] * 6 + out.tokens[:, 1]
    assert chi_square(torch.bincount(cell, minlength=36), torch.outer(first, second).flatten()) > 1e-3


def test_the_mask_token_is_never_committed(random_model, random_prompts):
    model = random_model(seed=6, scale=0.1)
    with torch.no_grad():  # a head that loves the mask token
        model.lm_head.weight[MASK] = model(torch.full((1, 8), MASK))[0].mean(dim=0) * 5
    prompts = random_prompts(model, [5] * 4)
    assert (
        model.logits(torch.cat([torch.stack(prompts), torch.full((4, 8), MASK)], 1))[:, 5:].argmax(-1) == MASK
    ).any()
    for temperature in (0.0, 1.0):
        for rule in (diffpo.FixedSchedule(4), diffpo.EntropyBounded(1.0), diffpo.ConfidenceThreshold(0.1)):
            out = diffpo.generate(model, prompts, 8, rule=rule, temperature=temperature)
            assert (out.tokens != MASK).all()
            assert out.trajectory.logprob.isfinite().all()


def test_generate_leaves_no_graph_and_does_not_touch_the_model(random_model, random_prompts):
    model = random_model(threshold_gammas=(0.0, 1.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = diffpo.generate(model, random_prompts(model, [4, 6]), 8, rule=diffpo.PromptThreshold())
    assert not out.trajectory.logprob.requires_grad
    assert not out.trajectory.actions["gamma"].logprob.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
