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
        for field in dataclasses.fields(Trajectory):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                assert torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True), (
                    f"{field.name}: {(x - y).abs().max()}"
                )
            else:
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name

    return check
