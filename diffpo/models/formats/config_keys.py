"""The keys of a config.json that no family reads: which ones change nothing, and which are refused because they would."""

from collections.abc import Callable, Collection
from pathlib import Path

from diffpo.models.folder_files import shown

# Without influence on the network's numbers, whatever the value. Among them "auto_map": it names remote code, which is never run.
INERT = frozenset({
    # what transformers writes
    "architectures", "auto_map", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "name_or_path",
    "tokenizer_class", "return_dict", "use_return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states",
    "output_scores", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task",
    "chunk_size_feed_forward", "is_encoder_decoder", "torchscript", "use_bfloat16", "tf_legacy_loss", "pretraining_tp",
    "attn_implementation", "num_logits_to_keep", "logits_to_keep", "cache_implementation", "tie_encoder_decoder",
    "bos_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "decoder_start_token_id",
    # generation settings that transformers 4 wrote here; decoding has its own
    "max_length", "min_length", "max_new_tokens", "min_new_tokens", "num_beams", "num_beam_groups", "temperature", "top_k",
    "top_p", "min_p", "typical_p", "do_sample", "early_stopping", "length_penalty", "repetition_penalty", "diversity_penalty",
    "num_return_sequences", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "remove_invalid_values", "steps", "diffusion_steps", "gen_length", "remasking", "alg", "alg_temp", "cfg_scale",
    # the tokenizer's
    "mask_token", "eos_token", "pad_token", "bos_token", "unk_token", "chat_template", "additional_special_tokens",
    # what trainers write, and how the model was trained or is to be run
    "gradient_checkpointing", "use_gradient_checkpointing", "gradient_checkpointing_kwargs", "gradient_checkpointing_mode",
    "activation_checkpointing", "activation_checkpoint", "train_max_sequence_length", "model_max_length", "max_seq_length",
    "max_seq_len", "seq_length", "seq_len", "sequence_length", "original_max_position_embeddings", "padding_side",
    "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "flash_attn", "flash_attention", "use_sdpa", "use_liger_kernel",
    "use_fused_kernels", "fused_kernels", "use_manual_attention", "attn_monitor_layer", "attn_monitor_all_layers", "torch_compile", "compile", "use_unpad", "keys_to_ignore_at_inference", "loss_type",
    "label_smoothing", "z_loss", "seed", "precision", "ignore_index", "noise_schedule",
    "base_model", "base_model_name_or_path", "model_name", "model_name_or_path", "tokenizer_name", "tokenizer_name_or_path", "version",
    "license", "language", "tags", "library_name", "pipeline_tag", "datasets", "framework", "trained_with", "axolotl_version",
    "trl_version", "peft_version", "llamafactory_version",
})  # fmt: skip
# families of such keys: unsloth's marks, initial values, dropout (which is off when a model is evaluated), comments
_INERT_STARTS = ("_", "unsloth_", "initializer_", "init_", "dropout_")
_INERT_ENDS = ("dropout", "_dropout_prob", "_dropout_p", "_pdrop", "_dropout_rate")


def _full_attention(value: object) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


def _one(value: object) -> bool:
    return not isinstance(value, bool) and value == 1


def _yes(value: object) -> bool:
    return value is True


def _silu(value: object) -> bool:
    return value in ("silu", "swish")


# Keys that act on the network unless they hold the value that leaves it as it is.
_NEUTRAL: dict[str, Callable[[object], bool]] = {
    "layer_types": _full_attention,
    "partial_rotary_factor": _one, "rotary_pct": _one, "rotary_percent": _one, "rope_percent": _one, "rope_factor": _one,
    "logit_scale": _one, "logits_scaling": _one, "logits_scale": _one, "lm_head_multiplier": _one, "mup_scale": _one,
    "embedding_multiplier": _one, "residual_multiplier": _one, "scale_emb": _one, "attention_factor": _one,
    "rope": _yes, "use_rope": _yes, "use_rotary": _yes, "use_rotary_embeddings": _yes, "rotary": _yes, "use_rms_norm": _yes,
    "bidirectional": _yes, "use_bidirectional_attention": _yes, "gated_mlp": _yes, "use_glu": _yes,
    "hidden_act": _silu, "hidden_activation": _silu, "activation_function": _silu, "activation_type": _silu, "mlp_act": _silu,
}  # fmt: skip
# keys of the list above whose absence of a value (false, 0) is no neutral value
_NEVER_OFF = frozenset(key for key, test in _NEUTRAL.items() if test in (_one, _yes))
_WINDOW = ("sliding_window", "sliding_window_pattern", "max_window_layers", "sliding_window_size", "window_size")


def is_inert(key: str) -> bool:
    return key in INERT or key.startswith(_INERT_STARTS) or key.endswith(_INERT_ENDS)


def refuse_keys_that_act(fields: dict, known: Collection[str], family: str, where: str | Path) -> None:
    """ValueError, naming the key, for one outside of ``known`` that changes the network, or that may."""
    for key, value in fields.items():
        if key in known or is_inert(key) or value is None:
            continue
        if key in _WINDOW and not fields.get("use_sliding_window", bool(fields.get("sliding_window"))):
            continue
        if key in _NEUTRAL and (_NEUTRAL[key](value) or (not value and key not in _NEVER_OFF)):
            continue
        if key in _NEUTRAL or key in _WINDOW:
            raise ValueError(
                f"{where}: {shown(key)[1:-1]} {shown(value)} changes the network in a way that is not supported"
            )
        if value:
            raise ValueError(
                f"{where}: {shown(key)[1:-1]} {shown(value)} is not a key of {family} models that diffpo knows, and may change "
                "the network; remove it if it does not"
            )


def with_rope_theta(fields: dict, where: str | Path) -> dict:
    """The fields with rope_theta as a top-level key; transformers 5 writes rotary settings as a dictionary.

    ValueError for a rotary embedding other than the default one.
    """
    fields = dict(fields)
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.pop(key, None) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{where}: {key} must be an object, got {shown(rope)}")
        if not _is_default_rope(rope):
            raise ValueError(f"{where}: {key} {shown(rope)} is not supported, only the default rotary embedding")
        if rope.get("rope_theta") is not None:
            fields["rope_theta"] = rope["rope_theta"]
    return fields


def _is_default_rope(rope: dict) -> bool:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    named = ("rope_type", "type", "rope_theta", "original_max_position_embeddings")
    return (kind == "default" or (kind == "linear" and _one(rope.get("factor")))) and all(
        key in named or value is None or _one(value) for key, value in rope.items()
    )
