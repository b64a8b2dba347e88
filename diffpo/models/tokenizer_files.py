"""The tokenizer of a checkpoint folder: read without remote code, checked against the config, kept as published."""

from dataclasses import dataclass
from pathlib import Path

from diffpo.models.transformer import ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def read_tokenizer(folder: Path, config: ModelConfig, mask_token: str | None = None):
    """The folder's transformers tokenizer, or None when it holds none.

    tokenizer.json is read as it is; vocab.json with merges.txt (Dream) is Qwen2's byte-level BPE, which the remote code named
    in tokenizer_config.json repeats. ``mask_token``: the mask's spelling in this family, used where the files declare none
    (LLaDA). ValueError: unreadable files, more tokens than the model has, or a mask id other than the config's.
    """
    if (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast as Tokenizer
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        from transformers import Qwen2Tokenizer as Tokenizer
    elif any((folder / name).exists() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} holds parts of a tokenizer, but no tokenizer.json (nor vocab.json, merges.txt)"
        )
    else:
        return None
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{folder}: the tokenizer is not readable: {error}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {config.vocab_size}"
        )
    mask_id = tokenizer.mask_token_id
    if mask_id is None and mask_token:
        mask_id = tokenizer.backend_tokenizer.token_to_id(mask_token)
    if mask_id is not None and mask_id != config.mask_token_id:
        raise ValueError(
            f"{folder}: the tokenizer's mask id is {mask_id}, the config's mask_token_id {config.mask_token_id}"
        )
    if mask_id is not None and tokenizer.mask_token is None:
        tokenizer.mask_token = mask_token
    return tokenizer


@dataclass(frozen=True)
class PublishedFiles:
    """Files carried from where a model was loaded to where it is saved, byte for byte.

    transformers 5 writes tokenizers that version 4, which the published remote code needs, cannot read.
    """

    tokenizer: dict[str, bytes]
    others: dict[str, bytes]
    _state: tuple | None

    @classmethod
    def read(cls, folder: Path, tokenizer, others: tuple[str, ...]) -> "PublishedFiles":
        """The tokenizer's files, and those that match the glob patterns ``others``."""
        return cls(
            tokenizer={name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()},
            others={path.name: path.read_bytes() for pattern in others for path in folder.glob(pattern)},
            _state=_state(tokenizer),
        )

    def describe(self, tokenizer) -> bool:
        """Whether ``tokenizer`` is still what the files hold: no token added, no template changed."""
        return tokenizer is not None and _state(tokenizer) == self._state


def _state(tokenizer) -> tuple | None:
    if tokenizer is None:
        return None
    names = sorted(tokenizer.special_tokens_map.items(), key=str)
    added = str(tokenizer.added_tokens_decoder)
    return type(tokenizer), len(tokenizer), str(names), added, tokenizer.chat_template, tokenizer.padding_side
