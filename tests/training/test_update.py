"""An update in parts is the update at once; half a batch, in any order, draws and scores what the whole batch does."""

import copy
from dataclasses import replace

import pytest
import torch

import diffpo
from diffpo.likelihood.latents import Latents
from diffpo.likelihood.mean_field import mean_field
from diffpo.likelihood.score import score
from diffpo.objectives import OBJECTIVES, Batch
from diffpo.training.update import accumulate_gradient

EVERY = [(name, {}) for name in OBJECTIVES] + [
    ("diffpo", {"m": 0, "prompt_mask_probability": 0.3}),
    ("diffpo", {"m": 4}),
    ("diffpo", {"importance_weights": "quarter", "weight_cap": 1.2}),
    ("diffpo", {"importance_weights": "sequence", "weight_cap": 1.2}),
]
every_objective = pytest.mark.parametrize(("name", "changes"), EVERY, ids=str)


@pytest.fixture
def rollouts(random_model, random_prompts):
    """model, batch: three groups of two, prompts of three lengths, thresholds drawn."""
    model = random_model(7, scale=0.5, vocab_size=9, threshold_gammas=(0.5, 1.5, 4.0))
    prompts = [prompt for prompt in random_prompts(model, [3, 6, 4], 7) for _ in range(2)]
    rule = diffpo.PromptThreshold(sample=True)
    trajectory = diffpo.generate(model, prompts, 8, 4, rule, temperature=0.9, seed=7).trajectory
    trajectory = replace(trajectory, key=trajectory.key * 5 + 11, group=trajectory.key // 2)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -1.5])
    return model, Batch(trajectory, advantage, advantage)


def moved(model, seed=1):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return other


def gradient_of(model, objective, batch, latents, old, reference, tokens_at_once):
    model.zero_grad()
    signal = objective.signal(batch, old, reference)
    loss, scores = accumulate_gradient(model, objective, batch, latents, signal, old, reference, tokens_at_once)
    return loss, scores, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@every_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("first", [True, False], ids=["first update", "later update"])
def test_parts_change_nothing_but_rounding(rollouts, name, changes, dtype, first):
    model, batch = rollouts
    model = model.to(dtype)
    theta = model if first else moved(model)
    objective = OBJECTIVES[name](OBJECTIVES[name].Config(kl_coefficient=0.1, group_size=2, **changes))
    latents = objective.latents(batch, 3)
    with torch.no_grad():
        old = None if first else score(model, batch.trajectory, latents)
        reference = score(moved(model, 2), batch.trajectory, latents)
    whole = gradient_of(theta, objective, batch, latents, old, reference, None)
    tolerance = {"rtol": 0, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for tokens in (14, 40, 75):  # one sequence is 14 tokens wide
        parts = gradient_of(theta, objective, batch, latents, old, reference, tokens)
        torch.testing.assert_close(parts[0].value, whole[0].value, **tolerance)
        torch.testing.assert_close(parts[1].logprob, whole[1].logprob, **tolerance)
        assert len(parts[2]) == len(whole[2])
        for a, b in zip(parts[2], whole[2], strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    assert max(g.abs().max() for g in whole[2]) > 1e-3


@every_objective
def test_half_a_batch_in_any_order_draws_and_scores_alike(rollouts, name, changes):
    model, batch = rollouts
    objective = OBJECTIVES[name](OBJECTIVES[name].Config(**changes))

    def tokens(chosen):
        with torch.no_grad():
            return score(model, chosen.trajectory, objective.latents(chosen, 3), 28).tokens()

    order = torch.tensor([5, 4, 1, 0])
    torch.testing.assert_close(tokens(batch[order]), tokens(batch)[order], rtol=1e-5, atol=1e-5)


def test_a_part_is_no_larger_than_asked(rollouts, forward_rows):
    model, batch = rollouts
    latents = mean_field(batch.trajectory, range(8))
    with forward_rows(model) as rows, torch.no_grad():
        score(model, batch.trajectory, latents, 45)
    assert max(rows) == 3
    with forward_rows(model) as together, torch.no_grad():
        score(model, batch.trajectory, latents)
    assert together == [sum(rows)], "each distinct input once, however it is cut"


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_part_too_small_for_one_sequence(rollouts, forward_rows, tokens):
    model, batch = rollouts
    with forward_rows(model) as rows, pytest.raises(ValueError, match="tokens_at_once must be at least 14"):
        score(model, batch.trajectory, mean_field(batch.trajectory, [0]), tokens)
    assert rows == []


@pytest.mark.parametrize("tokens", [17.5, "20", [20]], ids=repr)
def test_a_part_of_no_whole_number_of_tokens(rollouts, tokens):
    model, batch = rollouts
    with pytest.raises(ValueError, match="tokens_at_once must be an int"):
        score(model, batch.trajectory, mean_field(batch.trajectory, [0]), tokens)


def test_a_frozen_model_gets_no_gradient(rollouts):
    model, batch = rollouts
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("threshold."))
    objective = OBJECTIVES["diffpo"](OBJECTIVES["diffpo"].Config(train=("threshold",), group_size=2))
    latents = objective.latents(batch, 3)
    whole, parts = (gradient_of(model, objective, batch, latents, None, None, tokens)[2] for tokens in (None, 14))
    assert len(whole) == len(parts) == 2
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_latents_have_no_scores(rollouts):
    model, batch = rollouts
    trajectory = replace(batch.trajectory, actions={})
    nothing = Latents(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8, dtype=torch.bool), torch.zeros(0, 8))
    assert torch.equal(score(model, trajectory, nothing).tokens(), torch.zeros(6, 8))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask_id": 5}, "mask token is 5"),
        ({"tokens": 50}, "holds token 50"),
        ({"tokens": -1}, "holds token -1"),
        ({"cfg_scale": 1.0}, "cfg_scale 1.0"),
    ],
)
def test_a_trajectory_of_another_model_is_refused(rollouts, forward_rows, change, named):
    model, batch = rollouts
    change = {k: torch.full_like(batch.trajectory.tokens, v) if k == "tokens" else v for k, v in change.items()}
    trajectory = replace(batch.trajectory, **change)
    with forward_rows(model) as rows, pytest.raises(ValueError, match=named):
        score(model, trajectory, mean_field(trajectory, [0]))
    assert rows == []


def test_a_trajectory_with_a_threshold_that_the_model_has_not_is_refused(rollouts, forward_rows):
    model, batch = rollouts
    drawn = batch.trajectory.actions["gamma"]
    trajectory = replace(batch.trajectory, actions={"gamma": drawn._replace(choice=torch.full_like(drawn.choice, 3))})
    with forward_rows(model) as rows, pytest.raises(ValueError, match=r"it drew threshold 3, .* this model has 3"):
        score(model, trajectory, mean_field(trajectory, [0]))
    assert rows == []
