"""The tokenizer of the tiny models: one token per whitespace-separated word."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, MASK = "<pad>", "<eos>", "<mask>"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer over ``words``; ids 0, 1, 2 are padding, end of sequence and mask.

    A word outside the vocabulary is an error at encoding time: a tiny model has no notion of an unknown word.
    """
    vocabulary = {word: index for index, word in enumerate([PAD, EOS, MASK, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, mask_token=MASK, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
