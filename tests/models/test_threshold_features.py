"""What a threshold can read beside mean states: the prompt by attention, and the entropies of the first pass."""

from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpo
from diffpo.likelihood.mean_field import mean_field
from diffpo.likelihood.score import score
from diffpo.models.layout import FirstPass
from diffpo.models.model_config import Reads
from diffpo.models.threshold import ThresholdPolicy, policy_shapes, threshold_logprobs

BINS = (0.0, 0.3, 1.0, 4.0)
MASK = 2
READS = get_args(Reads)


def randomised(policy, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=size, generator=generator)
    return policy


def states(seed=0):
    """A pass of four rows, of whose prompts 5, 3, 1 and 0 positions are real; the others hold what is no number."""
    generator = torch.Generator().manual_seed(seed)
    completion, prompt = (torch.randn(4, n, 8, generator=generator) for n in (6, 5))
    real = torch.arange(5) >= torch.tensor([0, 2, 4, 5])[:, None]
    return FirstPass(completion, prompt.masked_fill(~real[..., None], torch.nan), real)


def test_attention_weighs_the_real_states_by_their_product_with_the_query():
    policy, first = randomised(ThresholdPolicy(8, BINS, "attention")), states()
    got, query = policy(first), policy.query.weight[0].double()
    for b in range(4):
        pooled = torch.zeros(8, dtype=torch.float64)
        own = first.prompt[b, first.real[b]].double()
        weights = [(state @ query / 8**0.5).exp() for state in own]
        for state, weight in zip(own, weights, strict=True):
            pooled += weight / sum(weights) * state
        features = torch.cat([first.completion[b].double().mean(dim=0), pooled])
        scores = policy.linear.weight.double() @ features + policy.linear.bias.double()
        torch.testing.assert_close(got[b].double(), scores.log_softmax(dim=0), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got[:, 0].sum(), list(policy.parameters()))
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def test_attention_starts_as_the_mean():
    policy, mean, first = ThresholdPolicy(8, BINS, "attention"), ThresholdPolicy(8, BINS), states()
    torch.nn.init.normal_(policy.linear.weight, generator=torch.Generator().manual_seed(1))
    mean.load_state_dict({name: tensor for name, tensor in policy.state_dict().items() if name != "query.weight"})
    torch.testing.assert_close(policy(first), mean(first), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [0, 2000])
def test_attention_over_no_prompt_and_over_a_long_one_in_half_precision(length):
    policy = ThresholdPolicy(8, (0.0, 1.0), "attention").to(torch.float16)
    policy.linear.weight.data[0, 8:] = 1 / 64
    prompt = torch.full((1, length, 8), 40.0, dtype=torch.float16)
    first = FirstPass(torch.zeros(1, 3, 8, dtype=torch.float16), prompt, torch.ones(1, length, dtype=torch.bool))
    expected = torch.tensor([[5.0 if length else 0.0, 0.0]]).softmax(dim=1)
    torch.testing.assert_close(policy(first).exp(), expected, rtol=1e-2, atol=1e-4)


def test_entropies_are_those_of_the_masked_positions_without_the_mask(random_model):
    model = random_model(3, scale=0.6, vocab_size=9, threshold_gammas=BINS, threshold_reads="entropies")
    prompt = torch.randint(3, 9, (4, 5), generator=torch.Generator().manual_seed(0))
    hidden = model(torch.cat([prompt, torch.full((4, 6), MASK)], dim=1)).detach()
    first = FirstPass(hidden[:, 5:], hidden[:, :5], torch.ones(4, 5, dtype=torch.bool))
    got = threshold_logprobs(model, first)
    logits = model.head(first.completion).detach().double()
    logits[..., MASK] = -torch.inf
    entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    parts = [first.completion.mean(dim=1), first.prompt.mean(dim=1)]
    statistics = [entropy.mean(dim=1), entropy.amin(dim=1), entropy.amax(dim=1)]
    features = torch.cat([*parts, torch.stack(statistics, dim=1).float()], dim=1)
    torch.testing.assert_close(got, model.threshold.linear(features).log_softmax(dim=1), rtol=1e-4, atol=1e-5)
    some = threshold_logprobs(model, first, torch.tensor([2, 0, 2]))
    torch.testing.assert_close(some[[0, 2]], got[[0, 2]], rtol=1e-5, atol=1e-6)
    assert (some[[1, 3]] - got[[1, 3]]).abs().max() > 1e-3, "those of others are not computed"
    head = torch.autograd.grad(got.sum(), model.lm_head.weight, allow_unused=True)
    assert head == (None,), "an entropy is what the policy sees, not what it does"


@pytest.mark.parametrize("reads", READS)
def test_what_is_drawn_is_what_is_scored_and_costs_no_evaluation(random_model, random_prompts, forward_rows, reads):
    model = random_model(8, scale=0.5, vocab_size=9, threshold_gammas=BINS, threshold_reads=reads, logit_shift=True)
    randomised(model.threshold, 8, 0.1)
    prompts = [prompt for prompt in random_prompts(model, [3, 7, 5]) for _ in range(2)]
    with forward_rows(model) as decoded:
        out = diffpo.generate(model, prompts, 8, 4, diffpo.PromptThreshold(sample=True), 1.0, seed=8)
    assert sum(decoded) <= out.nfe.sum()
    trajectory, drawn = out.trajectory, out.trajectory.actions["gamma"]
    assert len(drawn.choice.unique()) > 1
    latents = mean_field(trajectory, range(4))
    for tokens_at_once in (None, 30):
        with forward_rows(model) as scored:
            got = score(model, trajectory, latents, tokens_at_once).actions["gamma"]
        assert sum(scored) < len(latents), "each distinct input once"
        torch.testing.assert_close(got, drawn.logprob, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(got.sum(), list(model.threshold.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_form_is_stored_and_loaded(random_model, tmp_path, reads, dtype):
    model = random_model().to(dtype)
    model.add_threshold(BINS, "margin", reads)
    randomised(model.threshold)
    assert {name: tensor.shape for name, tensor in model.threshold.state_dict().items()} == policy_shapes(
        model.config.hidden_size, 4, reads
    )
    model.save(tmp_path)
    again = diffpo.load(tmp_path)
    assert again.config == model.config
    assert again.config.threshold_reads == reads
    for name, tensor in model.threshold.state_dict().items():
        assert torch.equal(again.threshold.state_dict()[name], tensor)


@pytest.mark.parametrize("reads", ["attention", "entropies"])
def test_a_threshold_file_of_another_form_is_refused(random_model, tmp_path, reads):
    model = random_model(model_type="llada")
    model.add_threshold(BINS, reads=reads)
    model.save(tmp_path)
    assert diffpo.load(tmp_path).config.threshold_reads == reads
    path = tmp_path / "diffpo_threshold.st"
    settings = {"gammas": "[0.0, 0.3, 1.0, 4.0]", "order": "entropy", "reads": "both"}
    save_file(load_file(path), path, metadata=settings)
    with pytest.raises(ValueError, match="holds another threshold"):
        diffpo.load(tmp_path)
    save_file(load_file(path), path, metadata=settings | {"reads": "entropy"})
    with pytest.raises(ValueError, match="completion, both, attention or entropies"):
        diffpo.load(tmp_path)
