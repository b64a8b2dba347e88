"""pi(gamma | c): uniform at the start, a function of the mean hidden state of the masked completion."""

import pytest
import torch

from diffpo.models.threshold import ThresholdPolicy


def test_fresh_policy_is_uniform_whatever_the_prompt():
    policy = ThresholdPolicy(32, tuple(i / 8 for i in range(9)))
    logprob = policy(torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(logprob.exp(), torch.full((5, 9), 1 / 9))


def test_log_probabilities_of_the_mean_hidden_state():
    generator = torch.Generator().manual_seed(0)
    policy, hidden = ThresholdPolicy(8, (0.0, 1.0, 5.0)), torch.randn(4, 6, 8, generator=generator)
    with torch.no_grad():
        policy.linear.weight.copy_(torch.randn(3, 8, generator=generator))
        policy.linear.bias.copy_(torch.randn(3, generator=generator))
    got = policy(hidden)
    for b in range(4):
        mean = sum(hidden[b, i] for i in range(6)) / 6
        scores = torch.stack([policy.linear.weight[g] @ mean + policy.linear.bias[g] for g in range(3)])
        torch.testing.assert_close(got[b].exp(), scores.exp() / scores.exp().sum())


@pytest.mark.parametrize("gammas", [(), (-0.1,), (0.5, float("nan"))])
def test_bins_must_be_non_negative_numbers(gammas):
    with pytest.raises(ValueError, match="threshold_gammas"):
        ThresholdPolicy(8, gammas)


def test_add_threshold_gives_a_uniform_policy_and_records_the_bins(random_model):
    model = random_model()
    assert model.threshold is None
    model.add_threshold((0.0, 0.5))
    assert model.config.threshold_gammas == (0.0, 0.5)
    torch.testing.assert_close(model.threshold(torch.randn(3, 4, 32)).exp(), torch.full((3, 2), 0.5))


def test_refused_bins_leave_the_model_as_it_was(random_model):
    model = random_model()
    with pytest.raises(ValueError, match="threshold_gammas"):
        model.add_threshold((-1.0,))
    assert model.threshold is None
    assert model.config.threshold_gammas is None


def test_add_threshold_follows_the_dtype_of_the_model(random_model):
    model = random_model().to(torch.bfloat16)
    model.add_threshold((0.0, 0.5))
    hidden = model(torch.full((1, 4), 2))
    assert model.threshold(hidden).shape == (1, 2)
