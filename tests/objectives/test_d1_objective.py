"""d1: mean-field likelihood behind a randomly masked prompt, in a clipped token-level loss with a k3 KL."""

import copy

import pytest
import torch

import diffpo
from diffpo.config import AlgorithmConfig
from diffpo.objectives import OBJECTIVES

MASK, PAD = 2, 0


def d1(**changes):
    objective = OBJECTIVES["d1"]
    return objective(AlgorithmConfig(**{"name": "d1"} | objective.defaults["algorithm"] | changes))


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
    defaults = OBJECTIVES["d1"].defaults["algorithm"]
    assert OBJECTIVES["d1"].defaults["rollout"] == {"speed_exponent": 0.0}, "d1 rewards correctness alone"
    published = {
        "clip": 0.5, "kl_coefficient": 0.04, "inner_updates": 12, "group_size": 6, "prompt_mask_probability": 0.15,
        "importance_correction": False, "m": 1, "normalisation": "token", "fresh_views": True,
    }  # fmt: skip
    assert {name: defaults[name] for name in published} == published
    AlgorithmConfig(name="d1", **defaults)


def test_prompt_tokens_are_masked_at_the_given_rate(rollouts):
    _, trajectory = rollouts([30, 22] * 20, 2)
    objective, masked, total = d1(group_size=2), 0, 0
    for inner in range(4):
        view = objective.view(trajectory, 3, inner)
        masked += (view.trajectory.prompt_ids == MASK).sum().item() / 2
        total += trajectory.prompt_mask.sum().item() / 2
    assert masked / total == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / total) ** 0.5)


def test_only_prompt_tokens_change(rollouts):
    _, trajectory = rollouts([9, 4, 6], 2)
    before = trajectory.prompt_ids.clone()
    view = d1(group_size=2, prompt_mask_probability=0.5).view(trajectory, 1)
    changed = view.trajectory.prompt_ids != trajectory.prompt_ids
    assert changed.any()
    assert (view.trajectory.prompt_ids[changed] == MASK).all()
    assert not changed[~trajectory.prompt_mask].any()
    assert torch.equal(trajectory.prompt_ids, before), "the rollouts themselves stay as they were"
    for name in ("prompt_mask", "tokens", "commit_step", "logprob", "nfe", "length"):
        assert torch.equal(getattr(view.trajectory, name), getattr(trajectory, name))
    assert list(view.boundaries) == [0]
    extreme = [d1(prompt_mask_probability=p).view(trajectory, 1).trajectory.prompt_ids for p in (0.0, 1.0)]
    assert torch.equal(extreme[0], trajectory.prompt_ids)
    assert torch.equal(extreme[1], trajectory.prompt_ids.masked_fill(trajectory.prompt_mask, MASK))


def test_a_group_shares_its_mask_and_groups_differ(rollouts, forward_rows):
    model, trajectory = rollouts([20, 20, 20], 4)
    view = d1(group_size=4, prompt_mask_probability=0.5).view(trajectory, 1, 2)
    masks = (view.trajectory.prompt_ids == MASK).reshape(3, 4, 20)
    assert (masks == masks[:, :1]).all()
    assert len(masks[:, 0].unique(dim=0)) == 3
    with forward_rows(model) as rows:
        view.score(model)
    assert rows == [3]


def test_masks_are_a_function_of_the_key(rollouts):
    _, trajectory = rollouts([20], 2)
    objective = d1(group_size=2)
    ids = [objective.view(trajectory, *key).trajectory.prompt_ids for key in ((1, 0), (1, 0), (1, 1))]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])


def test_value_and_gradient_equal_the_formula(rollouts, naive_logprobs):
    old_model, trajectory = rollouts([15, 9, 12], 2, seed=4)
    theta, reference = copy.deepcopy(old_model), copy.deepcopy(old_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (theta, reference):
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    objective = d1(group_size=2)
    view = objective.view(trajectory, 8)
    assert (view.trajectory.prompt_ids == MASK).any()
    advantage = torch.tensor([1.0, -1.0, 0.4, -0.4, 2.0, -2.0])
    with torch.no_grad():
        old_scores, reference_scores = view.score(old_model), view.score(reference)
    loss, diagnostics = objective.loss(view.trajectory, advantage, view.score(theta), old_scores, reference_scores)

    mean_field = [[0]] * 6
    new = naive_logprobs(theta, view.trajectory, mean_field)
    with torch.no_grad():
        old = naive_logprobs(old_model, view.trajectory, mean_field)
        ref = naive_logprobs(reference, view.trajectory, mean_field)
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
    assert diagnostics["clip_fraction"] == pytest.approx(clipped / len(terms))
    parameters = list(theta.parameters())
    gradients = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * (1 + b.abs().max().item()))
