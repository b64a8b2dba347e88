"""The one data structure between decoding and training: what was generated, in which order, by whom and for what."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

_FORMAT = "diffpo trajectory 1"
_SETTINGS = ("mask_id", "temperature", "cfg_scale", "block_length")
_PADDED = ("prompt_ids", "prompt_mask")  # left-padded to the longest prompt of the batch


class Action(NamedTuple):
    """What a commit rule drew for each rollout before its first token. choice: int64 [B], -1 = nothing was drawn; logprob: fp32 [B], nats,
    under the policy that drew it, 0 where nothing was drawn."""

    choice: Tensor
    logprob: Tensor


@dataclass(frozen=True)
class Trajectory:
    """B rollouts of L completion positions. Commit steps alone restore every latent a rollout went through.

    prompt_ids, prompt_mask: int64 / bool [B, P], left-padded, True where a token is real
    tokens: int64 [B, L]; positions that were never committed (after an early stop) hold EOS
    commit_step: int64 [B, L], the 1-based denoising step that committed the position, 0 = never committed
    logprob: fp32 [B, L], nats: log-prob of the token under the distribution it was drawn from; of an argmax
        (temperature 0) under the untempered distribution; 0 where never committed
    entropy: fp32 [B, L], nats: entropy of the untempered predictive distribution when the position was committed; 0 where never
    gamma: fp32 [B], nats: the entropy bound used, NaN for rules without one
    nfe: int64 [B], denoising steps (network evaluations of the row)
    length: int64 [B], tokens up to and including the first EOS, any of the model's ``eos_ids``
    key: int64 [B], what names a rollout: every later draw about it is keyed by this, never by its place in a batch
    group: int64 [B], rollouts of one prompt that are compared with each other share it
    version: int64 [B], of the weights that decoded the rollout
    mask_id; temperature, cfg_scale: of the draws; block_length: tokens
    actions: "gamma", the bin of a learned threshold, where the rule was one
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    commit_step: Tensor
    logprob: Tensor
    entropy: Tensor
    gamma: Tensor
    nfe: Tensor
    length: Tensor
    key: Tensor
    group: Tensor
    version: Tensor
    mask_id: int
    temperature: float
    block_length: int
    cfg_scale: float = 0.0
    actions: dict[str, Action] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Trajectory:
        """The trajectory of some rows (a slice, an index tensor or a boolean mask). ValueError for a number, of whatever library: a row
        has no trajectory without its dimension."""
        if not isinstance(rows, slice | list) and getattr(rows, "ndim", 0) != 1:
            raise ValueError(
                f"rows must be a slice, an index tensor or a mask, got {rows}: one row is trajectory[i : i + 1]"
            )
        kept = {name: value[rows] for name, value in self._tensors().items()}
        return self._rebuilt(kept)

    def to(self, device: torch.device | str) -> Trajectory:
        """The same rollouts on another device."""
        return self._rebuilt({name: value.to(device) for name, value in self._tensors().items()})

    def latent(self, tau: int | Tensor) -> Tensor:
        """z_tau: the completion [B, L] with exactly the positions committed at steps 1..tau revealed; tau int or [B]."""
        tau = torch.as_tensor(tau, device=self.tokens.device)
        return torch.where(self.committed & (self.commit_step <= tau.reshape(-1, 1)), self.tokens, self.mask_id)

    @property
    def committed(self) -> Tensor:
        """bool [B, L]: positions the rollout committed."""
        return self.commit_step > 0

    @property
    def scored(self) -> Tensor:
        """bool [B, L]: the |o| tokens that count, committed and not after the first EOS."""
        return self.committed & (torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.length[:, None])

    @staticmethod
    def concatenate(parts: Sequence[Trajectory]) -> Trajectory:
        """Rows of several trajectories, whatever their prompt widths. ValueError if there is none or anything else than their rows differs."""
        if not isinstance(parts, list | tuple) or not parts or not all(isinstance(part, Trajectory) for part in parts):
            raise ValueError("parts must be a list of at least one Trajectory")
        first = parts[0]
        for part in parts[1:]:
            for name, one, other in (
                *((name, getattr(first, name), getattr(part, name)) for name in _SETTINGS),
                ("completion length", first.tokens.shape[1], part.tokens.shape[1]),
                ("actions", sorted(first.actions), sorted(part.actions)),
            ):
                if one != other:
                    raise ValueError(f"trajectories with different {name} cannot be joined: {one} and {other}")
        width = max(part.prompt_ids.shape[1] for part in parts)
        tensors = [part._tensors() for part in parts]
        for named in tensors:
            for name in _PADDED:
                missing = width - named[name].shape[1]
                named[name] = torch.nn.functional.pad(named[name], (missing, 0))
        return first._rebuilt({name: torch.cat([named[name] for named in tensors]) for name in tensors[0]})

    def to_bytes(self) -> bytes:
        """All of it as one safetensors file; `from_bytes` reads it back."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        # copies: a row's key may also be its group, and safetensors takes no memory twice
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in self._tensors().items()}
        return tensors_to_bytes(tensors, {"format": _FORMAT, "settings": json.dumps(settings)})

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview) -> Trajectory:
        """The trajectory of `to_bytes`, on the CPU. ValueError for bytes that are no trajectory."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ValueError(f"data must be bytes, got {type(data).__name__}")
        data = bytes(data)
        try:
            tensors = tensors_from_bytes(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            metadata = header["__metadata__"]
            if metadata["format"] != _FORMAT:
                raise ValueError(f"the format is {metadata['format']!r}")
            settings = json.loads(metadata["settings"])
            names = {name.split(".")[1] for name in tensors if name.startswith("actions.")}
            actions = {
                name: Action(*(tensors.pop(f"actions.{name}.{part}") for part in Action._fields)) for name in names
            }
            named: dict[str, Any] = {**tensors}
            trajectory = Trajectory(**named, **settings, actions=actions)
            trajectory._check()
        except (
            SafetensorError, KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError
        ) as error:  # fmt: skip
            raise ValueError(f"these bytes are no {_FORMAT!r}: {error}") from error
        return trajectory

    def _check(self) -> None:
        """ValueError unless shapes, dtypes and numbers are those of a rollout."""
        B, L = self.tokens.shape
        P = self.prompt_ids.shape[1]
        shapes = {name: [B, P] for name in _PADDED}
        shapes |= {name: [B, L] for name in ("tokens", "commit_step", "logprob", "entropy")}
        floats = {"logprob", "entropy", "gamma"}
        for name, value in self._tensors().items():
            dtype = torch.float32 if name.split(".")[-1] in floats else torch.int64
            dtype = torch.bool if name == "prompt_mask" else dtype
            if list(value.shape) != shapes.get(name, [B]) or value.dtype != dtype:
                raise ValueError(
                    f"{name} must be {dtype} {shapes.get(name, [B])}, got {value.dtype} {list(value.shape)}"
                )
        for name in _SETTINGS:
            value, whole = getattr(self, name), name in ("mask_id", "block_length")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ValueError(f"{name} is {value!r}")
            least = 1 if name == "block_length" else 0
            if not (math.isfinite(value) and least <= value) or (whole and value >= 2**63):
                raise ValueError(f"{name} is {value!r}")
        possible = {
            "prompt_ids": self.prompt_ids >= 0,
            "tokens": self.tokens >= 0,
            "commit_step": (self.commit_step >= 0) & (self.commit_step <= self.nfe[:, None]),
            "nfe": self.nfe <= L,  # each step commits a token
            "length": (self.length >= 0) & (self.length <= L),
            "logprob": self.logprob.isfinite(),
            "entropy": self.entropy.isfinite(),
            **{f"actions.{name}.logprob": action.logprob.isfinite() for name, action in self.actions.items()},
            **{f"actions.{name}.choice": action.choice >= -1 for name, action in self.actions.items()},
        }
        for name, holds in possible.items():
            if not holds.all():
                raise ValueError(f"{name} holds a number that no rollout has")

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that has a row for each rollout, by name."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        for name, action in self.actions.items():
            tensors |= {f"actions.{name}.{part}": getattr(action, part) for part in Action._fields}
        return tensors

    def _rebuilt(self, tensors: dict[str, Tensor]) -> Trajectory:
        """This trajectory with other tensors, named as by `_tensors`."""
        actions = {
            name: Action(*(tensors[f"actions.{name}.{part}"] for part in Action._fields)) for name in self.actions
        }
        own: dict[str, Any] = {name: value for name, value in tensors.items() if not name.startswith("actions.")}
        return Trajectory(**own, **{name: getattr(self, name) for name in _SETTINGS}, actions=actions)
