"""LLaDA and Dream folders as published: the same logits as a plain implementation on the published tensors, and strictness.

The implementation here is written from the published names, one unpadded sequence at a time, without diffpo's network, and
runs in fp64, so that every difference is ours.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpo
from diffpo.models.formats import FORMATS


def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def rope(x_LHd, theta):
    """Pairs (i, i + d/2) rotated by position * theta^(-2i/d)."""
    L, _, d = x_LHd.shape
    half = d // 2
    angle = torch.tensor([[p * theta ** (-2 * i / d) for i in range(half)] for p in range(L)], dtype=x_LHd.dtype)[
        :, None
    ]
    a, b = x_LHd[..., :half], x_LHd[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attention(q_LHd, k_LKd, v_LKd):
    """Every position attends to every one; key/value head h // group serves query head h."""
    _, H, d = q_LHd.shape
    group, heads = H // k_LKd.shape[1], []
    for h in range(H):
        scores_LL = q_LHd[:, h] @ k_LKd[:, h // group].T / math.sqrt(d)
        heads.append(scores_LL.softmax(dim=-1) @ v_LKd[:, h // group])
    return torch.cat(heads, dim=-1)


def silu(x):
    return x / (1 + (-x).exp())


def llada_logits(config, w, tokens):
    """[L, V] of one sequence, same-position prediction."""
    eps, heads = config["rms_norm_eps"], config["n_heads"]
    kv_heads = config["n_kv_heads"] or heads
    x = w["model.transformer.wte.weight"][tokens]
    for i in range(config["n_layers"]):
        block = f"model.transformer.blocks.{i}."
        h = rms_norm(x, w[block + "attn_norm.weight"], eps)
        q, k, v = (
            h @ w[block + f"{name}.weight"].T + w.get(block + f"{name}.bias", torch.zeros((), dtype=x.dtype))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        L = len(tokens)
        q, k = (rope(t.view(L, n, -1), config["rope_theta"]) for t, n in ((q, heads), (k, kv_heads)))
        x = x + attention(q, k, v.view(L, kv_heads, -1)) @ w[block + "attn_out.weight"].T
        h = rms_norm(x, w[block + "ff_norm.weight"], eps)
        gated = silu(h @ w[block + "ff_proj.weight"].T) * (h @ w[block + "up_proj.weight"].T)
        x = x + gated @ w[block + "ff_out.weight"].T
    x = rms_norm(x, w["model.transformer.ln_f.weight"], eps)
    head = "model.transformer.wte.weight" if config["weight_tying"] else "model.transformer.ff_out.weight"
    return x @ w[head].T


def dream_logits(config, w, tokens):
    """[L, V] of one sequence: row i is the network's output at i - 1, row 0 its output at 0."""
    eps, heads, kv_heads = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer, L = f"model.layers.{i}.", len(tokens)
        h = rms_norm(x, w[layer + "input_layernorm.weight"], eps)
        q, k, v = (
            h @ w[layer + f"self_attn.{name}_proj.weight"].T + w[layer + f"self_attn.{name}_proj.bias"]
            for name in "qkv"
        )
        q, k = (rope(t.view(L, n, -1), config["rope_theta"]) for t, n in ((q, heads), (k, kv_heads)))
        x = x + attention(q, k, v.view(L, kv_heads, -1)) @ w[layer + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[layer + "post_attention_layernorm.weight"], eps)
        gated = silu(h @ w[layer + "mlp.gate_proj.weight"].T) * (h @ w[layer + "mlp.up_proj.weight"].T)
        x = x + gated @ w[layer + "mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    logits = x @ w[head].T
    return torch.cat([logits[:1], logits[:-1]])


LOGITS = {"llada": llada_logits, "Dream": dream_logits}
VARIANTS = {
    "LLaDA": ("llada", {}),
    "LLaDA, no n_kv_heads": ("llada", {"n_kv_heads": None}),
    "LLaDA, GQA": ("llada", {"n_kv_heads": 2}),
    "LLaDA, q/k/v bias": ("llada", {"include_qkv_bias": True, "n_kv_heads": 1}),
    "LLaDA, tied": ("llada", {"weight_tying": True}),
    "LLaDA, padded vocabulary": ("llada", {"vocab_size": 300}),
    "Dream": ("Dream", {}),
    "Dream, no GQA": ("Dream", {"num_key_value_heads": 4}),
    "Dream, tied": ("Dream", {"tie_word_embeddings": True}),
}
all_variants = pytest.mark.parametrize("variant", list(VARIANTS))
both = pytest.mark.parametrize("family", ["llada", "Dream"])


@all_variants
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_are_those_of_a_plain_implementation(published, variant, padding):
    family, changes = VARIANTS[variant]
    folder, config, tensors = published(family, tokenizer=False, **changes)
    model = diffpo.load(folder)
    generator = torch.Generator().manual_seed(1)
    lengths = [13, 13, 13] if padding == "none" else [13, 9, 1]
    rows = [torch.randint(0, 320, (length,), generator=generator) for length in lengths]
    tokens = torch.full((3, 13), config.get("pad_token_id"))
    mask = torch.zeros(3, 13, dtype=torch.bool)
    for b, row in enumerate(rows):
        place = slice(13 - len(row), 13) if padding == "left" else slice(0, len(row))
        tokens[b, place], mask[b, place] = row, True
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    with torch.no_grad():
        logits = model.logits(tokens, None if padding == "none" else mask)
        for b, row in enumerate(rows):
            expected = LOGITS[family](config, exact, row)
            assert expected.std() > 0.5
            torch.testing.assert_close(logits[b][mask[b]].double(), expected, rtol=0, atol=1e-5)


LLADA_8B = {
    "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "embedding_size": 126464,
    "vocab_size": 126464, "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
DREAM_7B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 131072, "mask_token_id": 151666,
    "eos_token_id": 151643, "pad_token_id": 151643,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "size", "parameters", "tensors"),
    [("llada", LLADA_8B, 8_015_581_184, 291), ("Dream", DREAM_7B, 7_615_616_512, 339)],
    ids=["LLaDA-8B", "Dream-7B"],
)
def test_the_published_sizes(published_config, family, size, parameters, tensors):
    """8.02 and 7.62 billion parameters, as published; on the meta device, without memory."""
    config = FORMATS[family].config(published_config(family) | size, "config.json")
    with torch.device("meta"):
        model = diffpo.MaskedDiffusionLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


@both
def test_bf16_is_kept_or_asked_for(published, family):
    folder, config, tensors = published(family, dtype=torch.bfloat16, tokenizer=False)
    model = diffpo.load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tokens = torch.arange(40, 52)
    exact = LOGITS[family](config, {name: tensor.double() for name, tensor in tensors.items()}, tokens)
    with torch.no_grad():
        rounded = model.logits(tokens[None])[0].double()
        as_float = diffpo.load(folder, dtype="float32").logits(tokens[None])[0].double()
    torch.testing.assert_close(as_float, exact, rtol=0, atol=1e-5)
    assert (rounded - exact).abs().max() < 0.1  # logits of about 1, two layers in 8 bits
    half = diffpo.load(published(family, "fp32", tokenizer=False)[0], dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), model.parameters(), strict=True))


@all_variants
def test_saving_gives_the_published_names_config_and_bytes(published, tmp_path, variant):
    family, changes = VARIANTS[variant]
    folder, config, tensors = published(family, **changes)
    diffpo.load(folder).save(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def stored_bytes(folder) -> dict[str, bytes]:
    from safetensors import deserialize

    return {
        name: bytes(entry["data"])
        for path in folder.glob("*.safetensors")
        for name, entry in deserialize(path.read_bytes())
    }


@both
def test_a_changed_model_is_saved_with_what_changed(published, tmp_path, family):
    folder, config, _ = published(family)
    model = diffpo.load(folder, dtype=torch.bfloat16)
    model.config = model.config.model_copy(update={"max_position_embeddings": 128, "eos_token_id": 258})
    with torch.no_grad():
        model.norm.weight.mul_(2)
    model.save(tmp_path / "changed")
    saved = json.loads((tmp_path / "changed/config.json").read_text())
    length = "max_sequence_length" if family == "llada" else "max_position_embeddings"
    changed = {length: 128, "eos_token_id": 258} | ({"torch_dtype": "bfloat16"} if family == "Dream" else {})
    assert saved == config | changed
    again = diffpo.load(tmp_path / "changed")
    assert again.config == model.config
    assert torch.equal(again.norm.weight, model.norm.weight)


@both
def test_a_new_model_can_be_written_in_a_published_format(random_model, tmp_path, family):
    shift = family == "Dream"
    model = random_model(model_type=family, attention_bias=shift, logit_shift=shift, num_key_value_heads=2)
    model.save(tmp_path)
    again = diffpo.load(tmp_path)
    assert again.config == model.config
    assert "model_type" in json.loads((tmp_path / "config.json").read_text())
    tokens = torch.arange(12)[None]
    assert torch.equal(again.logits(tokens), model.logits(tokens))


def test_what_a_format_cannot_express_is_not_saved(random_model, tmp_path):
    with pytest.raises(ValueError, match="logit_shift True cannot be expressed in the llada format"):
        random_model(model_type="llada", logit_shift=True).save(tmp_path / "x")
    with pytest.raises(ValueError, match="model_type 'gpt'"):
        random_model(model_type="gpt").save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@both
@pytest.mark.parametrize(
    ("dtype", "reads"), [(torch.float32, "both"), (torch.bfloat16, "completion"), (torch.float32, "attention")]
)
def test_a_learned_threshold_survives_beside_the_published_files(published, tmp_path, family, dtype, reads):
    folder, _, tensors = published(family, dtype=dtype)
    model = diffpo.load(folder)
    gammas = (0.001, 0.1, float("inf"))
    model.add_threshold(gammas, "margin", reads)
    torch.nn.init.normal_(model.threshold.linear.weight)
    model.save(tmp_path / "with")
    again = diffpo.load(tmp_path / "with")
    assert again.config == model.config
    assert (again.config.threshold_gammas, again.config.threshold_order) == (gammas, "margin")
    assert torch.equal(again.threshold.linear.weight, model.threshold.linear.weight)
    assert again.threshold.linear.weight.dtype == torch.float32, "as it was trained, whatever the weights are"
    assert torch.equal(again.threshold.gammas, torch.tensor(gammas)), "bins are fp32 whatever the weights are"
    assert stored_bytes(tmp_path / "with").keys() == tensors.keys(), "another tool would find an unknown tensor"
    saved = json.loads((tmp_path / "with/config.json").read_text())
    assert not [key for key in saved if "threshold" in key]
    path = tmp_path / "with/diffpo_threshold.st"
    old = {"gammas": json.dumps(gammas), "proxy": "margin"}  # as earlier versions wrote it: all read the completion
    save_file(load_file(path), path, metadata=old)
    if reads == "completion":
        assert diffpo.load(tmp_path / "with").config == again.config
    else:
        with pytest.raises(ValueError, match="holds another threshold"):
            diffpo.load(tmp_path / "with")
    again.save(tmp_path / "twice")
    assert diffpo.load(tmp_path / "twice").config == again.config
    diffpo.load(folder).save(tmp_path / "with")
    assert diffpo.load(tmp_path / "with").threshold is None, "the threshold of the replaced model was left behind"


def test_weights_of_a_published_folder_are_read_into_an_existing_model(published):
    from diffpo.models.checkpoints import read_weights

    first, _, _ = published("llada", "first")
    second, _, tensors = published("llada", "second", seed=1)
    model = diffpo.load(first)
    parameter = model.lm_head.weight
    read_weights(model, second)
    assert model.lm_head.weight is parameter
    assert torch.equal(parameter, tensors["model.transformer.ff_out.weight"])


REFUSED = [
    ("llada", {"alibi": True}, "alibi True"),
    ("llada", {"rope": False}, "rope False"),
    ("llada", {"activation_type": "swiglu"}, "activation_type 'swiglu'"),
    ("llada", {"block_type": "sequential"}, "block_type 'sequential'"),
    ("llada", {"block_group_size": 4}, "block_group_size 4"),
    ("llada", {"layer_norm_type": "default"}, "layer_norm_type 'default'"),
    ("llada", {"attention_layer_norm": True}, "attention_layer_norm True"),
    ("llada", {"bias_for_layer_norm": True}, "bias_for_layer_norm True"),
    ("llada", {"include_bias": True}, "include_bias True"),
    ("llada", {"input_emb_norm": True}, "input_emb_norm True"),
    ("llada", {"scale_logits": True}, "scale_logits True"),
    ("llada", {"multi_query_attention": True}, "multi_query_attention True"),
    ("llada", {"embedding_size": 300}, "embedding_size 300"),
    ("llada", {"embedding_size": "x"}, "embedding_size: Input should be a valid integer"),
    ("llada", {"n_heads": 3}, "d_model 32 must divide by n_heads 3"),
    ("Dream", {"rope_scaling": "yarn"}, "rope_scaling must be an object"),
    ("Dream", {"eos_token_id": [1, "two"]}, "eos_token_id"),
    ("llada", {"is_causal": True}, "is_causal True"),
    ("llada", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llada", {"d_model": "wide"}, "d_model"),
    ("llada", {"mask_token_id": 1000}, "mask_token_id 1000"),
    ("llada", {"mask_token_id": None}, "lacks mask_token_id"),
    ("Dream", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("Dream", {"use_sliding_window": True}, "use_sliding_window True"),
    ("Dream", {"use_mrope": True}, "use_mrope True"),
    ("Dream", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.*yarn"),
    ("Dream", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.*linear"),
    ("Dream", {"use_qk_norm": True}, "use_qk_norm True"),
    ("Dream", {"head_dim": 16}, "head_dim 16"),
    ("Dream", {"hidden_size": None}, "lacks hidden_size"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=[next(iter(c)) for _, c, _ in REFUSED])
def test_a_config_that_cannot_be_honoured_is_refused_by_name(published, family, changes, message):
    folder, config, _ = published(family, tokenizer=False)
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message) as caught:
        diffpo.load(folder)
    assert "config.json" in str(caught.value)


@both
def test_keys_that_change_nothing_are_accepted(published, family):
    folder, config, _ = published(family, tokenizer=False)
    plain = diffpo.load(folder).config
    harmless = {
        "_name_or_path": "x",
        "torch_dtype": "float16",
        "temperature": 1.0,
        "is_causal": False,
        "use_cache": True,
        "attention_dropout": 0.1,
    }
    (folder / "config.json").write_text(json.dumps(config | harmless))
    assert diffpo.load(folder).config == plain
    if family == "Dream":
        del config["rope_theta"]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
        (folder / "config.json").write_text(json.dumps(config))
        assert diffpo.load(folder).config == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]},
            "llada2_moe.*mixture of experts.*not supported yet",
        ),
        ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}, "LLaDAMoEModelLM.*mixture of experts"),
        ({"model_type": "llada", "num_experts": 64}, "num_experts 64.*mixture of experts"),
        ({"model_type": "sdar", "architectures": ["SDARForCausalLM"]}, "sdar.*block-causal.*not supported yet"),
        ({"model_type": "Fast_dLLM_Qwen", "bd_size": 32}, "Fast_dLLM_Qwen.*block-causal"),
        ({"model_type": "Dream", "block_size": 32}, "block_size 32.*block-causal"),
        (
            {"model_type": "llada", "quantization_config": {"load_in_8bit": True}},
            "quantization_config.*quantised weights",
        ),
        ({"model_type": "llama"}, "'llama' is not supported; supported: diffpo, llada, Dream"),
    ],
    ids=["LLaDA2", "LLaDA-MoE", "experts", "SDAR", "Fast-dLLM-v2", "blocks", "quantised", "another"],
)
def test_families_that_do_not_load_say_why(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        diffpo.load(tmp_path)


def test_a_device_or_dtype_that_cannot_be_used(published):
    folder, _, _ = published("llada", tokenizer=False)
    for dtype in ("int8", "float17", torch.int64, 16):
        with pytest.raises(ValueError, match=f"dtype .*{dtype}"):
            diffpo.load(folder, dtype=dtype)
    with pytest.raises(ValueError, match="device 'abacus'"):
        diffpo.load(folder, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda'"):
            diffpo.load(folder, device="cuda")
