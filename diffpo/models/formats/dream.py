"""Dream-7B (arXiv 2508.15487) and DiffuCoder (arXiv 2506.20639): model_type "Dream", Qwen2 keys and tensor names.

The prediction for a position is the output at the one before it.
"""

from diffpo.models.formats.published import PublishedFormat

_FIXED = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
}

DREAM = PublishedFormat(
    model_type="Dream",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "max_position_embeddings": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "attention_bias": "attention_bias",
        "tie_word_embeddings": "tie_word_embeddings",
        "mask_token_id": "mask_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    },
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": True,
        "logit_shift": True,
    },
    fixed=_FIXED,
    # sliding_window and max_window_layers act only with use_sliding_window
    inert=frozenset({"sliding_window", "max_window_layers"}),
    modules={"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
    layers="model.layers",
    layer_modules={
        name: name
        for name in (
            "input_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    },
    mask_token="<|mask|>",
    template={"model_type": "Dream", "architectures": ["DreamModel"]}
    | {key: values[0] for key, values in _FIXED.items()}
    | {"attention_dropout": 0.0, "sliding_window": None, "use_cache": True, "torch_dtype": "float32"},
)
