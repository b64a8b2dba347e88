"""A trajectory as bytes, in pieces, and put together again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

import diffpo
from diffpo.decoding.engine import Finished
from diffpo.trajectory import Trajectory


@pytest.fixture
def decode(random_model, random_prompts):
    """decode(prompt lengths) -> Trajectory with drawn thresholds."""
    model = random_model(3, scale=0.5, vocab_size=9, threshold_gammas=(0.5, 2.0))

    def build(lengths, **options):
        prompts = random_prompts(model, lengths, 1)
        rule = diffpo.PromptThreshold(sample=True)
        return diffpo.generate(model, prompts, 6, 3, rule, **{"temperature": 0.7, "seed": 4} | options).trajectory

    return build


def assert_equal(a: Trajectory, b: Trajectory) -> None:
    assert a._tensors().keys() == b._tensors().keys()
    for name, value in a._tensors().items():
        assert torch.equal(value.nan_to_num(-7.0), b._tensors()[name].nan_to_num(-7.0)), name
    for name in ("mask_id", "temperature", "block_length", "cfg_scale"):
        assert getattr(a, name) == getattr(b, name)


def test_it_says_what_was_drawn_and_how(decode):
    trajectory = decode([3, 5], row_ids=torch.tensor([40, 7]))
    assert trajectory.key.tolist() == trajectory.group.tolist() == [40, 7]
    assert trajectory.version.tolist() == [0, 0]
    assert trajectory.block_length == 3
    assert trajectory.actions["gamma"].choice.dtype == torch.int64
    assert (trajectory.actions["gamma"].logprob < 0).all()


def test_bytes_hold_all_of_it(decode):
    trajectory = decode([3, 5, 4])
    assert_equal(Trajectory.from_bytes(trajectory.to_bytes()), trajectory)
    plain = replace(trajectory, actions={}, gamma=torch.full((3,), torch.nan))
    assert_equal(Trajectory.from_bytes(plain.to_bytes()), plain)


def test_rows_as_they_end_have_bytes_too(random_model, random_prompts):
    model = random_model(3, scale=0.5, vocab_size=9)
    engine = diffpo.Engine(model, 2, 5, 6)
    for prompt in random_prompts(model, [3, 5], 1):
        engine.submit(diffpo.Request(prompt, diffpo.DecodingOptions(6)))
    ended = []
    while len(engine):
        ended += [event.trajectory for event in engine.step() if isinstance(event, Finished)]
    ended += [row.trajectory for _, row in diffpo.stream(model, random_prompts(model, [4], 1), 6)]
    assert len(ended) == 3
    for one in ended:
        assert_equal(Trajectory.from_bytes(one.to_bytes()), one)


def test_prompts_of_different_widths_are_put_together(decode):
    narrow, wide = decode([2, 3]), decode([7, 4, 1])
    joined = Trajectory.concatenate([narrow, wide])
    assert joined.prompt_ids.shape == (5, 7)
    assert_equal(joined[2:], wide)
    for row in range(2):
        real = joined.prompt_mask[row]
        assert torch.equal(joined.prompt_ids[row][real], narrow.prompt_ids[row][narrow.prompt_mask[row]])
        assert real.tolist() == [False] * 4 + narrow.prompt_mask[row].tolist()
    assert torch.equal(joined.actions["gamma"].choice[:2], narrow.actions["gamma"].choice)


@pytest.mark.parametrize(
    "change", [{"temperature": 0.8}, {"mask_id": 1}, {"block_length": 6}, {"actions": {}}], ids=str
)
def test_what_was_drawn_differently_is_not_put_together(decode, change):
    trajectory = decode([2, 3])
    with pytest.raises(ValueError, match=next(iter(change))):
        Trajectory.concatenate([trajectory, replace(trajectory, **change)])


def test_what_is_no_list_of_trajectories_is_not_put_together(decode):
    trajectory = decode([2, 3])
    for parts in ([], (), trajectory, [trajectory, 3], [3, trajectory], None, 3, {0: trajectory}, iter([trajectory])):
        with pytest.raises(ValueError, match="parts must be a list of at least one Trajectory"):
            Trajectory.concatenate(parts)


@pytest.mark.parametrize("row", [0, -1, torch.tensor(1), True, np.int64(1), (0, 1), None], ids=repr)
def test_a_number_is_no_choice_of_rows(decode, row):
    """It would take the rows' dimension away, and a trajectory of two rows would have the length of its completion."""
    trajectory = decode([2, 3])
    with pytest.raises(ValueError, match=r"rows must be a slice.*one row is trajectory\[i : i \+ 1\]"):
        trajectory[row]
    for rows in (slice(1, 2), [1], np.array([1]), torch.tensor([1]), torch.tensor([False, True])):
        assert torch.equal(trajectory[rows].key, trajectory.key[1:])


def test_bytes_may_be_any_of_python_s(decode):
    trajectory = decode([2, 3])
    data = trajectory.to_bytes()
    for given in (bytearray(data), memoryview(data)):
        assert_equal(Trajectory.from_bytes(given), trajectory)
    for given, name in (("text", "str"), (None, "NoneType"), (5, "int")):
        with pytest.raises(ValueError, match=f"data must be bytes, got {name}"):
            Trajectory.from_bytes(given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mask_id", "2"), ("mask_id", True), ("mask_id", 1.5), ("mask_id", 2**63)),
        *(("block_length", None), ("block_length", 0)),
        *(("temperature", -0.5), ("temperature", float("nan")), ("cfg_scale", float("inf")), ("cfg_scale", [])),
    ],
)
def test_bytes_with_settings_of_no_rollout_are_refused(decode, name, value):
    data = replace(decode([2, 3]), **{name: value}).to_bytes()
    with pytest.raises(ValueError, match=f"these bytes are no .*: {name} is"):
        Trajectory.from_bytes(data)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("tokens", -1), ("prompt_ids", -1), ("commit_step", -1), ("commit_step", 99), ("length", -1), ("length", 99)),
        *(("nfe", 0), ("nfe", 10**12), ("actions.gamma.choice", -2), ("actions.gamma.logprob", float("nan"))),
        *(("logprob", float("nan")), ("logprob", -float("inf")), ("entropy", float("inf"))),
    ],
)
def test_bytes_with_numbers_of_no_rollout_are_refused(decode, name, change):
    good = decode([2, 3])
    tensors = good._tensors()
    data = good._rebuilt(tensors | {name: torch.full_like(tensors[name], change)}).to_bytes()
    named = "commit_step" if (name, change) == ("nfe", 0) else name
    with pytest.raises(ValueError, match=f"these bytes are no .*: {named} holds"):
        Trajectory.from_bytes(data)


def test_bytes_whose_settings_python_cannot_hold_are_refused(decode):
    """JSON nested beyond its stack, and a number beyond every float."""
    trajectory = decode([2, 3])
    deep = {"format": "diffpo trajectory 1", "settings": "[" * 100_000}
    huge = replace(trajectory, temperature=10**400)
    for data in (save({"tokens": trajectory.tokens}, deep), huge.to_bytes()):
        with pytest.raises(ValueError, match="these bytes are no"):
            Trajectory.from_bytes(data)


def test_bytes_that_are_no_trajectory_are_refused(decode):
    good = decode([2, 3])
    data = good.to_bytes()
    wrong = replace(good, commit_step=good.commit_step.float()), replace(good, nfe=good.nfe[:1])
    other = save({"tokens": good.tokens}, {"format": "something else"})
    for broken in (b"", b"\x00" * 8, b"x" * 100, data[:-5], data[:40], other, save({}), *(t.to_bytes() for t in wrong)):
        with pytest.raises(ValueError, match="these bytes are no"):
            Trajectory.from_bytes(broken)
