"""LoRA as diffpo adds it: which layers a target means, initial values that depend on their key alone, fp32 on a frozen base."""

import builtins
import importlib.util

import pytest
import torch

import diffpo
from diffpo.models.checkpoints import open_checkpoint
from diffpo.models.lora import add_lora, check_lora, lora_layers, target_modules

INNER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PUBLISHED = {  # of the papers' own files: layer here -> its name there
    "llada": ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
    "Dream": INNER,
}
families = pytest.mark.parametrize("family", ["llada", "Dream"])


@pytest.fixture
def with_lora(random_model):
    """with_lora(*key, dtype, **settings) -> a random model with adapters that still add nothing."""
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")

    def build(*key, dtype=torch.float32, rank=2, alpha=4, targets=None, **changes):
        model = random_model(1, **changes).to(dtype)
        state = torch.random.get_rng_state()
        add_lora(model, target_modules(model, targets), rank, alpha, *key)
        assert torch.equal(torch.random.get_rng_state(), state), "a global generator was drawn from"
        return model

    return build


def short(names) -> list[str]:
    return [name.rpartition(".")[2] for name in names]


@families
def test_every_linear_layer_has_its_name_here_and_in_the_published_files(published, family):
    model = open_checkpoint(published(family)[0]).model
    every = target_modules(model)
    assert short(every) == [*INNER, *INNER]
    assert target_modules(model, INNER) == target_modules(model, PUBLISHED[family]) == every
    for own, name in zip(INNER, PUBLISHED[family], strict=True):
        assert set(short(target_modules(model, [name]))) == {own}, "LLaDA's ff_out is also what its head is called"
    assert target_modules(model, ["layers.1.mlp.up_proj"]) == ["layers.1.mlp.up_proj"]
    assert target_modules(model, ["lm_head", "q_proj"])[-1] == "lm_head"


def test_the_head_by_its_published_name(published):
    model = open_checkpoint(published("llada")[0]).model
    assert target_modules(model, ["model.transformer.ff_out"]) == ["lm_head"]
    assert target_modules(model, ["blocks.0.ff_out"]) == ["layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("target", "nearest"),
    [("q_porj", "q_proj"), ("ff_outt", "ff_out"), ("proj", "proj"), ("embed_tokens", ""), ("norm", ""), ("", "")],
)
def test_a_target_that_matches_nothing_names_the_nearest(published, target, nearest):
    model = open_checkpoint(published("llada")[0]).model
    with pytest.raises(ValueError, match=f"^lora.targets: '{target}' matches no linear layer.*nearest: .*{nearest}"):
        check_lora(model, 2, ["q_proj", target])


def test_what_cannot_be_trained_is_named(published, monkeypatch):
    model = open_checkpoint(published("llada")[0]).model
    with pytest.raises(ValueError, match=r"lora\.rank: 33 is more than 32.*smaller"):
        check_lora(model, 33)
    tied = open_checkpoint(published("Dream", "tied", tie_word_embeddings=True)[0]).model
    with pytest.raises(ValueError, match=r"lora\.targets: lm_head is tied"):
        check_lora(tied, 2, ["lm_head"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lora\.rank: adapters need peft: pip install 'diffpo\[lora\]'"):
        check_lora(model, 2)


def test_a_second_adapter_is_refused(with_lora):
    model = with_lora(0)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, ["layers.0.self_attn.q_proj"], 2, 2, 0)


def test_initial_values_depend_on_seed_and_layer_alone(with_lora):
    model, again, other = with_lora(3), with_lora(3, targets=["up_proj"]), with_lora(4)
    drawn, alone, others = (
        {name: layer.lora_A["default"].weight for name, layer in lora_layers(m)} for m in (model, again, other)
    )
    assert drawn.keys() > alone.keys()
    assert all(torch.equal(drawn[name], weight) for name, weight in alone.items())
    assert not any(torch.equal(drawn[name], others[name]) for name in drawn)
    weights = [tuple(weight.flatten().tolist()) for weight in drawn.values()]
    assert len(set(weights)) == len(weights), "two layers drew the same"
    for weight in drawn.values():
        bound = weight.shape[1] ** -0.5
        assert 0.8 * bound < weight.abs().max() < bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(random_model, with_lora, dtype):
    model, plain = with_lora(0, dtype=dtype), random_model(1).to(dtype)
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(model.logits(tokens), plain.logits(tokens))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert len(trained) == 2 * 7 * model.config.num_hidden_layers
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


def test_adapters_on_a_bf16_base_compute_in_bf16_and_have_fp32_gradients(with_lora):
    """As peft's own layers, which convert the input instead, up to the rounding of bf16. No input is kept twice."""
    model = with_lora(0, dtype=torch.bfloat16, rank=4)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model):
        layer.lora_B["default"].weight.data.normal_(std=0.1, generator=generator)
    layer = next(lora_layers(model))[1]
    x = torch.randn(5, layer.in_features, generator=generator).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in kept} == {torch.bfloat16}
    out.float().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.grad.dtype == b.grad.dtype == torch.float32
    exact = x.detach().float() @ (layer.get_base_layer().weight.float() + 4 / 4 * b @ a).T.detach()
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)


def test_a_small_step_is_not_lost(with_lora):
    """0.001 on a weight of 1: bf16 rounds it away."""
    model = with_lora(0, dtype=torch.bfloat16)
    weight = next(lora_layers(model))[1].lora_A["default"].weight
    weight.data.fill_(1.0)
    weight.data.add_(1e-3)
    assert weight.unique().item() == pytest.approx(1.001, abs=1e-6)


def test_no_adapter_imports_peft(monkeypatch):
    def refuse(name, *others, real=builtins.__import__, **more):
        assert not name.startswith("peft")
        return real(name, *others, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    diffpo.load("tiny-countdown", device="cpu").logits(torch.arange(5)[None])
