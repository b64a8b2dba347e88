"""The transformer against loops written from the architecture's description, in float64."""

import math
from dataclasses import FrozenInstanceError
from importlib import import_module

import pytest
import torch

from diffpo import MaskedDiffusionLM, ModelConfig
from diffpo_kernels import skinny_linear
from diffpo_kernels.backends import native_module

VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one key/value head": {"num_key_value_heads": 1},
    "bias": {"attention_bias": True},
    "shift": {"logit_shift": True},
    "tied": {"tie_word_embeddings": True},
    "everything": {
        "num_key_value_heads": 2,
        "attention_bias": True,
        "logit_shift": True,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-2,
    },
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def naive_logits(model: MaskedDiffusionLM, tokens: list[int]) -> torch.Tensor:
    """Logits [L, V] of one unpadded sequence: one head and one query at a time."""
    config, L = model.config, len(tokens)
    weight = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    size = config.hidden_size // heads

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight[name]

    def project(x, name):
        return x @ weight[name + ".weight"].T + weight.get(name + ".bias", 0)

    def rotated(vector, position):
        out = vector.clone()
        for i in range(size // 2):
            angle = position * config.rope_theta ** (-2 * i / size)
            a, b = vector[i], vector[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = torch.stack([weight["embed_tokens.weight"][token] for token in tokens])
    for n in range(config.num_hidden_layers):
        layer = f"layers.{n}."
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = (project(h, f"{layer}self_attn.{name}_proj") for name in "qkv")
        attended = torch.zeros(L, heads * size, dtype=torch.float64)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            keys = torch.stack([rotated(k[j, shared * size : (shared + 1) * size], j) for j in range(L)])
            values = v[:, shared * size : (shared + 1) * size]
            for i in range(L):  # every position attends to every position: no causal mask
                query = rotated(q[i, head * size : (head + 1) * size], i)
                attention = (keys @ query / math.sqrt(size)).softmax(0)
                attended[i, head * size : (head + 1) * size] = attention @ values
        x = x + project(attended, layer + "self_attn.o_proj")
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate = project(h, layer + "mlp.gate_proj")
        x = x + project(gate * torch.sigmoid(gate) * project(h, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    x = norm(x, "norm.weight")
    head = weight["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = x @ head.T
    return torch.stack([logits[max(i - 1, 0)] for i in range(L)]) if config.logit_shift else logits


@every_variant
def test_logits_equal_the_naive_transformer(random_model, changes):
    model = random_model(seed=1, **changes)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([naive_logits(model, row) for row in tokens.tolist()])
    got = model.logits(tokens)
    assert got.shape == (2, 9, 40)
    assert expected.std() > 1, "the model must be far from uniform for this test to say anything"
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@every_variant
def test_padding_changes_nothing(random_model, random_prompts, changes):
    model = random_model(seed=2, **changes)
    rows = random_prompts(model, [11, 4, 7, 1], seed=3)
    width = 14
    tokens, mask = torch.zeros(4, width, dtype=torch.int64), torch.zeros(4, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    padded = model.logits(tokens, mask)
    # what the padding holds, and the type of the mask, do not matter either
    other = model.logits(torch.where(mask, tokens, 17), mask.long())
    for i, row in enumerate(rows):
        alone = model.logits(row[None])[0]
        torch.testing.assert_close(padded[i, width - len(row) :], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other[i, width - len(row) :], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
def test_padding_may_stand_anywhere(random_model, random_prompts, shift):
    model = random_model(seed=4, logit_shift=shift)
    (row,) = random_prompts(model, [6])
    alone = model.logits(row[None])[0]
    real = torch.tensor([False, True, True, False, False, True, True, True, True, False])
    tokens = torch.zeros(10, dtype=torch.int64)
    tokens[real] = row
    padded = model.logits(tokens[None], real[None])[0]
    torch.testing.assert_close(padded[real], alone, rtol=1e-5, atol=1e-5)


def test_attention_mask_of_ones_equals_none(random_model, random_prompts):
    model = random_model()
    tokens = torch.stack(random_prompts(model, [8, 8]))
    torch.testing.assert_close(model.logits(tokens, torch.ones(2, 8)), model.logits(tokens), rtol=1e-5, atol=1e-5)


def test_attention_is_bidirectional(random_model):
    model = random_model()
    tokens = torch.full((1, 6), 5)
    changed = tokens.clone()
    changed[0, -1] = 9
    difference = (model.logits(tokens) - model.logits(changed)).abs().amax(dim=2)[0]
    assert (difference > 1e-3).all()


def test_forward_returns_hidden_states_and_head_maps_chosen_rows(random_model):
    model = random_model(logit_shift=True)
    tokens = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    hidden = model(tokens)
    assert hidden.shape == (2, 5, 32)
    torch.testing.assert_close(model.head(hidden[1, 2:4]), model.logits(tokens)[1, 2:4], rtol=1e-5, atol=1e-5)


def test_head_of_few_rows_is_the_native_kernel_without_a_gradient(random_model, monkeypatch):
    monkeypatch.setattr(import_module("diffpo_kernels.skinny_linear"), "LEAST_WEIGHTS", 0)
    model, hidden_ND = random_model(), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weight_VD, backend = model.lm_head.weight, "native" if native_module() else "reference"
    assert model.head(hidden_ND).requires_grad
    with torch.no_grad():
        assert torch.equal(model.head(hidden_ND), skinny_linear(hidden_ND, weight_VD, backend=backend))
        assert torch.equal(model.head(hidden_ND[None])[0], torch.nn.functional.linear(hidden_ND, weight_VD))


def test_tied_head_is_the_embedding_and_trains_as_one(random_model):
    model = random_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = random_model()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters()) == 40 * 32


def test_fresh_model_is_nearly_uniform_and_depends_on_the_seed_alone():
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, mask_token_id=2
    )
    torch.manual_seed(0)
    first = MaskedDiffusionLM(config)
    torch.manual_seed(0)
    second = MaskedDiffusionLM(config)
    tokens = torch.arange(10)[None]
    assert torch.equal(first.logits(tokens), second.logits(tokens))
    entropy = torch.distributions.Categorical(logits=first.logits(tokens)).entropy()
    assert (entropy > math.log(50) - 0.05).all()


def test_too_long_a_sequence_is_an_error(random_model):
    model = random_model(max_position_embeddings=8)
    model.logits(torch.full((1, 8), 3))
    with pytest.raises(ValueError, match=r"9 tokens.*max_position_embeddings 8"):
        model.logits(torch.full((1, 9), 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"hidden_size": 36, "num_attention_heads": 4}, "even for RoPE"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"mask_token_id": 40}, "mask_token_id 40"),
        ({"eos_token_id": 99}, "eos_token_id 99"),
        ({"pad_token_id": 40}, "pad_token_id 40"),
        ({"mask_token_id": -1}, "mask_token_id"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"n_layers": 3}, "n_layers"),
        ({"threshold_gammas": (0.1, -1.0)}, "threshold_gammas"),
        ({"threshold_gammas": (0.1, float("nan"))}, "threshold_gammas"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_configurations_are_errors_that_name_the_field(random_model, changes, message):
    with pytest.raises(ValueError, match=message):
        random_model(**changes)


def test_config_is_immutable(random_model):
    with pytest.raises(FrozenInstanceError):
        random_model().config.vocab_size = 7
