"""Stop strings: the text ends before the first of them, and a row may end once everything before it is committed.

The text of a completion does not show its special tokens. To a stop string they are there all the same: it may hold them in their
spelling ("<|eot_id|>"), and it does not match across one that it does not hold. Inside, each is one code point that no text can hold.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpo.models.special_tokens import special_tokens
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.text_input import check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST_MARK, _OTHER_MARK = 0xD800, "\udfff"  # surrogates: the text that a tokenizer decodes never holds one
_MARKS = re.compile("[\ud800-\udfff]")


class StopText:
    """The text of completions up to the first stop string. ``strings`` as ``check_stop`` returns them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", strings: Sequence[str]):
        self.tokenizer = tokenizer
        special = special_tokens(tokenizer) if strings else {}
        spellings = sorted((text for text in special.values() if text), key=len, reverse=True)
        held = [text for text in spellings if any(text in string for string in strings)]
        mark = {text: chr(_FIRST_MARK + number) for number, text in enumerate(held)}
        self.marks = {index: mark.get(text, _OTHER_MARK) for index, text in special.items()}
        parts = re.compile("|".join(map(re.escape, held)) or "(?!)")
        marked = (parts.sub(lambda match: mark[match[0]], string) for string in strings)
        # also as given: a model may spell a special token out in ordinary ones
        self.strings = tuple(dict.fromkeys([*marked, *strings]))

    def cut(self, rows: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
        """(text before the first stop string, whether there is one) of each row of ids; special tokens removed."""
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [self._cut(self._marked(text, row)) for text, row in zip(texts, rows, strict=True)]

    def _cut(self, marked: str) -> tuple[str, bool]:
        end = min((at for at in map(marked.find, self.strings) if at >= 0), default=None)
        return _MARKS.sub("", marked[:end]), end is not None

    def _marked(self, text: str, row: Sequence[int]) -> str:
        """``text`` with a mark where each special token of the row stood: after what the tokens before it decode to."""
        places = [place for place, index in enumerate(row) if index in self.marks]
        before = self.tokenizer.batch_decode([row[:place] for place in places], skip_special_tokens=True)
        parts, done = [], 0
        for place, start in zip(places, before, strict=True):
            end = max(done, _common_prefix(start, text))
            parts += [text[done:end], self.marks[row[place]]]
            done = end
        return "".join([*parts, text[done:]])


def _common_prefix(one: str, other: str) -> int:
    """How many characters are equal; all of ``one``, unless it ends within a character of several tokens."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class StopStrings:
    """Watches the text of rows in flight; the tokens before the first masked position are decoded whenever there are more of them."""

    def __init__(self, model: MaskedDiffusionLM, strings: tuple[str, ...]):
        self.mask_id, self.eos_ids, self.text = model.mask_id, model.eos_ids, StopText(model.tokenizer, strings)
        self.seen: dict[int, int] = {}  # tokens already looked at, by row

    def reached(self, completions: Sequence[Sequence[int]], ids: Sequence[int]) -> list[bool]:
        """For each completion, of the row with that id: a stop string stands in what is committed without a gap from the start."""
        known = [self._known(tokens) for tokens in completions]
        grown = [i for i, row in enumerate(ids) if known[i] > self.seen.get(row, 0)]
        if not grown:
            return [False] * len(known)
        self.seen |= {ids[i]: known[i] for i in grown}
        found = self.text.cut([completions[i][: known[i]] for i in grown])
        stopped = {i for i, (_, is_stop) in zip(grown, found, strict=True) if is_stop}
        return [i in stopped for i in range(len(known))]

    def forget(self, row: int) -> None:
        """The row has left."""
        self.seen.pop(row, None)

    def _known(self, tokens: Sequence[int]) -> int:
        """How many tokens stand before the first masked position; nothing behind an EOS belongs to the text."""
        for place, token in enumerate(tokens):
            if token == self.mask_id:
                return place
            if token in self.eos_ids:
                return place + 1
        return len(tokens)


def checked_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple; ValueError for anything that is not one."""
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, list | tuple) or any(not isinstance(item, str) or not item for item in strings):
        raise ValueError(f"stop must be a string or a list of strings, none of them empty, got {stop!r}")
    for string in strings:
        try:
            check_unicode(string)
        except ValueError as error:
            raise ValueError(f"stop {string!r} is {error}") from None
    return tuple(strings)


def check_stop(model: MaskedDiffusionLM, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple; ValueError for anything that is not one, or where the model cannot show or end a text."""
    strings = checked_strings(stop)
    if strings and model.tokenizer is None:
        raise ValueError("stop needs a model with a tokenizer: without one there is no text to look for it in")
    if strings and not model.eos_ids:
        raise ValueError("stop needs a model with an eos_token_id, which fills a row that ends early")
    mask = special_tokens(model.tokenizer).get(model.mask_id) if strings else None
    for string in strings:
        if mask and mask in string:
            raise ValueError(f"stop {string!r} holds the mask token {mask}, which no completion does")
    return strings
