"""The five operators of diffpo: tensors in, tensors out.

Every operator is one folder: `__init__.py` is its contract, `reference.py` its definition in plain torch. The docstring of the function
is the documentation. `python -m diffpo_kernels` says which implementations are available here.
"""

from diffpo_kernels.entropy_bounded_commit import entropy_bounded_commit_
from diffpo_kernels.linear_logprob import linear_logprob
from diffpo_kernels.row_statistics import RowStatistics, row_statistics
from diffpo_kernels.skinny_linear import skinny_linear
from diffpo_kernels.surrogate_loss import SurrogateLoss, surrogate_loss

__all__ = [
    "RowStatistics",
    "SurrogateLoss",
    "entropy_bounded_commit_",
    "linear_logprob",
    "row_statistics",
    "skinny_linear",
    "surrogate_loss",
]
