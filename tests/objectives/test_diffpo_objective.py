"""The DiFFPO loss against the formula, one token at a time; the random boundaries of the surrogate."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

import diffpo
from diffpo.likelihood.score import network_inputs, score
from diffpo.objectives import Batch
from diffpo.objectives.diffpo import Diffpo, DiffpoConfig, draw_boundaries

MASK = 2
BINS = (0.5, 1.5, 4.0)


def perturbed(model, seed, size):
    """A copy with noise on every parameter."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def loss_of(objective, model, batch, latents, old=None, reference=None):
    """The loss of a model on latents; old None: the model itself is the old one."""
    new = score(model, batch.trajectory, latents)
    return objective.loss(batch, batch.advantage, new, old or new.detach(), reference)


def batch_of(trajectory, advantage=(1.0, -1.0, 0.5, -0.5, 2.0, -1.5)):
    """Rollouts in groups of two."""
    advantage = torch.tensor(advantage)
    return Batch(replace(trajectory, group=trajectory.key // 2), advantage, advantage)


def naive_loss(config, new, old, reference, behaviour, scored, advantage):
    """-J + beta KL. Per rollout a list of tokens; each value is a scalar tensor. Token 0 of a rollout may be the threshold.

    new, old, reference (None: no KL), behaviour: [B][1 + L]; behaviour None stands for a weight of 1.
    scored: [B][1 + L] bool; advantage: [B].
    """
    per_row, divergences, clipped, capped = [], [], 0, 0
    for i, row in enumerate(scored):
        terms, kls = [], []
        for k, counts in enumerate(row):
            if not counts:
                continue
            rho = (new[i][k] - old[i][k].detach()).exp()
            weight = torch.ones(())
            if config.importance_weights != "none" and behaviour[i][k] is not None:
                weight = (old[i][k] - behaviour[i][k]).exp().detach()
                capped += bool(weight > config.weight_cap)
                weight = torch.minimum(weight, torch.tensor(config.weight_cap))
            inside = torch.clamp(rho, 1 - config.clip, 1 + config.clip)
            terms.append(weight * torch.minimum(rho * advantage[i], inside * advantage[i]))
            clipped += bool(inside * advantage[i] < rho * advantage[i])
            kl = torch.zeros(())
            if reference is not None and reference[i][k] is not None:
                gap = reference[i][k].detach() - new[i][k]
                kl = gap.exp() - gap - 1
            kls.append(kl)
        per_row.append(terms)
        divergences.append(kls)
    if config.normalisation == "token":
        count = sum(len(terms) for terms in per_row)
        J = sum(itertools.chain.from_iterable(per_row)) / count
        KL = sum(itertools.chain.from_iterable(divergences)) / count
    else:
        J = sum(sum(terms) / len(terms) for terms in per_row) / len(per_row)
        KL = sum(sum(kls) / len(kls) for kls in divergences) / len(per_row)
    return -J + config.kl_coefficient * KL, clipped, capped


def gamma_logprobs(model, trajectory):
    """log pi(gamma | c) [B] from one unpadded pass over the fully masked completion of each rollout."""
    L, values = trajectory.tokens.shape[1], []
    for b in range(len(trajectory)):
        prompt = trajectory.prompt_ids[b][trajectory.prompt_mask[b]]
        hidden = model(torch.cat([prompt, torch.full((L,), MASK)])[None])[0, -L:].mean(dim=0)
        scores = model.threshold.linear.weight @ hidden + model.threshold.linear.bias
        values.append(scores.log_softmax(dim=0)[trajectory.actions["gamma"].choice[b]])
    return torch.stack(values)


@pytest.fixture
def rollouts(random_model, random_prompts):
    """rollouts(seed, learned) -> model, trajectory: 3 prompts, 2 rollouts each, thresholds drawn from the model if ``learned``."""

    def build(seed, learned=True):
        model = random_model(seed, scale=0.5, vocab_size=7, threshold_gammas=BINS if learned else None)
        prompts = [prompt for prompt in random_prompts(model, [3, 6, 4], seed) for _ in range(2)]
        rule = diffpo.PromptThreshold(sample=True) if learned else diffpo.EntropyBounded(2.5)
        return model, diffpo.generate(model, prompts, 8, 4, rule, temperature=0.9, seed=seed).trajectory

    return build


def rows_of_boundaries(trajectory, m, *key):
    """The boundaries of the objective's latents as one list per row."""
    boundaries = draw_boundaries(trajectory.nfe, trajectory.key, m, *key, 0)
    return torch.stack([torch.as_tensor(tau).expand(len(trajectory)) for tau in boundaries], dim=1).tolist()


CASES = {
    "published": {},
    "no correction": {"importance_weights": "none"},
    "low cap, wide clip": {"weight_cap": 1.0, "clip": 0.5},
    "no cap": {"weight_cap": float("inf")},
    "KL": {"kl_coefficient": 0.3},
    "token normalisation": {"normalisation": "token", "kl_coefficient": 0.1},
    "mean field": {"m": 1},
    "three times": {"m": 3},
    "exact": {"m": 0},
}


@pytest.mark.parametrize("learned", [False, True], ids=["fixed threshold", "joint"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_value_and_gradient_equal_the_formula(rollouts, naive_logprobs, learned, changes):
    model, trajectory = rollouts(19, learned)
    theta, reference = perturbed(model, 1, 0.03), perturbed(model, 2, 0.02)
    config = DiffpoConfig(train=("model", "threshold") if learned else ("model",), **{"kl_coefficient": 0.0} | changes)
    objective, batch = Diffpo(config), batch_of(trajectory)
    latents, advantage = objective.latents(batch, 5, 8), batch.advantage
    use_kl = config.kl_coefficient > 0
    with torch.no_grad():
        old_scores = score(model, trajectory, latents)
        reference_scores = score(reference, trajectory, latents) if use_kl else None
    loss, _ = loss_of(objective, theta, batch, latents, old_scores, reference_scores)
    parameters = list(theta.parameters())
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)

    boundaries = rows_of_boundaries(trajectory, config.m, 5, 8)
    new = naive_logprobs(theta, trajectory, boundaries)
    with torch.no_grad():
        old = naive_logprobs(model, trajectory, boundaries)
        ref = naive_logprobs(reference, trajectory, boundaries)
    position = torch.arange(8)
    counted = (trajectory.commit_step > 0) & (position < trajectory.length[:, None])
    assert (counted != (trajectory.commit_step > 0)).any(), "some committed tokens should follow an EOS"

    def rows(threshold, tokens):
        return [[threshold[i], *tokens[i]] for i in range(6)]

    nothing = [None] * 6
    gamma_new = gamma_logprobs(theta, trajectory) if learned else torch.zeros(6)
    gamma_old = gamma_logprobs(model, trajectory).detach() if learned else torch.zeros(6)
    expected, clipped, capped = naive_loss(
        config,
        rows(gamma_new, new),
        rows(gamma_old, old),
        rows(nothing, ref) if use_kl else None,
        rows(nothing, trajectory.logprob),
        rows([learned] * 6, counted.tolist()),
        advantage,
    )
    assert clipped > 0, "the case should clip"
    assert capped > 0 or config.weight_cap > 2 or config.importance_weights == "none" or config.m == 0
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    expected_gradient = torch.autograd.grad(expected, parameters, allow_unused=True)
    for a, b in zip(gradient, expected_gradient, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * (1 + b.abs().max().item()))
    if learned:
        assert gradient[-1].abs().max() > 1e-4, "the threshold head is trained"


def test_the_exact_surrogate_needs_no_correction(rollouts):
    model, trajectory = rollouts(12)
    batch, losses = batch_of(trajectory), []
    for weights in ("token", "quarter", "sequence", "none"):
        objective = Diffpo(DiffpoConfig(m=0, importance_weights=weights))
        losses.append(loss_of(objective, model, batch, objective.latents(batch, 1)))
    for loss in losses[:-1]:
        torch.testing.assert_close(loss.value, losses[-1].value, rtol=1e-4, atol=1e-5)
    assert losses[0].metrics["ess"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("weights", ["none", "token", "quarter", "sequence"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed threshold", "joint"])
def test_diagnostics_by_quarter_of_the_steps(rollouts, learned, weights):
    model, trajectory = rollouts(19, learned)
    train = ("model", "threshold") if learned else ("model",)
    cap = {} if weights == "none" else {"weight_cap": 1.1}
    objective = Diffpo(DiffpoConfig(train=train, importance_weights=weights, **cap))
    batch = batch_of(trajectory)
    with torch.no_grad():
        scores = score(model, trajectory, objective.latents(batch, 5, 8))
    diagnostics = objective.loss(batch, batch.advantage, scores, scores, None).metrics
    quarter = (trajectory.commit_step - 1) * 4 // trajectory.nfe[:, None]
    of_sequence = torch.stack([
        (after - before)[counts].double().mean().exp()
        for after, before, counts in zip(scores.tokens(), trajectory.logprob, trajectory.scored, strict=True)
    ])  # fmt: skip
    for q in range(4):
        chosen = trajectory.scored & (quarter == q)
        gap = (trajectory.logprob - scores.tokens())[chosen].double()
        uncapped = (-gap).exp()
        weight = {
            "none": torch.ones_like(gap),
            "token": uncapped,
            "quarter": uncapped / uncapped.mean(),
            "sequence": of_sequence[:, None].expand_as(chosen)[chosen],
        }[weights].clamp(max=1.1)
        expected = {
            "tokens": len(gap),
            "surrogate_kl": gap.mean().item(),
            "weight_mean": weight.mean().item(),
            "weight_cap_fraction": (weight == 1.1).double().mean().item(),
            "ess": (weight.sum() ** 2 / (len(gap) * weight.square().sum())).item(),
            "ess_uncapped": (uncapped.sum() ** 2 / (len(gap) * uncapped.square().sum())).item(),
        }
        assert len(gap) > 0
        got = {name: diagnostics[f"bin/{name}"][q].item() for name in expected}
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert diagnostics["weight_histogram"].sum() == trajectory.scored.sum() + 6 * learned


def test_the_first_inner_update_takes_the_model_itself_as_old(rollouts):
    model, trajectory = rollouts(13)
    objective, batch = Diffpo(DiffpoConfig()), batch_of(trajectory)
    latents = objective.latents(batch, 1)
    with torch.no_grad():
        old = score(model, trajectory, latents)
    parameters = list(model.parameters())
    first = loss_of(objective, model, batch, latents)
    same = loss_of(objective, model, batch, latents, old)
    torch.testing.assert_close(first.value, same.value, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(out.value, parameters) for out in (first, same)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert first.metrics["ratio_max"] == 1
    assert first.metrics["clip_fraction"] == 0


def test_the_thresholds_behaviour_is_the_recorded_one(rollouts):
    """Rollouts of other weights: w_0 is pi_old(gamma) over the probability at which gamma was drawn."""
    model, trajectory = rollouts(13)
    stale = perturbed(model, 3, 0.2)
    objective, batch = Diffpo(DiffpoConfig(m=0, weight_cap=float("inf"))), batch_of(trajectory)
    with torch.no_grad():
        scores = score(stale, trajectory, objective.latents(batch, 1))
    weight = (scores.actions["gamma"] - trajectory.actions["gamma"].logprob).exp()
    assert (weight - 1).abs().max() > 0.05
    tokens = (scores.tokens() - trajectory.logprob)[trajectory.scored].exp()
    expected = torch.cat([weight, tokens]).mean()
    got = objective.loss(batch, batch.advantage, scores, scores, None).metrics["weight_mean"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_zero_advantage_is_no_gradient(rollouts):
    model, trajectory = rollouts(13)
    objective, batch = Diffpo(DiffpoConfig(kl_coefficient=0.0)), batch_of(trajectory, [0.0] * 6)
    loss = loss_of(objective, model, batch, objective.latents(batch, 1)).value
    assert loss == 0
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all((g == 0).all() for g in gradients)


def test_a_rewarded_threshold_becomes_more_probable(rollouts):
    model, trajectory = rollouts(14)
    objective = Diffpo(DiffpoConfig(train=("threshold",)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = list(model.threshold.parameters())
    for parameter in head:
        parameter.requires_grad_(True)
    batch = batch_of(trajectory, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    latents = objective.latents(batch, 1)
    before = score(model, trajectory, latents).actions["gamma"].detach()
    loss = loss_of(objective, model, batch, latents).value
    with torch.no_grad():
        for parameter, gradient in zip(head, torch.autograd.grad(loss, head), strict=True):
            parameter -= 0.1 * gradient
    assert score(model, trajectory, latents).actions["gamma"][0] > before[0]


def test_latents_are_a_function_of_their_key(rollouts):
    _, trajectory = rollouts(15)
    objective, batch = Diffpo(DiffpoConfig()), batch_of(trajectory)
    first, again, other = (objective.latents(batch, *key).masked for key in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_prompt_mask_probability_is_honoured(rollouts):
    _, trajectory = rollouts(15)
    batch = batch_of(trajectory)
    latents = Diffpo(DiffpoConfig(prompt_mask_probability=1.0)).latents(batch, 1)
    prompt_ids, real, _ = network_inputs(trajectory, latents, torch.arange(len(latents)))
    assert (prompt_ids[real] == MASK).all()


def test_boundaries_are_uniform_for_each_row(chi_square):
    nfe = torch.tensor([1, 2, 5, 12]).repeat(3000)
    zero, tau = draw_boundaries(nfe, torch.arange(len(nfe)), 2, 4, 5)
    assert zero == 0
    assert tau.shape == nfe.shape
    assert tau.dtype == torch.int64
    assert (tau[nfe == 1] == 0).all()
    for T in (2, 5, 12):
        assert chi_square(torch.bincount(tau[nfe == T], minlength=T), torch.ones(T)) > 1e-4


@pytest.mark.parametrize("m", [3, 4])
def test_several_boundaries_are_independent_draws_in_order(chi_square, m):
    T = 4
    first, *rest = draw_boundaries(torch.full((6000,), T), torch.arange(6000), m, 7)
    assert first == 0
    assert len(rest) == m - 1
    drawn = torch.stack(rest, dim=1)
    assert (drawn[:, 1:] >= drawn[:, :-1]).all()
    probability = torch.zeros([T] * (m - 1))
    for values in itertools.product(range(T), repeat=m - 1):
        probability[tuple(sorted(values))] += T ** -(m - 1)
    cell = sum(drawn[:, j] * T ** (m - 2 - j) for j in range(m - 1))
    assert chi_square(torch.bincount(cell, minlength=T ** (m - 1)), probability.flatten()) > 1e-4


def test_other_numbers_of_boundaries():
    nfe = torch.tensor([3, 6, 2])
    assert draw_boundaries(nfe, torch.arange(3), 1, 0) == [0]
    assert draw_boundaries(nfe, torch.arange(3), 0, 0) == [0, 1, 2, 3, 4, 5]


def test_boundaries_depend_on_keys_and_not_on_places():
    nfe, rollouts = torch.full((200,), 50), torch.arange(200) * 7 + 3
    (_, tau), (_, again), (_, other) = (draw_boundaries(nfe, rollouts, 2, *key) for key in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(tau, again)
    assert not torch.equal(tau, other)
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:80]
    assert torch.equal(draw_boundaries(nfe[shuffled], rollouts[shuffled], 2, 1, 2)[1], tau[shuffled])
