"""A model for the engine, and decoding with settings that only a GPU chooses by itself: the static step, and flags that are read late."""

import dataclasses

import pytest
import torch
from engine_runs import WORDS

import diffpo
from diffpo.decoding.decoder import StepMode
from diffpo.models.word_tokenizer import word_tokenizer
from diffpo.trajectory import Trajectory


@pytest.fixture
def decode_with(monkeypatch):
    """decode_with(changes of the step mode)(model, prompts, ... as for generate) -> Trajectory in the prompts' order."""

    def with_changes(**changes):
        def decode(*arguments, **options) -> Trajectory:
            with monkeypatch.context() as patch:
                patch.setattr(StepMode, "of", lambda model, options: StepMode(**changes))
                return diffpo.generate(*arguments, **options).trajectory

        return decode

    return with_changes


@pytest.fixture
def assert_same():
    """assert_same(a, b): equal trajectories, log-probs and entropies up to rounding."""

    def check(a: Trajectory, b: Trajectory) -> None:
        values = [
            {field.name: getattr(trajectory, field.name) for field in dataclasses.fields(Trajectory)}
            | {
                f"{name}.{part}": value
                for name, action in trajectory.actions.items()
                for part, value in action._asdict().items()
            }
            for trajectory in (a, b)
        ]
        assert a.actions.keys() == b.actions.keys()
        for name in values[0].keys() - {"actions"}:
            x, y = values[0][name], values[1][name]
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                assert torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True), f"{name}: {(x - y).abs().max()}"
            else:
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name

    return check


@pytest.fixture
def model(random_model):
    """In float64, so that rows differ by no rounding that would change a decision."""
    tokenizer = word_tokenizer(WORDS)
    model = random_model(
        3, scale=0.6, vocab_size=len(tokenizer), threshold_gammas=(0.0, 1.0, 3.0), threshold_reads="both"
    ).double()
    model.tokenizer = tokenizer
    return model
