"""The rows in flight: fixed buffers, of which the first ``count`` rows are being decoded and the rest wait for a prompt.

Shapes: R rows of the buffers, P positions of the longest prompt, L completion positions, W positions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The state of a decode; every tensor has one entry per row and is changed in place.

    sequence: int64 [R, P + L], left-padded prompt and completion; masked positions hold the mask id
    padding, prompt, row_id: int64 [R], positions of padding in ``sequence``, the prompt's index, and the key of its draws
    start, end: int64 [R], the active block, half-open, in completion positions; [L, L) once a row is past its last block
    nfe, block_step: int64 [R], denoising steps spent on the row, and on its active block
    commit_step: int64 [R, L]; logprob, entropy: fp32 [R, L], see ``Trajectory``
    gamma, gamma_bin, gamma_logprob: [R], see ``Trajectory``
    done, failed: bool [R]; nothing moves a row that is done. failed: its logits were not finite
    """

    sequence: Tensor
    padding: Tensor
    prompt: Tensor
    row_id: Tensor
    start: Tensor
    end: Tensor
    nfe: Tensor
    block_step: Tensor
    commit_step: Tensor
    logprob: Tensor
    entropy: Tensor
    gamma: Tensor
    gamma_bin: Tensor
    gamma_logprob: Tensor
    done: Tensor
    failed: Tensor

    @staticmethod
    def empty(rows: int, prompt_length: int, gen_length: int, device: torch.device) -> Rows:
        """Buffers whose rows are all done."""
        integers = torch.zeros(rows, dtype=torch.int64, device=device)
        numbers = torch.zeros(rows, gen_length, device=device)
        return Rows(
            sequence=torch.zeros(rows, prompt_length + gen_length, dtype=torch.int64, device=device),
            padding=integers.clone(),
            prompt=integers.clone(),
            row_id=integers.clone(),
            start=integers + gen_length,
            end=integers + gen_length,
            nfe=integers.clone(),
            block_step=integers.clone(),
            commit_step=numbers.long(),
            logprob=numbers.clone(),
            entropy=numbers.clone(),
            gamma=numbers[:, 0].clone(),
            gamma_bin=integers.clone(),
            gamma_logprob=numbers[:, 0].clone(),
            done=integers == 0,
            failed=integers != 0,
        )

    def __len__(self) -> int:
        return len(self.done)

    @property
    def gen_length(self) -> int:
        return self.commit_step.shape[1]

    @property
    def prompt_length(self) -> int:
        return self.sequence.shape[1] - self.gen_length

    @property
    def tokens(self) -> Tensor:
        """int64 [R, L], the completions: a view."""
        return self.sequence[:, self.prompt_length :]

    def __getitem__(self, rows) -> Rows:
        """Some rows: views for a slice, copies for an index."""
        return Rows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def put(self, rows: Tensor, values: Rows) -> None:
        """Write ``values`` back to the rows with these indices."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(values, field.name)

    def narrow(self, prompt_length: int) -> Rows:
        """The same rows without the leftmost columns, which must be padding in all that are alive; ``padding`` is a copy then."""
        surplus = self.prompt_length - prompt_length
        if surplus == 0:
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rows(
            **values | {"sequence": self.sequence[:, surplus:], "padding": (self.padding - surplus).clamp(min=0)}
        )

    def admit(
        self,
        rows: slice,
        prompt_ids: Tensor,
        padding: Tensor,
        prompt: Tensor,
        row_id: Tensor,
        block: int,
        mask_id: int,
    ) -> None:
        """Start these rows with prompts [k, P], of which ``padding`` [k] positions are padding, and a block of ``block`` tokens."""
        for field in ("nfe", "block_step", "commit_step", "logprob", "entropy", "start"):
            getattr(self, field)[rows] = 0
        self.sequence[rows, : self.prompt_length] = prompt_ids
        self.sequence[rows, self.prompt_length :] = mask_id
        self.padding[rows], self.prompt[rows], self.row_id[rows], self.end[rows] = padding, prompt, row_id, block
        self.done[rows] = self.failed[rows] = False

    def move(self, source: Tensor, target: Tensor, count: int) -> None:
        """Copy the rows ``source`` over the rows ``target``, and leave every row from ``count`` on as done."""
        if len(source):
            self.put(target, self[source])
        self.done[count:], self.start[count:], self.end[count:] = True, self.gen_length, self.gen_length


def filled_holes(done: Tensor) -> tuple[Tensor, Tensor]:
    """(source, target): moving the last live rows into the places of the done ones puts the live rows of ``done`` [A] in front."""
    live = int((~done).sum())
    return live + (~done[live:]).nonzero()[:, 0], done[:live].nonzero()[:, 0]
