"""Activation checkpointing: the same gradient from a fraction of what is kept, with LoRA, compiled, padded, in parts."""

import copy

import pytest
import torch
from test_update_memory import batch_of, peak_bytes
from torch.autograd.graph import saved_tensors_hooks

from diffpo.likelihood.score import score
from diffpo.models.lora import add_lora, target_modules
from diffpo.objectives import OBJECTIVES
from diffpo.training.update import accumulate_gradient


def gradients(model, tokens_at_once=None, name="d1") -> dict:
    objective = OBJECTIVES[name](OBJECTIVES[name].Config(kl_coefficient=0.1))
    batch = batch_of(8, 31)
    latents = objective.latents(batch, 0)
    with torch.no_grad():
        reference = score(model, batch.trajectory, latents)
    model.zero_grad()
    accumulate_gradient(model, objective, batch, latents, batch.advantage, None, reference, tokens_at_once)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def adapted(model):
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    add_lora(model, target_modules(model), 2, 2, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    ("lora", "compiled"),
    [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)],
    ids=["all", "lora", "lora, compiled"],
)
def test_the_gradient_is_the_plain_one(random_model, lora, compiled):
    """With LoRA the first block's input needs no gradient: reentrant checkpointing would silently lose that block's."""
    plain = random_model(3, vocab_size=31, num_hidden_layers=1 if compiled else 2, threshold_gammas=(0.5, 1.5))
    plain = adapted(plain) if lora else plain
    model = copy.deepcopy(plain)
    model.recompute_activations()
    if compiled:
        for layer in model.layers:
            layer.compile(dynamic=True, backend="aot_eager")
    expected, got = gradients(plain), gradients(model)
    assert expected.keys() == got.keys()
    assert any("layers.0." in name for name in got)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for name in expected:
        if compiled:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("name", ["espo", "tracerl"])
def test_in_parts(random_model, name):
    plain = random_model(3, vocab_size=31)
    model = copy.deepcopy(plain)
    model.recompute_activations()
    expected, got = gradients(plain, 56, name), gradients(model, 56, name)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_one_tensor_is_kept_for_each_block(random_model):
    model = random_model(3, vocab_size=31)
    tokens = torch.full((4, 16), 2)
    sizes = []
    for on in (False, True):
        kept = {}
        model.recompute_activations(on)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):  # noqa: B023
            model(tokens).sum()
        sizes.append(sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights))
    of_blocks = model.config.num_hidden_layers * tokens.numel() * model.config.hidden_size * 4
    assert sizes[1] < 3 * of_blocks < sizes[0] / 3


def test_the_peak_is_lower(random_model):
    model = random_model(3, vocab_size=31, num_hidden_layers=8)
    peaks = []
    for on in (False, True):
        model.recompute_activations(on)
        peaks.append(peak_bytes(lambda: gradients(model)))
    assert peaks[1] < 0.5 * peaks[0]


def test_passes_without_a_gradient_recompute_nothing(random_model):
    model = random_model(3, vocab_size=31)
    model.recompute_activations()
    calls = []
    model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.full((1, 5), 2))
    assert len(calls) == 1
