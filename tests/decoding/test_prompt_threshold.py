"""PromptThreshold: the threshold comes from the model's own head on the fully masked first pass."""

import pytest
import torch

import diffpo
from diffpo.keyed_random import uniform
from diffpo.likelihood.mean_field import mean_field
from diffpo.likelihood.score import score
from diffpo.models.layout import FirstPass
from diffpo_kernels import surrogate_loss

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


# Draws that explore


def test_explored_draws_follow_the_mixture(random_model, random_prompts, chi_square):
    model = random_model(seed=3, scale=0.5, threshold_gammas=BINS)
    (prompt,) = random_prompts(model, [5])
    mixture = 0.6 * head_probabilities(model, prompt, 2).double() + 0.4 / 4
    assert mixture.max() > 0.5
    assert mixture.min() < 0.11, "hardly drawn without exploration"
    rule = diffpo.PromptThreshold(sample=True, explore=0.4)
    out = diffpo.generate(model, prompt.expand(4000, -1), 2, rule=rule, seed=5)
    drawn = out.trajectory.actions["gamma"]
    assert chi_square(torch.bincount(drawn.choice, minlength=4), mixture) > 1e-3
    torch.testing.assert_close(drawn.logprob, mixture.log()[drawn.choice].float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(out.trajectory.gamma, torch.tensor(BINS)[drawn.choice])


def states(rows: int, seed: int) -> FirstPass:
    """Random hidden states of completions of three tokens behind no prompt."""
    hidden = torch.randn(rows, 3, 32, generator=torch.Generator().manual_seed(seed))
    return FirstPass(hidden, hidden[:, :0], torch.ones(rows, 0, dtype=torch.bool))


@pytest.mark.parametrize("explore", [1e-6, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("bias", [0.0, 3.0, 200.0])
def test_the_recorded_probability_is_that_of_the_mixture(random_model, explore, bias):
    """Against float64, and the draw against the inverse of its distribution; 200: the head's own probabilities underflow."""
    model = random_model(seed=5, threshold_gammas=BINS)
    model.threshold.linear.bias.data[1] = bias
    hidden, keys = states(500, seed=1), torch.arange(500) * 7
    with torch.no_grad():
        own = model.threshold(hidden).double().exp()
        found = diffpo.PromptThreshold(sample=True, explore=explore).thresholds(model, hidden, keys, 3)
    mixture = (1 - explore) * own + explore / 4
    torch.testing.assert_close(
        found.logprob.double(), mixture.gather(1, found.bin[:, None])[:, 0].log(), rtol=1e-5, atol=1e-6
    )
    upper = mixture.cumsum(dim=1)
    draw = uniform(3, 1, keys).double()[:, None]  # 1: the purpose of a threshold's draw
    near = (upper - draw).abs().amin(dim=1) < 1e-6  # rounding decides
    assert near.sum() <= 2
    expected = (upper <= draw).sum(dim=1).clamp(max=3)
    assert torch.equal(found.bin[~near], expected[~near])


def test_without_exploration_the_draws_are_the_heads(random_model):
    """Bit for bit what was drawn before there was exploration."""
    model = random_model(seed=5, threshold_gammas=BINS)
    hidden, keys = states(500, seed=1), torch.arange(500)
    logprob = model.threshold(hidden).detach()
    expected = (logprob.exp().cumsum(dim=1) <= uniform(3, 1, keys)[:, None]).sum(dim=1).clamp(max=3)
    for rule in (diffpo.PromptThreshold(sample=True), diffpo.PromptThreshold(sample=True, explore=0)):
        found = rule.thresholds(model, hidden, keys, 3)
        assert torch.equal(found.bin, expected)
        assert torch.equal(found.logprob, logprob.gather(1, expected[:, None])[:, 0])


def test_keys_decide_what_is_explored(random_model, random_prompts):
    """Not the order of the rows, nor which are decoded together."""
    model = random_model(seed=4, threshold_gammas=BINS)
    prompts, keys = random_prompts(model, [5, 3, 6, 4] * 10), torch.arange(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    rule = diffpo.PromptThreshold(sample=True, explore=0.5)

    def drawn(rows, **options):
        rows = torch.as_tensor(rows)
        chosen = [prompts[i] for i in rows.tolist()]
        return diffpo.generate(model, chosen, 4, rule=rule, row_ids=keys[rows], **options).trajectory.actions["gamma"]

    whole = drawn(range(40))
    assert len(whole.choice.unique()) == 4
    assert torch.equal(drawn(order).choice, whole.choice[order])
    assert torch.equal(drawn(range(40), batch_size=7).choice, whole.choice)
    assert not torch.equal(drawn(range(40), seed=1).choice, whole.choice)
    torch.testing.assert_close(drawn(order, batch_size=7).logprob, whole.logprob[order], rtol=1e-4, atol=1e-5)


def test_the_weight_of_an_explored_threshold_makes_up_for_the_exploration(random_model):
    """Over all draws of the mixture the gradient is that of the mean advantage under the head itself."""
    model = random_model(seed=6, threshold_gammas=BINS)
    hidden, advantage = states(1, seed=2), torch.randn(4)
    parameters = list(model.threshold.parameters())
    own = model.threshold(hidden)[0]
    wanted = torch.autograd.grad(-(own.exp() * advantage).sum(), parameters, retain_graph=True)
    mixture = 0.7 * own.exp().detach() + 0.3 / 4
    column = own[:, None]
    loss = surrogate_loss(
        logprob=column, old=column.detach(), behaviour=mixture.log()[:, None], weight_cap=2.0,
        advantage=4 * mixture * advantage, mask=torch.ones(4, 1, dtype=torch.bool),
    ).loss  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("explore", [-0.1, 1.1, float("nan"), True, "0.1", None])
def test_shares_that_are_none_are_refused(explore):
    with pytest.raises(ValueError, match="explore must be a share from 0 to 1"):
        diffpo.PromptThreshold(sample=True, explore=explore)


def test_only_draws_explore():
    with pytest.raises(ValueError, match="sample=True"):
        diffpo.PromptThreshold(explore=0.1)
    assert repr(diffpo.PromptThreshold("margin", sample=True, explore=0.1)) == (
        "PromptThreshold(order=margin, sample, explore=0.1)"
    )


def test_the_share_is_kept_where_the_order_is_filled_in(random_model):
    model = random_model(threshold_gammas=BINS)
    resolved = diffpo.PromptThreshold(sample=True, explore=0.1).resolve(model)
    assert (resolved.order, resolved.sample, resolved.explore) == (model.config.threshold_order, True, 0.1)


def test_without_an_order_nothing_is_planned():
    with pytest.raises(ValueError, match=r"resolve\(model\)"):
        diffpo.PromptThreshold().plan(None)


def test_model_without_a_threshold(random_model, random_prompts, forward_rows):
    model = random_model()
    with forward_rows(model) as rows, pytest.raises(ValueError, match="no learned threshold"):
        diffpo.generate(model, random_prompts(model, [4]), 4, rule=diffpo.PromptThreshold())
    assert rows == [], "the error must come before any network evaluation"


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_threshold_that_reads_the_prompt_reads_the_same_in_any_batch(random_model, random_prompts, cache):
    """Padding and other lengths in the batch play no part, and what is scored is what was drawn."""
    model = random_model(seed=7)
    model.add_threshold(BINS)
    torch.nn.init.normal_(model.threshold.linear.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    prompts, rule = random_prompts(model, [5, 3, 9, 1, 6, 4]), diffpo.PromptThreshold("confidence", sample=True)
    whole = diffpo.generate(model, prompts, 4, rule=rule, cache=cache).trajectory
    assert len(whole.actions["gamma"].choice.unique()) > 1
    for i, prompt in enumerate(prompts):
        alone = diffpo.generate(
            model, [prompt], 4, rule=rule, row_ids=torch.tensor([i]), cache=cache
        ).trajectory.actions["gamma"]
        assert alone.choice[0] == whole.actions["gamma"].choice[i]
        torch.testing.assert_close(alone.logprob[0], whole.actions["gamma"].logprob[i], rtol=1e-4, atol=1e-5)
    scored = score(model, whole, mean_field(whole, [0])).actions["gamma"]
    torch.testing.assert_close(scored, whole.actions["gamma"].logprob, rtol=1e-4, atol=1e-5)
