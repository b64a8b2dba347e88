"""pi(gamma | c): uniform at the start, a function of the mean hidden state of the masked completion."""

import pytest
import torch

from diffpo.models.layout import FirstPass
from diffpo.models.threshold import ThresholdPolicy


def first_pass(completion, prompt=None, real=None):
    """Without a prompt unless one is given, all of it real."""
    prompt = completion[:, :0] if prompt is None else prompt
    return FirstPass(completion, prompt, torch.ones(prompt.shape[:2], dtype=torch.bool) if real is None else real)


def test_fresh_policy_is_uniform_whatever_the_prompt():
    policy = ThresholdPolicy(32, tuple(i / 8 for i in range(9)))
    logprob = policy(first_pass(torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))))
    torch.testing.assert_close(logprob.exp(), torch.full((5, 9), 1 / 9))


def test_log_probabilities_of_the_mean_hidden_state():
    generator = torch.Generator().manual_seed(0)
    policy, hidden = ThresholdPolicy(8, (0.0, 1.0, 5.0), "completion"), torch.randn(4, 6, 8, generator=generator)
    with torch.no_grad():
        policy.linear.weight.copy_(torch.randn(3, 8, generator=generator))
        policy.linear.bias.copy_(torch.randn(3, generator=generator))
    got = policy(first_pass(hidden))
    for b in range(4):
        mean = sum(hidden[b, i] for i in range(6)) / 6
        scores = torch.stack([policy.linear.weight[g] @ mean + policy.linear.bias[g] for g in range(3)])
        torch.testing.assert_close(got[b].exp(), scores.exp() / scores.exp().sum())


def test_a_policy_that_reads_both_also_takes_the_mean_of_the_real_prompt():
    """Whatever stands in its padding."""
    generator = torch.Generator().manual_seed(0)
    policy = ThresholdPolicy(8, (0.0, 1.0, 5.0))
    completion, prompt = (torch.randn(4, n, 8, generator=generator) for n in (6, 5))
    real = torch.arange(5) >= torch.tensor([0, 2, 4, 5])[:, None]  # of the last row nothing
    torch.nn.init.normal_(policy.linear.weight, generator=generator)
    got = policy(first_pass(completion, prompt.masked_fill(~real[..., None], torch.nan), real))
    for b in range(4):
        means = [
            completion[b].double().mean(dim=0),
            prompt[b, real[b]].double().sum(dim=0) / max(int(real[b].sum()), 1),
        ]
        scores = policy.linear.weight.double() @ torch.cat(means) + policy.linear.bias.double()
        torch.testing.assert_close(got[b].double(), scores.log_softmax(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_mean_of_a_long_prompt_is_as_exact_as_its_states(dtype):
    """The sum of its states, 80,000, is beyond fp16."""
    policy = ThresholdPolicy(8, (0.0, 1.0)).to(dtype)
    policy.linear.weight.data[0, 8:] = 1 / 64
    prompt = torch.full((1, 2000, 8), 40.0, dtype=dtype) + torch.tensor(1e-9, dtype=dtype)
    got = policy(first_pass(torch.zeros(1, 3, 8, dtype=dtype), prompt))
    torch.testing.assert_close(got.exp(), torch.tensor([[5.0, 0.0]]).softmax(dim=1), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("gammas", [(), (-0.1,), (0.5, float("nan"))])
def test_bins_must_be_non_negative_numbers(gammas):
    with pytest.raises(ValueError, match="threshold_gammas"):
        ThresholdPolicy(8, gammas)


def test_add_threshold_gives_a_uniform_policy_and_records_the_bins(random_model):
    model = random_model()
    assert model.threshold is None
    model.add_threshold((0.0, 0.5))
    assert (model.config.threshold_gammas, model.config.threshold_reads) == ((0.0, 0.5), "both")
    torch.testing.assert_close(model.threshold(first_pass(torch.randn(3, 4, 32))).exp(), torch.full((3, 2), 0.5))
    model.add_threshold((0.0, 0.5), reads="completion")
    assert (model.config.threshold_reads, model.threshold.linear.in_features) == ("completion", 32)


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
    assert model.threshold(first_pass(hidden)).shape == (1, 2)
