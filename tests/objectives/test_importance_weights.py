"""Pooled importance weights against a loop over tokens, their means, and where they leave the gradient's direction."""

import math
from dataclasses import replace

import pytest
import torch

import diffpo
from diffpo.likelihood.latents import Latents, Scores
from diffpo.likelihood.score import score
from diffpo.objectives import Batch
from diffpo.objectives.diffpo import Diffpo, DiffpoConfig

BINS = (0.5, 1.5, 4.0)
KINDS = ("token", "quarter", "sequence")


@pytest.fixture
def scored(random_model, random_prompts):
    """batch, latents, new and old scores of an objective: six rollouts, thresholds drawn, the model moved since."""
    model = random_model(19, scale=0.5, vocab_size=7, threshold_gammas=BINS)
    prompts = [prompt for prompt in random_prompts(model, [3, 6, 4], 19) for _ in range(2)]
    rule = diffpo.PromptThreshold(sample=True, explore=0.5)
    trajectory = diffpo.generate(model, prompts, 8, 4, rule, temperature=0.9, seed=19).trajectory
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -1.5])
    batch = Batch(replace(trajectory, group=trajectory.key // 2), advantage, advantage)

    def build(**settings):
        objective = Diffpo(DiffpoConfig(kl_coefficient=0.0, group_size=2, **settings))
        latents = objective.latents(batch, 5, 8)
        with torch.no_grad():
            old = score(model, trajectory, latents)
            generator = torch.Generator().manual_seed(1)
            moved = old.value + 0.3 * torch.randn(old.value.shape, generator=generator)
        return objective, batch, replace(old, value=moved.requires_grad_()), old

    return build


def naive_weights(kind, trajectory, old, cap):
    """[B][L]: capped weights, None where a token does not count."""
    B, L = trajectory.tokens.shape
    counts = [[k for k in range(L) if trajectory.scored[i, k]] for i in range(B)]
    gap = {(i, k): old[i][k] - trajectory.logprob[i, k].item() for i in range(B) for k in counts[i]}
    raw = {}
    for (i, k), value in gap.items():
        if kind == "token":
            raw[i, k] = math.exp(value)
        elif kind == "sequence":
            raw[i, k] = math.exp(sum(gap[i, j] for j in counts[i]) / len(counts[i]))
        else:
            quarter = {place: int((trajectory.commit_step[place] - 1) * 4 // trajectory.nfe[place[0]]) for place in gap}
            peers = [math.exp(gap[place]) for place in gap if quarter[place] == quarter[i, k]]
            raw[i, k] = math.exp(value) / (sum(peers) / len(peers))
    return [[min(cap, raw[i, k]) if (i, k) in raw else None for k in range(L)] for i in range(B)]


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize("cap", [1.1, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_those_of_a_loop_over_tokens(scored, kind, cap, normalisation):
    objective, batch, new, old = scored(importance_weights=kind, weight_cap=cap, normalisation=normalisation)
    signal = objective.signal(batch, old, None)
    loss = objective.loss(batch, signal, new, old, None)
    (gradient,) = torch.autograd.grad(loss.value, new.value)

    t, new_tokens = batch.trajectory, new.tokens()
    weights = naive_weights(kind, t, old.tokens().tolist(), cap)
    rows, used = [], []
    for i, row in enumerate(weights):
        own = (old.actions["gamma"][i] - t.actions["gamma"].logprob[i]).exp().item()
        terms = [min(cap, own) * signal[i, 0]]  # the ratio of an unmoved threshold is 1
        used.append(min(cap, own))
        for k, weight in enumerate(row):
            if weight is not None:
                ratio, advantage = (new_tokens[i, k] - old.tokens()[i, k]).exp(), signal[i, 1 + k]
                terms.append(weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
                used.append(weight)
        rows.append(terms)
    if normalisation == "sequence":
        expected = -sum(sum(terms) / len(terms) for terms in rows) / len(rows)
    else:
        expected = -sum(map(sum, rows)) / sum(map(len, rows))
    torch.testing.assert_close(loss.value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, new.value)[0], rtol=1e-3, atol=1e-6)
    assert loss.metrics["weight_mean"] == pytest.approx(sum(used) / len(used), rel=1e-4)
    assert loss.metrics["weight_max"] == pytest.approx(max(used), rel=1e-4)
    assert cap == math.inf or max(used) == cap, "the case should cap"


def test_each_quarter_counts_alike_and_the_threshold_keeps_its_own_weight(scored):
    found = {}
    for kind in KINDS:
        objective, batch, new, old = scored(importance_weights=kind, weight_cap=math.inf)
        found[kind] = objective.loss(batch, objective.signal(batch, old, None), new, old, None).metrics
    mean, own = found["quarter"]["bin/weight_mean"], found["token"]["bin/weight_mean"]
    torch.testing.assert_close(mean, torch.ones(4), rtol=1e-5, atol=0)
    assert (own - 1).abs().max() > 0.1
    # the mean over all tokens: those of the quarters, and the thresholds, whose weights are no part of a quarter's mean
    thresholds = (old.actions["gamma"] - batch.trajectory.actions["gamma"].logprob).exp()
    tokens = batch.trajectory.scored.sum()
    expected = (tokens + thresholds.sum()) / (tokens + len(thresholds))
    torch.testing.assert_close(found["quarter"]["weight_mean"], expected, rtol=1e-4, atol=0)
    for name in ("bin/surrogate_kl", "bin/ess_uncapped", "bin/weight_histogram", "weight_histogram"):
        for kind in KINDS:
            assert torch.equal(found[kind][name], found["token"][name]), (
                "the gap is of the tokens, whatever is made of it"
            )


def test_values_of_tokens_that_do_not_count_do_not_matter(scored):
    for kind in KINDS:
        objective, batch, new, old = scored(importance_weights=kind)
        t = batch.trajectory
        assert not t.scored.all()
        other = replace(batch, trajectory=replace(t, logprob=torch.where(t.scored, t.logprob, torch.nan)))
        losses = [objective.loss(b, batch.advantage, new, old, None).value for b in (batch, other)]
        assert torch.equal(*losses)


REWARD, TRUE = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([4, 2, 1, 1]) / 8  # of four answers of one token


def gradient_at(surrogate, kind, factor=1.0):
    """The loss's gradient in the logits of a surrogate likelihood, over rollouts that hold each answer as often as it is drawn."""
    token = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    column = torch.ones(8, 1, dtype=torch.int64)
    trajectory = diffpo.Trajectory(
        prompt_ids=column, prompt_mask=column.bool(), tokens=token[:, None], commit_step=column,
        logprob=(TRUE[token] * factor).log()[:, None], entropy=torch.zeros(8, 1), gamma=torch.zeros(8), nfe=column[:, 0],
        length=column[:, 0], key=torch.arange(8), group=column[:, 0], version=column[:, 0], mask_id=4, temperature=1.0,
        block_length=1,
    )  # fmt: skip
    latents = Latents(torch.arange(8), column.bool(), torch.ones(8, 1))
    cap = {} if kind == "none" else {"weight_cap": math.inf}
    objective = Diffpo(DiffpoConfig(train=("model",), importance_weights=kind, kl_coefficient=0.0, **cap))
    logits = surrogate.log().clone().requires_grad_()
    places = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.int64)], dim=1)
    scores = Scores(latents, 8, places, logits.log_softmax(dim=0)[token], {})
    batch = Batch(trajectory, REWARD[token], REWARD[token])
    loss = objective.loss(batch, batch.advantage, scores, scores.detach(), None).value
    return torch.autograd.grad(loss, logits)[0]


def test_weighted_gradients_are_that_of_the_expected_reward_under_the_surrogate():
    surrogate = torch.tensor([0.1, 0.4, 0.3, 0.2])
    logits = surrogate.log().requires_grad_()
    (expected,) = torch.autograd.grad(-(logits.softmax(dim=0) * REWARD).sum(), logits)
    for kind in KINDS:
        torch.testing.assert_close(gradient_at(surrogate, kind), expected, rtol=1e-4, atol=1e-6)
    direction = torch.nn.functional.cosine_similarity(gradient_at(surrogate, "none"), expected, dim=0)
    assert direction < 0.99, "without weights the gradient is another"
    # a surrogate that is off by one factor everywhere scales the gradient, unless weights are divided by their mean
    torch.testing.assert_close(gradient_at(surrogate, "token", 5.0), expected / 5, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient_at(surrogate, "quarter", 5.0), expected, rtol=1e-4, atol=1e-6)
