"""What the passes over logits read and write of each row."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """What is known about each row, all [N], contiguous; target int64, the rest float32."""

    target: Tensor
    temperature: Tensor
    logprob: Tensor
    entropy: Tensor
    max: Tensor
    log_sum: Tensor

    def part(self, begin: int, end: int) -> "Rows":
        whole = begin == 0 and end == len(self.target)
        return self if whole else Rows(*(values_N[begin:end] for values_N in self))
