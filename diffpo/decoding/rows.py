"""The rows in flight: fixed buffers, of which the first ``count`` rows are being decoded and the rest wait for a prompt.

Everything stands on the right: [padding | prompt | completion], so that padding on the left is the only mask there is. Completion positions
count in the last L columns; a row whose completion has only l of them starts at position L - l.

Shapes: R rows of the buffers, S columns, the last L of them completion positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The state of a decode; every tensor has one entry per row and is changed in place.

    sequence: int64 [R, S], left-padded prompt and completion; masked positions hold the mask id
    padding, row_id: int64 [R], columns of padding in ``sequence``, and the key of the row's draws
    start, end: int64 [R], the active block, half-open, in completion positions; [L, L) once a row is past its last block
    nfe, block_step: int64 [R], denoising steps spent on the row, and on its active block
    commit_step: int64 [R, L]; logprob, entropy: fp32 [R, L], see ``Trajectory``
    gamma, gamma_bin, gamma_logprob: [R], see ``Trajectory``
    done, failed: bool [R]; nothing moves a row that is done. failed: its logits were not finite
    """

    sequence: Tensor
    padding: Tensor
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
    def empty(rows: int, columns: int, gen_length: int, device: torch.device) -> Rows:
        """Buffers whose rows are all done."""
        integers = torch.zeros(rows, dtype=torch.int64, device=device)
        numbers = torch.zeros(rows, gen_length, device=device)
        return Rows(
            sequence=torch.zeros(rows, columns, dtype=torch.int64, device=device),
            padding=integers.clone(),
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
    def tokens(self) -> Tensor:
        """int64 [R, L], the completions: a view."""
        return self.sequence[:, self.sequence.shape[1] - self.gen_length :]

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        """Some rows: views for a slice, copies for an index."""
        return Rows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def put(self, rows: Tensor, values: Rows) -> None:
        """Write ``values`` back to the rows with these indices."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(values, field.name)

    def last(self, columns: int) -> tuple[Tensor, Tensor]:
        """The sequences without the leftmost columns, which must be padding in all rows that are alive, and the padding that is left."""
        surplus = self.sequence.shape[1] - columns
        return (
            (self.sequence[:, surplus:], (self.padding - surplus).clamp(min=0))
            if surplus
            else (self.sequence, self.padding)
        )

    def admit(
        self,
        rows: slice,
        sequence: Tensor,
        padding: Tensor,
        row_id: Tensor,
        start: int | Tensor,
        end: int | Tensor,
        gamma: float | Tensor,
    ) -> None:
        """Start these k rows: sequences [k, S] of masked completions, of which ``padding`` [k] columns are padding, the first block, and the
        entropy bounds, NaN where there is none yet."""
        for field in ("nfe", "block_step", "commit_step", "logprob", "entropy", "gamma_logprob"):
            getattr(self, field)[rows] = 0
        self.sequence[rows], self.padding[rows], self.row_id[rows] = sequence, padding, row_id
        self.start[rows], self.end[rows], self.gamma[rows], self.gamma_bin[rows] = start, end, gamma, -1
        self.done[rows] = self.failed[rows] = False

    def remove(self, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """Take rows, of the first A, out: bool [A] on the CPU. The last of the others move into their places, (source, target) of which are
        returned; every row behind is done."""
        live = int((~leaving).sum())
        source, target = live + (~leaving[live:]).nonzero()[:, 0], leaving[:live].nonzero()[:, 0]
        if len(source):
            self.put(target.to(self.done.device), self[source.to(self.done.device)])
        self.done[live:], self.start[live:], self.end[live:] = True, self.gen_length, self.gen_length
        return source, target
