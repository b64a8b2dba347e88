"""The tokenizer of a checkpoint folder: read without remote code, checked against the config, kept as published."""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffpo.models.folder_files import find, parse_json, read_bytes
from diffpo.models.model_config import ModelConfig
from diffpo.models.tokenizer_staging import staged, tokenizer_content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_MOST_CARRIED = 64
_CARRIED_BYTES = 2**20  # of one file; modeling_llada.py has 70 kB


def read_tokenizer(
    folder: Path, config: ModelConfig, mask_token: str | None = None
) -> "PreTrainedTokenizerBase | None":
    """The folder's transformers tokenizer, or None when it holds none.

    tokenizer.json is read as it is; vocab.json with merges.txt (Dream) is Qwen2's byte-level BPE, which the remote code named
    in tokenizer_config.json repeats. ``mask_token``: the mask's spelling in this family, used where the files declare none
    (LLaDA). ValueError: unreadable files, more tokens than the model has, or a mask id other than the config's.
    """
    content = tokenizer_content(folder, TOKENIZER_FILES)
    if not content:
        return None
    if "tokenizer.json" not in content and not {"vocab.json", "merges.txt"} <= content.keys():
        raise FileNotFoundError(
            f"{folder} holds parts of a tokenizer, but no tokenizer.json (nor vocab.json, merges.txt)"
        )
    tokenizer = _load(content, folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {config.vocab_size}"
        )
    largest = max([*tokenizer.get_vocab().values(), *_declared_ids(content)], default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has a token with the id {largest}, the model's vocab_size is {config.vocab_size}"
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


def _declared_ids(content: Mapping[str, bytes]) -> list[int]:
    """The ids that files beside tokenizer.json give to tokens."""
    settings = parse_json(content.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
    added = parse_json(content.get("added_tokens.json", b"{}"), "added_tokens.json")
    return [int(token_id) for token_id in [*(settings.get("added_tokens_decoder") or {}), *added.values()]]


def _load(content: Mapping[str, bytes], folder: Path) -> "PreTrainedTokenizerBase":
    try:
        with staged(content) as copy:
            if "tokenizer.json" in content:
                from transformers import PreTrainedTokenizerFast as Tokenizer
            else:
                from transformers import Qwen2Tokenizer as Tokenizer
            tokenizer = Tokenizer.from_pretrained(copy)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # the copy did not fit on the disk: no fault of the tokenizer
        # a panic of the native library is no Exception
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise ValueError(f"{folder}: the tokenizer is not readable: {error}") from error
    tokenizer.name_or_path = str(folder)
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
    def read(
        cls, folder: Path, tokenizer: "PreTrainedTokenizerBase | None", others: tuple[str, ...]
    ) -> "PublishedFiles":
        """The tokenizer's files, and those that match the glob patterns ``others``."""
        names = sorted({path.name for pattern in others for path in folder.glob(pattern)})
        if len(names) > _MOST_CARRIED:
            raise ValueError(
                f"{folder} holds {len(names)} files that belong to the model; at most {_MOST_CARRIED} are kept"
            )
        return cls(
            tokenizer=tokenizer_content(folder, TOKENIZER_FILES),
            others={name: read_bytes(folder / name, _CARRIED_BYTES) for name in names if find(folder, name)},
            _state=_state(tokenizer),
        )

    def describe(self, tokenizer: "PreTrainedTokenizerBase | None") -> bool:
        """Whether ``tokenizer`` is still what the files hold: no token added, no template changed."""
        return tokenizer is not None and _state(tokenizer) == self._state


def _state(tokenizer: "PreTrainedTokenizerBase | None") -> tuple | None:
    if tokenizer is None:
        return None
    names = sorted(tokenizer.special_tokens_map.items(), key=str)
    added = str(tokenizer.added_tokens_decoder)
    return type(tokenizer), len(tokenizer), str(names), added, tokenizer.chat_template, tokenizer.padding_side
