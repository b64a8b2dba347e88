"""PromptThreshold: the threshold comes from the model's own head on the fully masked first pass."""

import pytest
import torch

import diffpo

MASK = 2
BINS = (0.0, 0.3, 1.0, 4.0)


def head_probabilities(model, prompt, gen_length):
    """pi(gamma | c) [bins] of one prompt: the completion's hidden states at z_0, averaged, through the linear head."""
    hidden = model(torch.cat([prompt, torch.full((gen_length,), MASK)])[None])[0, -gen_length:]
    return (hidden.mean(dim=0) @ model.threshold.linear.weight.T + model.threshold.linear.bias).softmax(dim=0).detach()


def test_mode_is_the_most_probable_bin(random_model, random_prompts, forward_rows):
    model = random_model(seed=1, threshold_gammas=BINS, logit_shift=True)
    model.threshold.linear.bias.data.zero_()
    prompts = random_prompts(model, [3, 8, 5, 1, 6, 4, 7, 2] * 2)
    probabilities = torch.stack([head_probabilities(model, prompt, 12) for prompt in prompts])
    modes = probabilities.argmax(dim=1)
    assert len(modes.unique()) > 2, "the prompts should differ in their thresholds"
    with forward_rows(model) as rows:
        out = diffpo.generate(model, prompts, 12, 6, diffpo.PromptThreshold(), batch_size=5)
    assert torch.equal(out.trajectory.actions["gamma"].choice, modes)
    assert torch.equal(out.trajectory.gamma, torch.tensor(BINS)[modes])
    torch.testing.assert_close(
        out.trajectory.actions["gamma"].logprob, probabilities.amax(dim=1).log(), rtol=1e-4, atol=1e-5
    )
    assert sum(rows) == out.nfe.sum(), "the threshold costs no network evaluation"
    # then it is the entropy-bounded rule with these thresholds
    plain = diffpo.generate(model, prompts, 12, 6, diffpo.EntropyBounded(torch.tensor(BINS)[modes]))
    assert torch.equal(out.tokens, plain.tokens)
    assert torch.equal(out.trajectory.commit_step, plain.trajectory.commit_step)


@pytest.mark.parametrize("order", ["entropy", "confidence", "margin"])
def test_order_is_passed_on(random_model, random_prompts, order):
    model = random_model(seed=2, threshold_gammas=(1.0,))
    prompts = random_prompts(model, [4, 7, 5])
    out = diffpo.generate(model, prompts, 12, 6, diffpo.PromptThreshold(order=order))
    plain = diffpo.generate(model, prompts, 12, 6, diffpo.EntropyBounded(1.0, order))
    assert torch.equal(out.trajectory.commit_step, plain.trajectory.commit_step)


def test_samples_follow_the_head(random_model, random_prompts, chi_square):
    model = random_model(seed=3, scale=0.5, threshold_gammas=BINS)
    (prompt,) = random_prompts(model, [5])
    with torch.no_grad():
        model.threshold.linear.weight.mul_(0.2)
    probabilities = head_probabilities(model, prompt, 2)
    assert probabilities.min() > 0.01
    out = diffpo.generate(model, prompt.expand(4000, -1), 2, rule=diffpo.PromptThreshold(sample=True), seed=5)
    bins = out.trajectory.actions["gamma"].choice
    assert chi_square(torch.bincount(bins, minlength=4), probabilities) > 1e-3
    torch.testing.assert_close(out.trajectory.actions["gamma"].logprob, probabilities.log()[bins], rtol=1e-4, atol=1e-5)
    assert torch.equal(out.trajectory.gamma, torch.tensor(BINS)[bins])


def test_sampled_thresholds_depend_on_seed_and_row_but_not_on_the_batch(random_model, random_prompts):
    model = random_model(seed=4, threshold_gammas=BINS)
    model.threshold.linear.weight.data.zero_(), model.threshold.linear.bias.data.zero_()
    prompts = random_prompts(model, [5] * 40)
    rule = diffpo.PromptThreshold(sample=True)

    def bins(seed, batch_size=None):
        out = diffpo.generate(model, prompts, 4, rule=rule, seed=seed, batch_size=batch_size)
        return out.trajectory.actions["gamma"].choice

    assert torch.equal(bins(0), bins(0, batch_size=7))
    assert not torch.equal(bins(0), bins(1))
    assert len(bins(0).unique()) == 4


def test_threshold_draws_and_token_draws_are_independent(random_model, random_prompts, chi_square):
    """One random number used twice would tie the token of the first step to the threshold."""
    model = random_model(seed=6, scale=0.2, threshold_gammas=(0.0, 1.0), vocab_size=8)
    model.threshold.linear.weight.data.zero_(), model.threshold.linear.bias.data.zero_()
    (prompt,) = random_prompts(model, [5])
    rule = diffpo.PromptThreshold(sample=True)
    out = diffpo.generate(model, prompt.expand(4000, -1), 1, rule=rule, temperature=1.0)
    logits = model.logits(torch.cat([prompt, torch.tensor([MASK])])[None])[0, -1].detach()
    logits[MASK] = -torch.inf
    cell = out.trajectory.actions["gamma"].choice * 8 + out.tokens[:, 0]
    joint = torch.outer(torch.tensor([0.5, 0.5]), logits.softmax(0)).flatten()
    assert chi_square(torch.bincount(cell, minlength=16), joint) > 1e-3


def test_without_an_order_nothing_is_planned():
    with pytest.raises(ValueError, match=r"resolve\(model\)"):
        diffpo.PromptThreshold().plan(None)


def test_model_without_a_threshold(random_model, random_prompts, forward_rows):
    model = random_model()
    with forward_rows(model) as rows, pytest.raises(ValueError, match="no learned threshold"):
        diffpo.generate(model, random_prompts(model, [4]), 4, rule=diffpo.PromptThreshold())
    assert rows == [], "the error must come before any network evaluation"
