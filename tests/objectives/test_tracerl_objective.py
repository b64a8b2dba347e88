"""TraceRL: the merged trace, a mean over its latents, against a loop over latents and tokens."""

import copy

import pytest
import torch

import diffpo
from diffpo.likelihood.score import score
from diffpo.objectives import Batch
from diffpo.objectives.tracerl import TraceRL, TraceRLConfig


def test_value_and_gradient_equal_the_formula(random_model, random_prompts, naive_logprobs):
    model = random_model(5, scale=0.5, vocab_size=9)
    theta, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theta.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    prompts = [prompt for prompt in random_prompts(model, [3, 6], 3) for _ in range(3)]
    trajectory = diffpo.generate(model, prompts, 8, 4, diffpo.EntropyBounded(1.0), temperature=0.8, seed=5).trajectory
    advantage = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, -2.0])
    batch, objective = (
        Batch(trajectory, advantage, advantage),
        TraceRL(TraceRLConfig(merged_steps=2, kl_coefficient=0.1)),
    )
    latents = objective.latents(batch, 1)
    with torch.no_grad():
        old_scores = score(model, trajectory, latents)
    loss, metrics = objective.loss(batch, advantage, score(theta, trajectory, latents), old_scores, None)

    T = int(trajectory.nfe.max())
    boundaries = [list(range(0, T, 2))] * 6
    new = naive_logprobs(theta, trajectory, boundaries)
    with torch.no_grad():
        old = naive_logprobs(model, trajectory, boundaries)
    of_latents, clipped = [], 0
    for i, A in enumerate(advantage):
        for j in range(0, T, 2):
            terms, kls = [], []
            for k in range(int(trajectory.length[i])):
                if j < trajectory.commit_step[i, k] <= j + 2:
                    gap = new[i, k] - old[i, k]
                    rho, inside = gap.exp(), gap.exp().clamp(0.8, 1.2)
                    clipped += bool(inside * A < rho * A)
                    terms.append(-torch.minimum(rho * A, inside * A))
                    kls.append((-gap).exp() + gap - 1)
            if terms:
                of_latents.append(sum(terms) / len(terms) + 0.1 * sum(kls))
    expected = sum(of_latents) / len(of_latents)
    assert clipped > 0
    assert len(of_latents) > 8
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    parameters = list(theta.parameters())
    for a, b in zip(*(torch.autograd.grad(value, parameters) for value in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * (1 + b.abs().max().item()))
    assert metrics["kl"] > 0


def test_one_step_a_latent_is_the_exact_likelihood(random_model, random_prompts):
    model = random_model(5, scale=0.5, vocab_size=9)
    prompts = random_prompts(model, [3, 6], 3)
    trajectory = diffpo.generate(model, prompts, 8, rule=diffpo.EntropyBounded(1.0), temperature=1.0).trajectory
    batch = Batch(trajectory, torch.zeros(2), torch.zeros(2))
    with torch.no_grad():
        scores = score(model, trajectory, TraceRL(TraceRLConfig(merged_steps=1)).latents(batch, 1))
    torch.testing.assert_close(scores.tokens(), trajectory.logprob, rtol=1e-4, atol=1e-4)


def test_settings_that_tracerl_does_not_have_are_refused():
    with pytest.raises(ValueError, match="weight_cap"):
        TraceRLConfig(weight_cap=2.0)
