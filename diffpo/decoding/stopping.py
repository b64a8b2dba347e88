"""Stop strings: the text ends before the first of them, and a row may end once everything before it is committed."""

from collections.abc import Sequence

from torch import Tensor

from diffpo.decoding.step import first_position
from diffpo.models.transformer import MaskedDiffusionLM


class StopStrings:
    """Watches the text of rows in flight; the tokens before the first masked position are decoded whenever there are more of them."""

    def __init__(self, model: MaskedDiffusionLM, strings: tuple[str, ...]):
        self.model, self.strings = model, strings
        self.seen: dict[int, int] = {}  # tokens already looked at, by prompt

    def reached(self, tokens: Tensor, row_ids: Sequence[int]) -> list[bool]:
        """For each row of tokens [A, L]: a stop string stands in what is committed without a gap from the start."""
        known = first_position(tokens, self.model.mask_id).tolist()
        grown = [i for i, row in enumerate(row_ids) if known[i] > self.seen.get(row, 0)]
        if not grown:
            return [False] * len(known)
        self.seen |= {row_ids[i]: known[i] for i in grown}
        rows = tokens.tolist()
        texts = self.model.tokenizer.batch_decode([rows[i][: known[i]] for i in grown], skip_special_tokens=True)
        stopped = {i for i, text in zip(grown, texts, strict=True) if cut(text, self.strings) != text}
        return [i in stopped for i in range(len(known))]


def cut(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return text[: min((at for at in map(text.find, strings) if at >= 0), default=len(text))]


def check_stop(model: MaskedDiffusionLM, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple; ValueError for anything that is not one, or where the model cannot show or end a text."""
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, list | tuple) or any(not isinstance(item, str) or not item for item in strings):
        raise ValueError(f"stop must be a string or a list of strings, none of them empty, got {stop!r}")
    if strings and model.tokenizer is None:
        raise ValueError("stop needs a model with a tokenizer: without one there is no text to look for it in")
    if strings and model.config.eos_token_id is None:
        raise ValueError("stop needs a model with an eos_token_id, which fills a row that ends early")
    return tuple(strings)
