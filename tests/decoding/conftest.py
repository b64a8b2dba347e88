"""Decoding with settings that only a GPU chooses by itself: the static step, and flags that are read late."""

import dataclasses

import pytest
import torch

from diffpo.decoding import generation
from diffpo.decoding.decoder import denoise
from diffpo.trajectory import Trajectory


@pytest.fixture
def decode_with(monkeypatch):
    """decode_with(settings' changes)(model, prompts, ... as for generate) -> Trajectory in the prompts' order."""

    def with_changes(**changes):
        def decode(*arguments, **options) -> Trajectory:
            def changed(model, prompt_ids, prompt_mask, settings, rows):
                return denoise(model, prompt_ids, prompt_mask, dataclasses.replace(settings, **changes), rows)

            with monkeypatch.context() as patch:
                patch.setattr(generation, "denoise", changed)
                return generation.generate(*arguments, **options).trajectory

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
