"""ESPO: a random-mask bound of the whole completion, one ratio a sequence, against loops over masks and tokens."""

import copy

import pytest
import torch

import diffpo
from diffpo.likelihood.random_masks import random_masks
from diffpo.likelihood.score import score
from diffpo.objectives import Batch
from diffpo.objectives.espo import Espo, EspoConfig


@pytest.fixture
def rollouts(random_model, random_prompts):
    model = random_model(3, scale=0.5, vocab_size=9)
    prompts = [prompt for prompt in random_prompts(model, [3, 6], 3) for _ in range(2)]
    out = diffpo.generate(model, prompts, 6, 3, diffpo.EntropyBounded(1.5), temperature=1.0, seed=3)
    advantage = torch.tensor([1.0, -1.0, 2.0, -0.5])
    return model, Batch(out.trajectory, advantage, advantage)


def moved(model, seed):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other


def bounds(model, trajectory, latents):
    """The estimate of each rollout, one network evaluation a latent."""
    found = [torch.zeros(())] * len(trajectory)
    for p in range(len(latents)):
        b = int(latents.row[p])
        prompt = trajectory.prompt_ids[b][trajectory.prompt_mask[b]]
        completion = torch.where(latents.masked[p], trajectory.mask_id, trajectory.tokens[b])
        logits = model.logits(torch.cat([prompt, completion])[None])[0, len(prompt) :]
        logits = logits.index_fill(1, torch.tensor([trajectory.mask_id]), -torch.inf)
        masked = [k for k in range(6) if latents.masked[p, k]]
        total = sum(logits.log_softmax(dim=1)[k, trajectory.tokens[b, k]] for k in masked)
        found[b] = found[b] + total * 7 / len(masked) / 4  # (L + 1) / l, two pairs of two
    return torch.stack(found)


def test_value_and_gradient_equal_the_formula(rollouts):
    model, batch = rollouts
    theta, reference = moved(model, 1), moved(model, 2)
    objective = Espo(EspoConfig(kl_coefficient=0.3))
    latents = objective.latents(batch, 8)
    with torch.no_grad():
        old, ref = (score(network, batch.trajectory, latents) for network in (model, reference))
    loss, metrics = objective.loss(batch, batch.advantage, score(theta, batch.trajectory, latents), old, ref)
    new = bounds(theta, batch.trajectory, latents)
    with torch.no_grad():
        old, ref = (bounds(network, batch.trajectory, latents) for network in (model, reference))
    expected, clipped = torch.zeros(()), 0
    for i, A in enumerate(batch.advantage):
        rho = ((new[i] - old[i]) / 6).exp()
        inside = rho.clamp(0.8, 1.2)
        clipped += bool(inside * A < rho * A)
        expected = expected - torch.minimum(rho * A, inside * A) / 4 + 0.3 * (new[i] - ref[i]) ** 2 / 12 / 4
    assert clipped > 0
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    parameters = list(theta.parameters())
    for a, b in zip(*(torch.autograd.grad(value, parameters) for value in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * (1 + b.abs().max().item()))
    assert metrics["kl"] > 0


def test_masks_come_with_their_complements_and_weights(rollouts):
    _, batch = rollouts
    latents = random_masks(batch.trajectory, 3, 5)
    for b in range(4):
        mine = latents.masked[latents.row == b]
        assert (mine.sum(dim=0) == 3).all(), "each position is masked in one of a pair"
    count = latents.masked.sum(dim=1)
    assert (count > 0).all()
    torch.testing.assert_close(latents.weight, latents.masked * (7 / count / 6)[:, None])


def test_masks_are_keyed_by_the_rollout_and_not_by_its_place(rollouts):
    _, batch = rollouts
    whole, half = random_masks(batch.trajectory, 2, 5), random_masks(batch.trajectory[[3, 1]], 2, 5)
    for place, b in enumerate([3, 1]):
        assert torch.equal(whole.masked[whole.row == b], half.masked[half.row == place])


def test_the_estimate_is_unbiased(random_model, random_prompts):
    """The mean over many masks of the estimate is the bound itself, here by enumerating all masks of three tokens."""
    model = random_model(1, scale=0.5, vocab_size=7)
    (prompt,) = random_prompts(model, [3])
    trajectory = diffpo.generate(model, [prompt] * 4000, 3, rule=diffpo.FixedSchedule(3)).trajectory
    with torch.no_grad():
        drawn = score(model, trajectory, random_masks(trajectory, 1, 0)).sequence()
        exact = torch.zeros(())
        for size in (1, 2, 3):  # l is uniform in 0 .. 3, and given l the mask is
            masks = [m for m in torch.cartesian_prod(*[torch.tensor([False, True])] * 3) if m.sum() == size]
            for mask in masks:
                latent = torch.where(mask, trajectory.mask_id, trajectory.tokens[0])
                logits = model.logits(torch.cat([prompt, latent])[None])[0, 3:]
                logits[:, trajectory.mask_id] = -torch.inf
                logprob = logits.log_softmax(dim=1)[torch.arange(3), trajectory.tokens[0]]
                exact += (logprob * mask).sum() * 4 / size / len(masks) / 4
    error = drawn.std() / len(drawn) ** 0.5
    assert (drawn.mean() - exact).abs() < 4 * error
