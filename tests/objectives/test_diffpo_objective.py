"""The DiFFPO loss against the formula, one token at a time; the random boundaries of the surrogate."""

import copy
import itertools

import pytest
import torch

import diffpo
from diffpo.config import AlgorithmConfig
from diffpo.objectives import OBJECTIVES
from diffpo.objectives.diffpo import draw_boundaries

MASK = 2
BINS = (0.5, 1.5, 4.0)


def perturbed(model, seed, size):
    """A copy with noise on every parameter."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def loss_of(objective, model, view, advantage, old):
    """The loss of a model on a view; old None: the model itself is the old one."""
    new = view.score(model)
    return objective.loss(view.trajectory, advantage, new, old or new, None)


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
            if config.importance_correction and behaviour[i][k] is not None:
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
        values.append(scores.log_softmax(dim=0)[trajectory.gamma_bin[b]])
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


def rows_of_boundaries(view):
    """The view's boundaries as one list per row."""
    B = len(view.trajectory)
    return torch.stack([torch.as_tensor(tau).expand(B) for tau in view.boundaries], dim=1).tolist()


CASES = {
    "published": {},
    "no correction": {"importance_correction": False},
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
    config = AlgorithmConfig(mode="joint" if learned else "model", group_size=2, **changes)
    objective = OBJECTIVES["diffpo"](config)
    view = objective.view(trajectory, 5, 8)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -1.5])
    with torch.no_grad():
        old_scores, reference_scores = view.score(model), view.score(reference)
    use_kl = config.kl_coefficient > 0
    loss, _ = objective.loss(
        view.trajectory, advantage, view.score(theta), old_scores, reference_scores if use_kl else None
    )
    parameters = list(theta.parameters())
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)

    boundaries = rows_of_boundaries(view)
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
    assert capped > 0 or config.weight_cap > 2 or not config.importance_correction or config.m == 0
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
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -1.5])
    losses = []
    for correction in (True, False):
        objective = OBJECTIVES["diffpo"](AlgorithmConfig(m=0, importance_correction=correction))
        losses.append(loss_of(objective, model, objective.view(trajectory, 1), advantage, None))
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=1e-4, atol=1e-5)
    assert losses[0].diagnostics["ess"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed threshold", "joint"])
def test_diagnostics_by_quarter_of_the_steps(rollouts, learned, correction):
    model, trajectory = rollouts(19, learned)
    config = AlgorithmConfig(mode="joint" if learned else "model", importance_correction=correction, weight_cap=1.1)
    objective = OBJECTIVES["diffpo"](config)
    view = objective.view(trajectory, 5, 8)
    with torch.no_grad():
        scores = view.score(model)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -1.5])
    diagnostics = objective.loss(view.trajectory, advantage, scores, scores, None).diagnostics
    quarter = (trajectory.commit_step - 1) * 4 // trajectory.nfe[:, None]
    for q in range(4):
        chosen = trajectory.scored & (quarter == q)
        gap = (trajectory.logprob - scores.logprob)[chosen].double()
        uncapped = (-gap).exp()
        weight = uncapped.clamp(max=1.1) if correction else torch.ones_like(gap)
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
    objective = OBJECTIVES["diffpo"](AlgorithmConfig())
    view, advantage = objective.view(trajectory, 1), torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -1.5])
    with torch.no_grad():
        old = view.score(model)
    parameters = list(model.parameters())
    first = loss_of(objective, model, view, advantage, None)
    same = loss_of(objective, model, view, advantage, old)
    torch.testing.assert_close(first.loss, same.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(out.loss, parameters) for out in (first, same)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert first.diagnostics["ratio_max"] == 1
    assert first.diagnostics["clip_fraction"] == 0


def test_zero_advantage_is_no_gradient(rollouts):
    model, trajectory = rollouts(13)
    objective = OBJECTIVES["diffpo"](AlgorithmConfig())
    loss = loss_of(objective, model, objective.view(trajectory, 1), torch.zeros(6), None).loss
    assert loss == 0
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all((g == 0).all() for g in gradients)


def test_a_rewarded_threshold_becomes_more_probable(rollouts):
    model, trajectory = rollouts(14)
    objective = OBJECTIVES["diffpo"](AlgorithmConfig(mode="sampler"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = list(model.threshold.parameters())
    for parameter in head:
        parameter.requires_grad_(True)
    view = objective.view(trajectory, 1)
    before = view.score(model).gamma_logprob.detach()
    advantage = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    loss = loss_of(objective, model, view, advantage, None).loss
    with torch.no_grad():
        for parameter, gradient in zip(head, torch.autograd.grad(loss, head), strict=True):
            parameter -= 0.1 * gradient
    assert view.score(model).gamma_logprob[0] > before[0]


def test_a_view_is_a_function_of_its_key(rollouts):
    _, trajectory = rollouts(15)
    objective = OBJECTIVES["diffpo"](AlgorithmConfig())
    views = [rows_of_boundaries(objective.view(trajectory, *key)) for key in ((1, 2), (1, 2), (1, 3))]
    assert views[0] == views[1] != views[2]


def test_prompt_mask_probability_is_honoured(rollouts):
    _, trajectory = rollouts(15)
    objective = OBJECTIVES["diffpo"](AlgorithmConfig(prompt_mask_probability=1.0))
    view = objective.view(trajectory, 1)
    assert (view.trajectory.prompt_ids[trajectory.prompt_mask] == MASK).all()


def test_boundaries_are_uniform_for_each_row(chi_square):
    nfe = torch.tensor([1, 2, 5, 12]).repeat(3000)
    zero, tau = draw_boundaries(nfe, 2, 4, 5)
    assert zero == 0
    assert tau.shape == nfe.shape
    assert tau.dtype == torch.int64
    assert (tau[nfe == 1] == 0).all()
    for T in (2, 5, 12):
        assert chi_square(torch.bincount(tau[nfe == T], minlength=T), torch.ones(T)) > 1e-4


@pytest.mark.parametrize("m", [3, 4])
def test_several_boundaries_are_independent_draws_in_order(chi_square, m):
    T = 4
    first, *rest = draw_boundaries(torch.full((6000,), T), m, 7)
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
    assert draw_boundaries(nfe, 1, 0) == [0]
    assert draw_boundaries(nfe, 0, 0) == [0, 1, 2, 3, 4, 5]


def test_boundaries_depend_on_the_key_and_not_on_the_rows_that_follow():
    nfe = torch.full((200,), 50)
    (_, tau), (_, again), (_, other) = (draw_boundaries(nfe, 2, *key) for key in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(tau, again)
    assert not torch.equal(tau, other)
    assert torch.equal(draw_boundaries(nfe[:20], 2, 1, 2)[1], tau[:20])
