"""Layouts and attention masks: how prompt and completion lie in an input, and what each token sees."""

import math

import pytest
import torch
import torch.nn.functional as F

import diffpo
from diffpo.models.layout import Full, Texts
from diffpo.models.model_config import ModelConfig


def texts(*prompts, width, completion):
    """Texts with prompts padded on the left, and one completion for all."""
    ids, real = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], real[row, width - len(prompt) :] = torch.tensor(prompt), True
    return Texts(ids, real, torch.tensor(completion).expand(len(prompts), -1))


@pytest.mark.parametrize("holes", [False, True], ids=["padding on the left", "padding within"])
@pytest.mark.parametrize("prompts", [([4, 5, 6], [7, 8, 9]), ([4, 5, 6, 7], [8, 9]), ([4],)], ids=str)
def test_full_is_prompt_and_completion_side_by_side(random_model, prompts, holes):
    model, completion = random_model(1), [2, 11, 2, 2]
    given = texts(*prompts, width=6, completion=completion)
    if holes:  # the same prompts, with padding behind their first token
        ids, real = given.prompt_ids.clone(), given.real.clone()
        for row, prompt in enumerate(prompts):
            first = 6 - len(prompt)
            ids[row, first], real[row, first] = 0, False
            ids[row, 0], real[row, 0] = prompt[0], True
        given = Texts(ids, real, given.completion)
    arranged = Full().arrange(given)
    hidden = model(arranged.tokens, **arranged.attention, read=arranged.states)
    for row, prompt in enumerate(prompts):
        alone = model(torch.tensor([[*prompt, *completion]]))[0, len(prompt) :]
        torch.testing.assert_close(hidden[row], alone, rtol=1e-5, atol=1e-5)


def test_full_takes_the_kernel_that_needs_least():
    equal = Full().arrange(texts([4, 5], [6, 7], width=5, completion=[2, 2]))
    assert equal.attention == {}
    assert equal.tokens.tolist() == [[4, 5, 2, 2], [6, 7, 2, 2]]
    assert equal.real.tolist() == [[True, True], [True, True]]
    ragged = Full().arrange(texts([4, 5, 6], [7], width=5, completion=[2, 2]))
    assert list(ragged.attention) == ["padding"]
    assert ragged.attention["padding"].tolist() == [0, 2]
    assert ragged.tokens.shape == (2, 5)
    assert ragged.real.tolist() == [[True, True, True], [False, False, True]]
    hidden = torch.randn(2, 5, 4)
    first = ragged.first_pass(hidden)
    assert torch.equal(first.completion, hidden[:, 3:])
    assert torch.equal(first.prompt, hidden[:, :3])
    assert Full().width(5, 2) == 7


def test_full_identity_ignores_what_padding_holds():
    one = texts([4, 5], [4, 5], [5, 4], width=4, completion=[2, 3])
    one.prompt_ids[1, 0] = 17
    identity = Full().identity(one)
    assert torch.equal(identity[0], identity[1])
    assert not torch.equal(identity[0], identity[2])
    longer = texts([0, 4, 5], width=4, completion=[2, 3])  # token 0 itself, not padding
    assert not torch.equal(identity[0], Full().identity(longer)[0])


def plain_hidden(model, tokens, sees, positions):
    """Hidden states [L, D] of one row: one head and one query at a time, over the keys that it sees."""
    config, d = model.config, model.config.head_dim
    weight = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight[name]

    def rotated(x, position):
        angles = position * config.rope_theta ** (-torch.arange(0, d, 2).double() / d)
        a, b = x[: d // 2], x[d // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    x = weight["embed_tokens.weight"][tokens]
    for n in range(config.num_hidden_layers):
        layer = f"layers.{n}."
        h = norm(x, f"{layer}input_layernorm.weight")
        q, k, v = ((h @ weight[f"{layer}self_attn.{name}_proj.weight"].T).view(len(tokens), -1, d) for name in "qkv")
        out = torch.zeros(len(tokens), config.num_attention_heads, d, dtype=torch.float64)
        for head in range(config.num_attention_heads):
            group = head * config.key_value_heads // config.num_attention_heads
            for i in range(len(tokens)):
                seen = sees[i].nonzero()[:, 0].tolist()
                keys = torch.stack([rotated(k[j, group], positions[j]) for j in seen])
                weights = (keys @ rotated(q[i, head], positions[i]) / math.sqrt(d)).softmax(0)
                out[i, head] = weights @ v[seen, group]
        x = x + out.flatten(1) @ weight[f"{layer}self_attn.o_proj.weight"].T
        h = norm(x, f"{layer}post_attention_layernorm.weight")
        up, gate = (h @ weight[f"{layer}mlp.{name}_proj.weight"].T for name in ("up", "gate"))
        x = x + (F.silu(gate) * up) @ weight[f"{layer}mlp.down_proj.weight"].T
    return norm(x, "norm.weight")


def block_causal(length, block):
    """bool [L, L]: a token sees its own block and those before it."""
    number = torch.arange(length) // block
    return number[:, None] >= number


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"head_dim": 6}], ids=str)
@pytest.mark.parametrize("form", ["one for all", "a row each", "with a head axis"])
def test_a_mask_given_by_hand_says_what_each_token_sees(random_model, changes, form):
    model, generator = random_model(3, **changes), torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (2, 9), generator=generator)
    masks = torch.stack([block_causal(9, 3), block_causal(9, 4) if form != "one for all" else block_causal(9, 3)])
    # the last three tokens are another copy of the three before them, at the same places
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5], list(range(9))])
    given = {"one for all": masks[:1], "a row each": masks, "with a head axis": masks[:, None]}[form]
    got = model(tokens, given, positions=positions)
    for row in range(2):
        expected = plain_hidden(model, tokens[row], masks[row], positions[row].tolist())
        torch.testing.assert_close(got[row].double(), expected, rtol=1e-4, atol=1e-4)
    assert (got - model(tokens)).abs().max() > 0.05


def test_positions_alone_and_for_all_rows(random_model):
    model, tokens = random_model(3), torch.arange(3, 15).view(2, 6)
    shifted = torch.tensor([[7, 3, 9, 0, 20, 1]])
    got = model(tokens, positions=shifted)
    everything = torch.ones(6, 6, dtype=torch.bool)
    for row in range(2):
        expected = plain_hidden(model, tokens[row], everything, shifted[0].tolist())
        torch.testing.assert_close(got[row].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens, positions=torch.arange(6)[None]), model(tokens))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5), r"\[2, 6\].*\[2, 5\]"),
        (torch.ones(1, 6), r"\[2, 6\].*\[1, 6\]"),
        (torch.ones(6, dtype=torch.bool), r"attention_mask.*\[6\]"),
        (torch.ones(2, 6, 6), "bool.*float32"),
        (torch.ones(2, 6, 5, dtype=torch.bool), r"\[2, 6, 5\]"),
        (torch.ones(3, 6, 6, dtype=torch.bool), r"\[3, 6, 6\]"),
        (torch.ones(2, 4, 6, 6, dtype=torch.bool), r"\[2, 4, 6, 6\]"),
        (torch.ones(1, 1, 2, 6, 6, dtype=torch.bool), r"\[1, 1, 2, 6, 6\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.dtype} {list(value.shape)}",
)
def test_masks_that_do_not_fit_are_named(random_model, mask, message):
    with pytest.raises(ValueError, match=rf"attention_mask must be.*{message}|{message}"):
        random_model()(torch.full((2, 6), 3), mask)


def test_what_does_not_go_together_is_refused(random_model):
    tokens, mask = torch.full((2, 6), 3), torch.ones(2, 6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask and padding"):
        random_model()(tokens, mask, padding=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"attention_mask.*logit_shift"):
        random_model(logit_shift=True)(tokens, mask)
    for positions in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 6), torch.zeros(6, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"positions must be int64 \[2, 6\]"):
            random_model()(tokens, positions=positions)
    with pytest.raises(ValueError, match=r"65 tokens.*max_position_embeddings 64"):
        random_model()(tokens, positions=torch.tensor([[0, 1, 2, 3, 4, 64]]))


def test_a_head_size_of_its_own_is_saved_and_loaded(random_model, tmp_path):
    model = random_model(1, head_dim=6, num_key_value_heads=2)
    assert model.layers[0].self_attn.q_proj.weight.shape == (24, 32)
    assert model.layers[0].self_attn.k_proj.weight.shape == (12, 32)
    model.save(tmp_path)
    loaded = diffpo.load(tmp_path)
    assert loaded.config == model.config
    assert loaded.config.head_dim == 6
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    sees = torch.ones(9, 9, dtype=torch.bool)
    expected = plain_hidden(model, tokens[0], sees, list(range(9)))
    torch.testing.assert_close(model(tokens)[0].double(), expected, rtol=1e-4, atol=1e-4)
    decoded = [diffpo.generate(one, [tokens[0]], 4, cache="dual").tokens for one in (model, loaded)]
    assert torch.equal(*decoded)


def test_the_usual_head_size_is_not_written(random_model, tmp_path):
    random_model(1).save(tmp_path)
    assert "head_dim" not in (tmp_path / "config.json").read_text()
    assert diffpo.load(tmp_path).config.head_dim == 8


@pytest.mark.parametrize("model_type", ["llada", "Dream"])
def test_published_formats_cannot_say_it(random_model, tmp_path, model_type):
    changes = {"model_type": model_type, "logit_shift": model_type == "Dream", "eos_token_id": 1}
    with pytest.raises(ValueError, match=rf"head_dim 6.*{model_type}"):
        random_model(1, head_dim=6, **changes).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("value", [0, 7, 8.0, True])
def test_a_head_size_that_cannot_be_is_named(value):
    with pytest.raises(ValueError, match="head_dim"):
        ModelConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    mask_token_id=2, head_dim=value)  # fmt: skip


def test_heads_that_do_not_divide_need_a_size():
    fields = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "mask_token_id": 2}
    with pytest.raises(ValueError, match=r"hidden_size 16.*num_attention_heads 3.*head_dim"):
        ModelConfig(**fields, num_attention_heads=3)
    assert ModelConfig(**fields, num_attention_heads=3, head_dim=4).head_dim == 4
