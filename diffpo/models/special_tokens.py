"""Special tokens of a tokenizer: which there are, which of them end a completion, and a text as ids with one BOS."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from diffpo.text_input import check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what ends a turn in published chat templates: Llama 3 and LLaDA, ChatML (Qwen, Dream, SDAR), LLaDA 2, Gemma, Phi
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>", "<end_of_turn>", "<|end|>")


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """id -> spelling of the tokens that a decoded text does not show."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def end_ids(
    config_ids: int | Sequence[int] | None, more: Iterable[int], tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[int, ...]:
    """The ids that end a completion: the config's, ``more``, the tokenizer's EOS, and the end of a turn in its chat template."""
    ids = [config_ids] if isinstance(config_ids, int) else list(config_ids or ())
    ids.extend(more)
    if tokenizer is not None:
        ids.extend([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        template = str(tokenizer.chat_template or "")  # several named templates are a dictionary
        written = [token for token in END_OF_TURN if token in template]
        special = {token: index for index, token in special_tokens(tokenizer).items()} if written else {}
        ids.extend(special[token] for token in written if token in special)
    return tuple(dict.fromkeys(ids))


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text. A BOS that the text already begins with is not put before it again.

    ValueError for a text that is not valid Unicode or holds a word that the tokenizer does not know.
    """
    check_unicode(text)
    try:
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        if add_special_tokens and len(ids) > 1 and ids[0] == ids[1]:
            plain = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids[1:] if ids[: len(plain) + 1] == [ids[0], *plain] and ids[0] in special_tokens(tokenizer) else ids
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(f"it holds a word the model's tokenizer does not know: {error}") from error
    return ids
