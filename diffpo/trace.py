"""The denoising of finished rows as one HTML page (see ``html_page``), and the text of each token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpo.html_page import html_page
from diffpo.models.special_tokens import special_tokens
from diffpo.prompt_file import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 8  # tokens decoded before each piece, enough for any multi-token character


def trace_page(records: Sequence[dict], tokenizer: "PreTrainedTokenizerBase", facts: dict[str, str]) -> str:
    """The page for rows as ``completion_record`` makes them; ``facts`` name and value of what holds for all of them.

    A row without logprob and entropy is drawn without them.
    """
    rows = [trace_row(record, tokenizer) for record in records]
    return html_page(
        "trace.html", ("page.css", "trace.css"), ("page.js", "trace.js"), data=rows, facts=facts, rows=rows
    )


def trace_row(record: dict, tokenizer: "PreTrainedTokenizerBase") -> dict:
    """What the page needs of one row: the record without its ids' order changed, with the tokens' text beside them."""
    special = special_tokens(tokenizer)
    kept = ("index", "text", "length", "nfe", "seconds", "gamma", "tokens", "commit_step", "logprob", "entropy")
    return {
        **{name: record.get(name) for name in kept},
        "prompt": prompt_text(record["prompt"]),
        "pieces": token_pieces(record["tokens"], tokenizer),
        "special": [int(token in special) for token in record["tokens"]],
    }


def token_pieces(tokens: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The text each token adds; their concatenation is the decoded text. A character of several tokens goes to the last of them."""
    pieces, emitted_from = [], 0

    def text(start: int, end: int) -> str:
        ids = list(tokens[start:end])  # one sequence, of which decode makes a string
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for end in range(1, len(tokens) + 1):
        start = max(0, emitted_from - _CONTEXT)
        before, now = text(start, emitted_from), text(start, end)
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens) and end - emitted_from < 4:
            pieces.append("")  # the first bytes of a character of up to four
            continue
        pieces.append(now[len(before) :])
        emitted_from = end
    return pieces
