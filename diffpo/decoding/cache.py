"""Keys and values that are kept between denoising steps: an approximation, renewed at each block's start.

    none     every step evaluates the whole sequence: exact
    prefix   the keys and values of everything before the active block are kept; the block and what follows are computed anew
    dual     those of everything outside the active block are kept, what follows it included; only the block is computed

A row's step is exact (a *refresh*: the whole sequence is evaluated, and its keys and values stored) when its block starts, and every
``refresh`` steps within a block. In between, the kept keys and values are those of older tokens: with bidirectional attention they
would have changed a little. Every step counts as one NFE, cached or not. Where logits are shifted, the position before the block, whose
output predicts the block's first token, is computed with the block. Source: Fast-dLLM (arXiv 2505.22618).

How far from exact (tiny-countdown and tiny-sudoku, 128 test problems, EntropyBounded(0.1), one to four blocks): 79% to 91% of the tokens are
those of exact decoding ("dual" with refresh=2: 88% to 96%), accuracy falls by 0.10 to 0.28 (0.05 to 0.14), and rollout and exact log-probs
differ by 0.04 to 0.31 nats a token on average (0.02 to 0.11). In such short sequences each token changes everything; published at 8B is GSM8K
79.3 without and 79.5 with a cache. Where log-probs must be those of the network, as in training, use "none".

Shapes: R rows in flight, B rows of a pass, Q computed positions, S positions of the sequence, K key/value heads, d head size.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffpo.decoding.rows import Rows
from diffpo.models.transformer import MaskedDiffusionLM

CACHES = ("none", "prefix", "dual")


def due_for_refresh(rows: Rows, refresh: int | None) -> Tensor:
    """bool [R]: rows whose next step evaluates the whole sequence."""
    since = rows.block_step if refresh is None else rows.block_step % refresh
    return (since == 0) & ~rows.done


class KeyValueCache:
    """Keys and values of every layer, [R, S, K, d] each; S counts from the longest prompt's first position."""

    def __init__(self, model: MaskedDiffusionLM, rows: int, positions: int):
        config, dtype, device = model.config, model.dtype, model.device
        shape = (rows, positions, config.key_value_heads, config.head_dim)
        self.layers = [
            (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_hidden_layers)
        ]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the rows ``source`` over the rows ``target``."""
        for keys, values in self.layers:
            keys[target], values[target] = keys[source], values[source]

    def clear(self, rows: Tensor) -> None:
        """Zero these rows. Padding is not attended to, but a NaN there would still spread: 0 times NaN."""
        for keys, values in self.layers:
            keys[rows], values[rows] = 0, 0


@dataclass(frozen=True)
class Pass:
    """One evaluation of B rows at ``columns`` [B, Q] of their last ``width`` positions (``Cache`` in models/transformer.py).

    rows: the rows in the cache; write: bool [B, Q], columns whose keys and values replace the kept ones, of a slice of rows; or None for
    all, where the columns are the whole width and nothing kept is needed: then rows may be an index [B].
    """

    cache: KeyValueCache
    rows: Tensor | slice
    width: int
    columns: Tensor
    write: Tensor | None

    def store(self, layer: int, keys_BQKd: Tensor, values_BQKd: Tensor) -> tuple[Tensor, Tensor]:
        kept_keys, kept_values = self.cache.layers[layer]
        return self._merge(kept_keys, keys_BQKd), self._merge(kept_values, values_BQKd)

    def _merge(self, kept_RSKd: Tensor, fresh_BQKd: Tensor) -> Tensor:
        kept_RSKd = kept_RSKd[:, kept_RSKd.shape[1] - self.width :]
        if self.write is None:
            kept_RSKd[self.rows] = fresh_BQKd.to(kept_RSKd.dtype)  # another one under torch.autocast
            return fresh_BQKd
        kept_BQKd = kept_RSKd[self._row_numbers, self.columns]
        kept_RSKd[self._row_numbers, self.columns] = torch.where(self.write[:, :, None, None], fresh_BQKd, kept_BQKd)
        return kept_RSKd[self.rows].to(fresh_BQKd.dtype)

    @cached_property
    def _row_numbers(self) -> Tensor:  # [B, 1]; once for all layers: in a cached step of few tokens every kernel shows
        if isinstance(self.rows, Tensor):
            return self.rows[:, None]
        return torch.arange(self.rows.start, self.rows.stop, device=self.columns.device)[:, None]


def whole_pass(cache: KeyValueCache, rows: Rows, index: Tensor | slice, width: int) -> Pass:
    """A refresh: all of the last ``width`` columns of ``rows``."""
    columns = torch.arange(width, device=rows.sequence.device).expand(len(rows), -1)
    return Pass(cache, index, width, columns, None)


def window_pass(
    cache: KeyValueCache, rows: Rows, index: slice, width: int, mode: str, shift: int, positions: int
) -> Pass:
    """The active blocks ("dual"), or everything from them on ("prefix"), of rows that are not due for a refresh.

    width: of the evaluated columns, the last ones. shift: 1 where logits are shifted, else 0. positions: the most completion positions
    that a row needs, W for "dual".
    """
    block_length = rows.end - rows.start
    computed = min(positions + shift, width)
    first_B1 = (width - rows.gen_length + rows.start - shift)[:, None]  # -1 where a shifted block has nothing before it
    if mode == "dual":
        columns = first_B1.clamp(min=0, max=width - computed) + torch.arange(computed, device=first_B1.device)
        write = (columns >= first_B1) & (columns < first_B1 + shift + block_length[:, None])
    else:
        columns = torch.arange(width - computed, width, device=first_B1.device).expand(len(rows), -1)
        write = columns >= first_B1
    return Pass(cache, index, width, columns, write)
