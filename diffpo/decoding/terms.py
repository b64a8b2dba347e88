"""By what the rows of a step are decoded: one number where they agree, one for each row where they do not."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffpo.decoding.options import ResolvedOptions
from diffpo.decoding.rules import Rule

Number = TypeVar("Number", bound=float)


@dataclass(frozen=True)
class Terms:
    """Of A rows. Each option is a number where all rows agree, so that it costs them nothing, else a tensor [A].

    rules: one of each family, with the rows it plans (int64, None: all)
    number: the rules' own; begin: each completion's first position; blocks: how many; stops_at_eos: bool; the rest as in ``DecodingOptions``
    window: tokens of the longest block; draws, guided: whether any temperature, or any guidance, is above 0
    agree: no option is a tensor, and there is one family of rules: every shape of a step is fixed by the number of rows
    """

    rules: tuple[tuple[Rule, Tensor | None], ...]
    number: float | Tensor
    temperature: float | Tensor
    cfg_scale: float | Tensor
    seed: int | Tensor
    block_length: int | Tensor
    blocks: int | Tensor
    begin: int | Tensor
    stops_at_eos: bool | Tensor
    window: int
    draws: bool
    guided: bool
    agree: bool

    @staticmethod
    def of(options: Sequence[ResolvedOptions], gen_length: int, device: torch.device) -> Terms:
        """Those of rows with these resolved options, whose completions end at position ``gen_length``."""
        distinct = list({row.kind: row for row in options}.values())

        def each(value: Callable[[ResolvedOptions], Number]) -> Number | Tensor:
            first = value(distinct[0])
            if all(value(row) == first for row in distinct):
                return first
            values = [value(row) for row in options]
            return torch.tensor(values, device=device, dtype=torch.float64 if isinstance(first, float) else None)

        rules = _families([row.rule for row in options], device)
        values: dict[str, Any] = {
            "number": each(lambda row: float(row.rule.number)),
            "temperature": each(lambda row: row.temperature),
            "cfg_scale": each(lambda row: row.cfg_scale),
            "seed": each(lambda row: row.seed),
            "block_length": each(lambda row: row.block_length),
            "blocks": each(lambda row: row.gen_length // row.block_length),
            "begin": each(lambda row: gen_length - row.gen_length),
            "stops_at_eos": each(lambda row: row.rule.stops_at_eos),
        }
        return Terms(
            rules,
            **values,
            window=max(row.block_length for row in distinct),
            draws=any(row.temperature > 0 for row in distinct),
            guided=any(row.cfg_scale > 0 for row in distinct),
            agree=len(rules) == 1 and not any(isinstance(value, Tensor) for value in values.values()),
        )


def _families(rules: Sequence[Rule], device: torch.device) -> tuple[tuple[Rule, Tensor | None], ...]:
    members: dict[Hashable, list[int]] = {}
    for row, rule in enumerate(rules):
        members.setdefault(rule.family, []).append(row)
    if len(members) == 1:
        return ((rules[0], None),)
    return tuple((rules[rows[0]], torch.tensor(rows, device=device)) for rows in members.values())
