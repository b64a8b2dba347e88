"""Keys of config.json: those that change nothing are ignored by a list, those that act are refused unless they are neutral."""

import json

import pytest

import diffpo

EVERY = ("llada", "Dream", "diffpo")
every_family = pytest.mark.parametrize("family", EVERY)

HARMLESS = {
    "gradient_checkpointing": True,
    "train_max_sequence_length": 4096,
    "layer_types": ["full_attention", "full_attention"],
    "unsloth_version": "2025.1",
    "unsloth_fixed": True,
    "unsloth_training": "yes",
    "model_max_length": 4096,
    "max_seq_length": 1024,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "_name_or_path": "GSAI-ML/LLaDA-8B-Base",
    "_attn_implementation_autoset": True,
    "_pre_quantization_dtype": "bfloat16",
    "attn_implementation": "sdpa",
    "transformers_version": "4.57.1",
    "auto_map": {"AutoModel": "evil.Model"},
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
    "attention_dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "resid_pdrop": 0.1,
    "classifier_dropout": 0.1,
    "dropout": 0.1,
    "pretraining_tp": 1,
    "use_flash_attention_2": True,
    "use_liger_kernel": True,
    "num_labels": 2,
    "id2label": {"0": "LABEL_0"},
    "architectures": ["SomeWrapper"],
    "bos_token_id": [1, 2],
    "temperature": 0.2,
    "top_p": 0.95,
    "max_new_tokens": 256,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "sliding_window": None,
    "use_sliding_window": False,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "qk_layernorm": False,
    "clip_qkv": None,
    "mlp_bias": False,
    "hidden_act": "silu",
    "is_causal": False,
    "quantization_config": None,
}
ACTING = {
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4},
    "partial_rotary_factor": 0.5,
    "alibi": True,
    "clip_qkv": 8.0,
    "logit_scale": 0.0625,
    "logits_scaling": 8,
    "lm_head_multiplier": 2.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_qk_norm": True,
    "qk_layernorm": True,
    "mlp_bias": True,
    "is_causal": True,
    "use_rope": False,
    "hidden_act": "gelu",
    "attention_multiplier": 0.0078,
    "quantization_config": {"bits": 4},
    "quantization": {"group_size": 64, "bits": 4},
    "num_experts": 8,
    "a_key_of_tomorrow": 3,
}


@pytest.fixture
def folder_of(published, random_model, tmp_path):
    """folder_of(family) -> a checkpoint folder of that family, without a tokenizer."""

    def build(family):
        if family != "diffpo":
            return published(family, family, tokenizer=False)[0]
        random_model().save(tmp_path / "own")
        return tmp_path / "own"

    return build


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@every_family
def test_keys_that_change_nothing_are_ignored(folder_of, family):
    folder = folder_of(family)
    plain = diffpo.load(folder).config
    before = (folder / "config.json").read_text()
    for key, value in HARMLESS.items():
        (folder / "config.json").write_text(before)
        edit(folder, **{key: value})
        assert diffpo.load(folder).config == plain, key
    edit(folder, **HARMLESS)
    assert diffpo.load(folder).config == plain


@every_family
def test_keys_that_act_are_refused_by_name(folder_of, family):
    folder = folder_of(family)
    before = (folder / "config.json").read_text()
    for key, value in ACTING.items():
        (folder / "config.json").write_text(before)
        edit(folder, **{key: value})
        with pytest.raises(ValueError, match=rf"config\.json: {key}\b"):
            diffpo.load(folder)


@pytest.mark.parametrize("family", ["llada", "diffpo"])
def test_a_sliding_window_acts_where_nothing_turns_it_off(folder_of, family):
    folder = folder_of(family)
    edit(folder, sliding_window=4096)
    with pytest.raises(ValueError, match="sliding_window 4096"):
        diffpo.load(folder)
    edit(folder, use_sliding_window=False)
    diffpo.load(folder)


def test_dreams_sliding_window_acts_only_when_it_is_used(folder_of):
    folder = folder_of("Dream")
    edit(folder, sliding_window=4096, max_window_layers=2)
    diffpo.load(folder)
    edit(folder, use_sliding_window=True)
    with pytest.raises(ValueError, match="use_sliding_window True"):
        diffpo.load(folder)


@every_family
def test_rotary_settings_as_a_dictionary(folder_of, family):
    folder = folder_of(family)
    edit(
        folder,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0, "factor": None},
        rope_scaling={"type": "linear", "factor": 1.0},
    )
    assert diffpo.load(folder).config.rope_theta == 12345.0


def test_transformers_names_in_a_llada_config_must_agree(folder_of):
    folder = folder_of("llada")
    edit(
        folder, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, attention_bias=False
    )
    diffpo.load(folder)
    edit(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match="num_hidden_layers 3 contradicts n_layers"):
        diffpo.load(folder)


def test_weight_tying_decides_for_llada(folder_of):
    """As in the published code, whose tie_weights does not look at tie_word_embeddings."""
    folder = folder_of("llada")
    edit(folder, tie_word_embeddings=True)
    model = diffpo.load(folder)
    assert model.lm_head.weight is not model.embed_tokens.weight


def test_ignored_keys_are_saved_as_they_were(folder_of, tmp_path):
    folder = folder_of("Dream")
    edit(folder, unsloth_version="2025.1", train_max_sequence_length=4096)
    diffpo.load(folder).save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


# what tools that fine-tune these models leave in config.json, beside the published keys
LEFT_BY = {
    "TRL": ("llada", {"dtype": "bfloat16", "_attn_implementation_autoset": True, "tie_word_embeddings": False}),
    "LLaMA-Factory": ("llada", {"_name_or_path": "GSAI-ML/LLaDA-1.5", "torch_dtype": "bfloat16", "use_cache": True}),
    "unsloth": ("Dream", {"unsloth_fixed": True, "unsloth_version": "2025.11.1", "pad_token_id": 257}),
    "axolotl": ("Dream", {"axolotl_version": "0.9", "use_cache": False, "bos_token_id": None}),
    "a fork of the published code": ("llada", {"train_max_sequence_length": 1024, "noncausal_cached_attention": False}),
    "a conversion from Llama": ("Dream", {"mlp_bias": False, "pretraining_tp": 1, "head_dim": 8}),
    "transformers 5": (
        "Dream",
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "layer_types": ["full_attention"] * 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", list(LEFT_BY))
def test_configs_as_tools_leave_them(folder_of, tool):
    family, changes = LEFT_BY[tool]
    folder = folder_of(family)
    plain = diffpo.load(folder).config
    edit(folder, **changes)
    config = diffpo.load(folder).config
    assert (config.rope_theta, config.hidden_size) == (plain.rope_theta, plain.hidden_size)
