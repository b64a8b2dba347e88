"""d1: mean-field likelihood behind a randomly masked prompt, in a clipped token-level loss with a k3 KL."""

import copy
from dataclasses import replace

import pytest
import torch

import diffpo
from diffpo.likelihood.score import network_inputs, score
from diffpo.objectives import Batch
from diffpo.objectives.d1 import D1, D1Config

MASK, PAD = 2, 0


def d1(**changes):
    return D1(D1Config(**changes))


def batch_of(trajectory, group_size, advantage=None):
    advantage = torch.zeros(len(trajectory)) if advantage is None else torch.tensor(advantage)
    return Batch(replace(trajectory, group=trajectory.key // group_size), advantage, advantage)


def prompts_of(batch, latents):
    """The prompt ids that the network reads, one row a rollout."""
    return network_inputs(batch.trajectory, latents, latents.row.argsort())[0]


@pytest.fixture
def rollouts(random_model, random_prompts):
    """rollouts(lengths, group_size) -> model, trajectory."""

    def build(lengths, group_size, seed=0):
        model = random_model(seed, scale=0.5, vocab_size=12)
        prompts = [prompt for prompt in random_prompts(model, lengths, seed) for _ in range(group_size)]
        out = diffpo.generate(model, prompts, 6, 3, diffpo.EntropyBounded(1.5), temperature=1.0, seed=seed)
        return model, out.trajectory

    return build


def test_published_defaults():
    assert D1.rollout == {"speed_exponent": 0.0}, "d1 rewards correctness alone"
    published = {
        "clip": 0.5, "kl_coefficient": 0.04, "inner_updates": 12, "group_size": 6, "prompt_mask_probability": 0.15,
        "fresh_latents": True, "train": ("model",),
    }  # fmt: skip
    config = D1Config()
    assert {name: getattr(config, name) for name in published} == published


@pytest.mark.parametrize("name", ["m", "importance_correction", "weight_cap", "normalisation"])
def test_settings_that_d1_does_not_have_are_refused(name):
    with pytest.raises(ValueError, match=name):
        D1Config(**{name: 1})


def test_prompt_tokens_are_masked_at_the_given_rate(rollouts):
    _, trajectory = rollouts([30, 22] * 20, 2)
    objective, batch, masked, total = d1(), batch_of(trajectory, 2), 0, 0
    for inner in range(4):
        ids = prompts_of(batch, objective.latents(batch, 3, inner))
        masked += (ids == MASK).sum().item() / 2
        total += trajectory.prompt_mask.sum().item() / 2
    assert masked / total == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / total) ** 0.5)


def test_only_prompt_tokens_change(rollouts):
    _, trajectory = rollouts([9, 4, 6], 2)
    batch, before = batch_of(trajectory, 2), trajectory.prompt_ids.clone()
    latents = d1(prompt_mask_probability=0.5).latents(batch, 1)
    ids = prompts_of(batch, latents)
    changed = ids != trajectory.prompt_ids
    assert changed.any()
    assert (ids[changed] == MASK).all()
    assert not changed[~trajectory.prompt_mask].any()
    assert torch.equal(trajectory.prompt_ids, before), "the rollouts themselves stay as they were"
    assert latents.masked.all(), "the mean field"
    extreme = [prompts_of(batch, d1(prompt_mask_probability=p).latents(batch, 1)) for p in (0.0, 1.0)]
    assert torch.equal(extreme[0], trajectory.prompt_ids)
    assert torch.equal(extreme[1], trajectory.prompt_ids.masked_fill(trajectory.prompt_mask, MASK))


def test_a_group_shares_its_mask_and_groups_differ(rollouts, forward_rows):
    model, trajectory = rollouts([20, 20, 20], 4)
    batch = batch_of(trajectory, 4)
    latents = d1(prompt_mask_probability=0.5).latents(batch, 1, 2)
    masks = (prompts_of(batch, latents) == MASK).reshape(3, 4, 20)
    assert (masks == masks[:, :1]).all()
    assert len(masks[:, 0].unique(dim=0)) == 3
    with forward_rows(model) as rows:
        score(model, trajectory, latents)
    assert rows == [3]


def test_masks_are_a_function_of_keys_and_not_of_places_or_padding(rollouts):
    _, trajectory = rollouts([20, 8], 2)
    objective, batch = d1(prompt_mask_probability=0.5), batch_of(trajectory, 2)
    ids = [prompts_of(batch, objective.latents(batch, *key)) for key in ((1, 0), (1, 0), (1, 1))]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])
    half = batch[torch.tensor([3, 2])]
    narrow = replace(half.trajectory, prompt_ids=half.trajectory.prompt_ids[:, -8:],
                     prompt_mask=half.trajectory.prompt_mask[:, -8:])  # fmt: skip
    half = Batch(narrow, half.reward, half.advantage)
    assert torch.equal(prompts_of(half, objective.latents(half, 1, 0)), ids[0][[3, 2], -8:])


def test_value_and_gradient_equal_the_formula(rollouts, naive_logprobs):
    old_model, trajectory = rollouts([15, 9, 12], 2, seed=4)
    theta, reference = copy.deepcopy(old_model), copy.deepcopy(old_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (theta, reference):
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    objective, batch = d1(), batch_of(trajectory, 2, [1.0, -1.0, 0.4, -0.4, 2.0, -2.0])
    advantage, latents = batch.advantage, objective.latents(batch, 8)
    masked = replace(trajectory, prompt_ids=prompts_of(batch, latents))
    assert (masked.prompt_ids == MASK).any()
    with torch.no_grad():
        old_scores, reference_scores = (score(model, trajectory, latents) for model in (old_model, reference))
    loss, metrics = objective.loss(batch, advantage, score(theta, trajectory, latents), old_scores, reference_scores)

    mean_field = [[0]] * 6
    new = naive_logprobs(theta, masked, mean_field)
    with torch.no_grad():
        old = naive_logprobs(old_model, masked, mean_field)
        ref = naive_logprobs(reference, masked, mean_field)
    terms, clipped = [], 0
    for i in range(6):
        for k in range(int(trajectory.length[i])):
            rho, A = (new[i, k] - old[i, k]).exp(), advantage[i]
            inside = rho.clamp(0.5, 1.5)
            clipped += bool(inside * A < rho * A)
            gap = ref[i, k] - new[i, k]
            terms.append(-torch.minimum(rho * A, inside * A) + 0.04 * (gap.exp() - gap - 1))
    expected = sum(terms) / len(terms)
    assert clipped > 0
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(clipped / len(terms))
    parameters = list(theta.parameters())
    gradients = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * (1 + b.abs().max().item()))
