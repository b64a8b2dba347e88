"""LLaDA-8B-Base, -Instruct and 1.5 (arXiv 2502.09992, 2505.19223): model_type "llada", an OLMo-style config."""

from pathlib import Path

from diffpo.models.folder_files import shown
from diffpo.models.formats.published import PublishedFormat


def _resolve(fields: dict, where: str | Path) -> dict:
    """embedding_size rows are stored (vocab_size, padded); without mlp_hidden_size, mlp_ratio gives the inner size."""
    fields = dict(fields)
    for key in ("embedding_size", "vocab_size", "mlp_ratio", "d_model"):
        value = fields.get(key)
        if value is not None and (type(value) is not int or abs(value) >= 2**30):
            raise ValueError(f"{where}: {key}: Input should be a valid integer below 2^30, got {shown(value)}")
    stored, used = fields.get("embedding_size"), fields.get("vocab_size")
    if used is not None and used <= 0:
        raise ValueError(f"{where}: vocab_size {used} must be positive")
    if stored is None:
        fields["embedding_size"] = used
    elif used is not None and 0 < stored < used:
        raise ValueError(f"{where}: embedding_size {stored} is below vocab_size {used}")
    if fields.get("mlp_hidden_size") is None and fields.get("mlp_ratio") and fields.get("d_model"):
        fields["mlp_hidden_size"] = fields["mlp_ratio"] * fields["d_model"]
    return fields


_FIXED = {
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "multi_query_attention": (None, False),
}

# rope_full_precision: rotary angles are in fp32 here whatever it says. tie_word_embeddings: the published code asks weight_tying alone
_INERT = frozenset({
    "vocab_size", "mlp_ratio", "alibi_bias_max", "attention_layer_norm_with_affine", "rope_full_precision", "tie_word_embeddings",
})  # fmt: skip

LLADA = PublishedFormat(
    model_type="llada",
    keys={
        "vocab_size": "embedding_size",
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "attention_bias": "include_qkv_bias",
        "tie_word_embeddings": "weight_tying",
        "mask_token_id": "mask_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    },
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "logit_shift": False},
    fixed=_FIXED,
    inert=_INERT,
    modules={
        "embed_tokens": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
    },
    layers="model.transformer.blocks",
    layer_modules={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out",
        "post_attention_layernorm": "ff_norm",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    },
    mask_token="<|mdm_mask|>",
    template={"model_type": "llada", "architectures": ["LLaDAModelLM"]}
    | {key: values[0] for key, values in _FIXED.items()}
    | {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    | {"rope_full_precision": True, "init_device": "meta", "use_cache": False, "torch_dtype": "float32"},
    resolve=_resolve,
)
