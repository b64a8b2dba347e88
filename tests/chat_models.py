"""An untrained model that reads any text and has LLaDA's chat template."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffpo import MaskedDiffusionLM, ModelConfig

SPECIAL = ["<|endoftext|>", "<|mdm_mask|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLADA_TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte after LLaDA's special tokens, with LLaDA's chat template."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[2], eos_token=SPECIAL[0], pad_token=SPECIAL[0],
        mask_token=SPECIAL[1], extra_special_tokens={f"t{i}": token for i, token in enumerate(SPECIAL[3:])},
    )  # fmt: skip
    fast.chat_template = LLADA_TEMPLATE
    return fast


def save_chat_model(folder) -> str:
    """The folder, which then holds a model with a context of 700 tokens."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=700, mask_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    MaskedDiffusionLM(config, tokenizer).save(folder)
    return str(folder)
