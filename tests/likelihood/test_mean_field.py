"""The m-times mean-field family against a loop over rows and tokens with one unpadded network evaluation each."""

import pytest
import torch

import diffpo
from diffpo.likelihood.mean_field import mean_field, trajectory_logprobs
from diffpo.likelihood.score import score

MASK = 2
BINS = (0.0, 0.5, 2.0)


@pytest.fixture
def rollouts(random_model, random_prompts):
    """rollouts(seed, temperature, **config changes) -> model, trajectory: 6 rollouts of 3 prompts, 2 blocks, some ended by an EOS."""

    def build(seed=0, temperature=1.0, lengths=(3, 7, 5), rule=None, gen_length=8, **changes):
        model = random_model(seed, scale=0.5, **{"vocab_size": 9} | changes)
        prompts = [prompt for prompt in random_prompts(model, lengths, seed) for _ in range(2)]
        rule = rule or diffpo.EntropyBounded(1.5)
        out = diffpo.generate(model, prompts, gen_length, gen_length // 2, rule, temperature, seed=seed)
        return model, out.trajectory

    return build


VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "shift": {"logit_shift": True},
    "tied grouped bias": {"tie_word_embeddings": True, "num_key_value_heads": 2, "attention_bias": True},
    "no padding": {"lengths": (4, 4, 4)},
    "fixed schedule": {"rule": diffpo.FixedSchedule(4)},
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def boundary_cases(nfe):
    """(boundaries as given, the same as one list per row)."""
    B, T = len(nfe), int(nfe.max())
    per_row = (torch.arange(B) * 7 + 3) % nfe
    later = torch.maximum(per_row, nfe - 1)
    return {
        "m = 1": ([0], [[0]] * B),
        "m = 2": ([0, 2], [[0, 2]] * B),
        "m = 2, last step": ([0, T - 1], [[0, T - 1]] * B),
        "m = 2, tau = 0": ([0, 0], [[0]] * B),
        "m = 2, beyond the end": ([0, T + 5], [[0]] * B),
        "m = 2 per row": ([0, per_row], [[0, t] for t in per_row.tolist()]),
        "m = 3": ([0, 1, 3], [[0, 1, 3]] * B),
        "m = 3 per row": (
            [torch.zeros(B, dtype=torch.int64), per_row, later],
            [[0, a, b] for a, b in zip(per_row.tolist(), later.tolist(), strict=True)],
        ),
        "exact": (range(T), [list(range(T))] * B),
    }


@every_variant
def test_every_member_of_the_family_equals_the_loop(rollouts, changes, naive_logprobs):
    model, trajectory = rollouts(seed=1, **changes)
    assert len(trajectory.nfe.unique()) > 1 or "rule" in changes
    for name, (boundaries, per_row) in boundary_cases(trajectory.nfe).items():
        with torch.no_grad():
            got = trajectory_logprobs(model, trajectory, boundaries)
            expected = naive_logprobs(model, trajectory, per_row)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert (got[trajectory.commit_step == 0] == 0).all()


def test_the_members_differ(rollouts):
    model, trajectory = rollouts(seed=2, rule=diffpo.EntropyBounded(0.3))
    with torch.no_grad():
        values = [trajectory_logprobs(model, trajectory, b) for b in ([0], [0, 2], [0, 1, 3], range(8))]
    for i in range(4):
        for j in range(i):
            assert (values[i] - values[j]).abs().max() > 0.01


@every_variant
@pytest.mark.parametrize("seed", [3, 4])
def test_exact_equals_the_behaviour_recorded_by_decoding(rollouts, changes, seed):
    model, trajectory = rollouts(seed=seed, **changes)
    with torch.no_grad():
        exact = trajectory_logprobs(model, trajectory, range(int(trajectory.nfe.max())))
    torch.testing.assert_close(exact, trajectory.logprob, rtol=1e-4, atol=1e-4)


def test_the_rollouts_of_these_tests_end_early_and_change_blocks(rollouts):
    ended = [rollouts(seed=seed)[1] for seed in (1, 3, 4)]
    assert any((trajectory.commit_step == 0).any() for trajectory in ended)
    assert any((trajectory.commit_step[:, 4:] > 0).any() for trajectory in ended)


def test_members_of_a_group_share_the_first_evaluation(rollouts, forward_rows):
    model, trajectory = rollouts(seed=5, lengths=(3, 7, 5))
    T = int(trajectory.nfe.max())
    with forward_rows(model) as rows:
        trajectory_logprobs(model, trajectory, [0])
    assert rows == [3]
    with forward_rows(model) as rows:
        trajectory_logprobs(model, trajectory, [0, 1])
    assert rows == [3 + int((trajectory.nfe > 1).sum())]
    with forward_rows(model) as rows:
        trajectory_logprobs(model, trajectory, range(T))
    assert rows == [3 + sum(int((trajectory.nfe > t).sum()) for t in range(1, T))]
    # the order of the rows plays no part, nor which copy of a prompt comes first
    order = torch.tensor([4, 0, 2, 5, 1, 3])
    with torch.no_grad():
        shuffled = trajectory_logprobs(model, trajectory[order], [0, 1])
        torch.testing.assert_close(
            shuffled, trajectory_logprobs(model, trajectory, [0, 1])[order], rtol=1e-5, atol=1e-5
        )


def test_prompts_that_differ_only_in_padding_are_told_apart(random_model):
    """[pad id, 5] as a prompt of two tokens is not the prompt [5] behind one padding token."""
    model = random_model(seed=6, vocab_size=9)
    prompts = [torch.tensor([0, 5]), torch.tensor([5])]
    out = diffpo.generate(model, prompts, 4, rule=diffpo.EntropyBounded(1.0), temperature=1.0)
    with torch.no_grad():
        exact = trajectory_logprobs(model, out.trajectory, range(int(out.nfe.max())))
    torch.testing.assert_close(exact, out.trajectory.logprob, rtol=1e-4, atol=1e-4)


def test_empty_prompts(random_model):
    model = random_model(seed=6, vocab_size=9)
    out = diffpo.generate(
        model, torch.zeros(3, 0, dtype=torch.int64), 4, rule=diffpo.EntropyBounded(1.0), temperature=1.0
    )
    with torch.no_grad():
        exact = trajectory_logprobs(model, out.trajectory, range(int(out.nfe.max())))
    torch.testing.assert_close(exact, out.trajectory.logprob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "logit_shift": True}, {"temperature": 0.7}], ids=str
)
@pytest.mark.parametrize("name", ["m = 1", "m = 2 per row", "exact"])
def test_gradients_equal_those_of_the_loop(rollouts, changes, name, naive_logprobs):
    model, trajectory = rollouts(seed=7, **changes)
    boundaries, per_row = boundary_cases(trajectory.nfe)[name]
    weights = torch.randn(trajectory.tokens.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    got = torch.autograd.grad((weights * trajectory_logprobs(model, trajectory, boundaries)).sum(), parameters)
    expected = torch.autograd.grad((weights * naive_logprobs(model, trajectory, per_row)).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * (1 + b.abs().max().item()))
    assert max(b.abs().max() for b in expected) > 0.1


def test_a_float64_model_is_scored_in_float64(rollouts, naive_logprobs):
    model, trajectory = rollouts(seed=7)
    T = int(trajectory.nfe.max())
    model = model.double()
    with torch.no_grad():
        got = trajectory_logprobs(model, trajectory, range(T))
        expected = naive_logprobs(model, trajectory, [list(range(T))] * len(trajectory))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_threshold_log_probabilities_come_with_the_first_pass(random_model, random_prompts, forward_rows):
    model = random_model(8, scale=0.5, threshold_gammas=BINS)
    model.threshold.linear.weight.data.mul_(0.3), model.threshold.linear.bias.data.zero_()
    prompts = [prompt for prompt in random_prompts(model, [3, 7, 5]) for _ in range(2)]
    trajectory = diffpo.generate(model, prompts, 8, 4, diffpo.PromptThreshold(sample=True), 1.0, seed=8).trajectory
    drawn = trajectory.actions["gamma"]
    assert len(drawn.choice.unique()) > 1
    with forward_rows(model) as rows:
        scores = score(model, trajectory, mean_field(trajectory, [0])).actions["gamma"]
    assert rows == [3]
    torch.testing.assert_close(scores, drawn.logprob, rtol=1e-4, atol=1e-5)
    for b in range(len(trajectory)):
        prompt = trajectory.prompt_ids[b][trajectory.prompt_mask[b]]
        hidden = model(torch.cat([prompt, torch.full((8,), MASK)])[None])[0, -8:].mean(dim=0)
        scores_of_bins = model.threshold.linear.weight @ hidden + model.threshold.linear.bias
        expected = scores_of_bins.log_softmax(dim=0)[drawn.choice[b]]
        torch.testing.assert_close(scores[b], expected, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(scores.sum(), model.threshold.linear.weight)[0]
    assert gradient.abs().max() > 0


def test_other_rules_draw_no_threshold(rollouts):
    for changes in ({}, {"threshold_gammas": BINS}):
        model, trajectory = rollouts(seed=8, **changes)
        assert trajectory.actions == {}
        assert score(model, trajectory, mean_field(trajectory, [0])).actions == {}


def test_public_name():
    assert diffpo.trajectory_logprobs is trajectory_logprobs


@pytest.mark.parametrize(
    "boundaries",
    [
        [],
        [1],
        [2, 3],
        [0, 3, 1],
        [0, -1],
        [torch.tensor([0, 0, 0, 0, 0, 1])],
        [0, torch.tensor([1, 2, 3, 1, 2, 3]), torch.tensor([2, 2, 2, 2, 2, 2])],
        [0, torch.tensor([1, 2])],
        [0, torch.tensor([[1, 2, 3, 1, 2, 3]])],
    ],
    ids=[
        "none",
        "no 0",
        "no 0 twice",
        "falling",
        "negative",
        "0 not in all rows",
        "falling in a row",
        "length",
        "shape",
    ],
)
def test_bad_boundaries(rollouts, forward_rows, boundaries):
    model, trajectory = rollouts(seed=1)
    with forward_rows(model) as rows, pytest.raises(ValueError, match="boundaries"):
        trajectory_logprobs(model, trajectory, boundaries)
    assert rows == []


@pytest.mark.parametrize("boundaries", ["all", 3, None, {0, 3}], ids=str)
def test_boundaries_are_a_list(rollouts, boundaries):
    model, trajectory = rollouts(seed=1)
    with pytest.raises(ValueError, match=r"boundaries must be a list of steps, such as \[0, 3\]"):
        trajectory_logprobs(model, trajectory, boundaries)


def test_what_is_no_trajectory_says_so(rollouts):
    model, trajectory = rollouts(seed=1)
    with pytest.raises(ValueError, match=r"trajectory must be a Trajectory, got Generation: give its \.trajectory"):
        trajectory_logprobs(model, diffpo.Generation(None, trajectory), [0])
    with pytest.raises(ValueError, match=r"trajectory must be a Trajectory, got list$"):
        trajectory_logprobs(model, [trajectory], [0])


@pytest.mark.parametrize("boundary", [float("nan"), 1.9, True, "1", None, torch.tensor([1.0] * 6)], ids=str)
def test_boundaries_are_integers(rollouts, boundary):
    model, trajectory = rollouts(seed=1)
    with pytest.raises(ValueError, match="must be an int or an int64 tensor"):
        trajectory_logprobs(model, trajectory, [0, boundary])
