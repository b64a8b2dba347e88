"""What benchmarks/kernels.py measures: one module per operator lists its cases; case.py says what a case is, measure.py how it is timed."""

from kernel_cases import entropy_bounded_commit, linear_logprob, row_statistics, skinny_linear, surrogate_loss
from kernel_cases.case import Case

_MODULES = {
    "row_statistics": row_statistics,
    "entropy_bounded_commit_": entropy_bounded_commit,
    "linear_logprob": linear_logprob,
    "surrogate_loss": surrogate_loss,
    "skinny_linear": skinny_linear,
}


def cases(operator: str, device: str) -> list[Case]:
    """The cases of one operator on a kind of device."""
    return _MODULES[operator].cases(device)
