"""Small checkpoint folders in the published formats: the config keys, tensor names and files of LLaDA-8B and Dream-7B."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LLADA_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 320,
    "eos_token_id": 257,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 261,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 257,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 320,
    "weight_tying": False,
}
DREAM_CONFIG = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 256,
    "eos_token_id": 256,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": 260,
    "max_position_embeddings": 64,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 256,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 320,
}
LLADA_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def llada_shapes(config: dict) -> dict[str, tuple]:
    d, inner, head_dim = config["d_model"], config["mlp_hidden_size"], config["d_model"] // config["n_heads"]
    kv = (config["n_kv_heads"] or config["n_heads"]) * head_dim
    shapes = {"model.transformer.wte.weight": (config["embedding_size"], d), "model.transformer.ln_f.weight": (d,)}
    for i in range(config["n_layers"]):
        block = f"model.transformer.blocks.{i}."
        shapes |= {block + "attn_norm.weight": (d,), block + "ff_norm.weight": (d,)}
        shapes |= {block + f"{name}_proj.weight": (rows, d) for name, rows in (("q", d), ("k", kv), ("v", kv))}
        if config["include_qkv_bias"]:
            shapes |= {block + f"{name}_proj.bias": (rows,) for name, rows in (("q", d), ("k", kv), ("v", kv))}
        shapes |= {block + "attn_out.weight": (d, d), block + "ff_out.weight": (d, inner)}
        shapes |= {block + "ff_proj.weight": (inner, d), block + "up_proj.weight": (inner, d)}
    if not config["weight_tying"]:
        shapes["model.transformer.ff_out.weight"] = (config["embedding_size"], d)
    return shapes


def dream_shapes(config: dict) -> dict[str, tuple]:
    d, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * (d // config["num_attention_heads"])
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (d,), layer + "post_attention_layernorm.weight": (d,)}
        for name, rows in (("q", d), ("k", kv), ("v", kv)):
            shapes |= {
                layer + f"self_attn.{name}_proj.weight": (rows, d),
                layer + f"self_attn.{name}_proj.bias": (rows,),
            }
        shapes[layer + "self_attn.o_proj.weight"] = (d, d)
        shapes |= {layer + f"mlp.{name}_proj.weight": (inner, d) for name in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (d, inner)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return shapes


FAMILIES = {"llada": (LLADA_CONFIG, llada_shapes), "Dream": (DREAM_CONFIG, dream_shapes)}


def random_tensors(shapes: dict[str, tuple], seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Weights that make every part matter: norms around one, logits with a standard deviation of about one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name or "ln_f" in name:
            tensors[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            tensors[name] = 0.5 * noise
        elif name.split(".")[-2] in ("wte", "embed_tokens", "lm_head") or name == "model.transformer.ff_out.weight":
            tensors[name] = 0.2 * noise
        else:
            tensors[name] = noise / shape[1] ** 0.5
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_shards(folder, tensors: dict[str, torch.Tensor], count: int) -> None:
    """As transformers writes them: model-0000i-of-0000n.safetensors and an index."""
    names = list(tensors)
    weight_map = {
        name: f"model-{1 + i * count // len(names):05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        content = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(content, folder / shard, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_llada_tokenizer(folder) -> None:
    """Bytes 0 to 255, then the special tokens; no mask_token is declared, as in the published files."""
    special = [
        "<|startoftext|>",
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|mdm_mask|>",
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": LLADA_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    names = {key: config[key] for key in ("bos_token", "eos_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def write_dream_tokenizer(folder) -> None:
    """vocab.json, merges.txt and a tokenizer_config.json that names remote code, without tokenizer.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({character: i for i, character in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<|beginoftext|>": 259, "<|mask|>": 260}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    (folder / "added_tokens.json").write_text(json.dumps(special))
    config = {
        "added_tokens_decoder": {str(i): {"content": token} | flags for token, i in special.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


REMOTE_CODE = "raise RuntimeError('remote code was run')\n"


@pytest.fixture
def published_config():
    """published_config(family) -> the config.json of a small model."""
    return lambda family: dict(FAMILIES[family][0])


@pytest.fixture
def published(tmp_path):
    """published(family, name, shards, dtype, seed, tokenizer, **config changes) -> (folder, config, tensors)."""

    def build(family, name="published", shards=1, dtype=torch.float32, seed=0, tokenizer=True, **changes):
        config, shapes = FAMILIES[family][0] | changes, FAMILIES[family][1]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        tensors = random_tensors(shapes(config), seed, dtype)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            write_shards(folder, tensors, shards)
        if tokenizer:
            write_llada_tokenizer(folder) if family == "llada" else write_dream_tokenizer(folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": 257}')
        for module in config["auto_map"].values():
            (folder / f"{module.split('.')[0]}.py").write_text(REMOTE_CODE)
        return folder, config, tensors

    return build
