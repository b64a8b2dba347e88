"""Answers to mathematical problems: read from LaTeX, and compared exactly."""

from .answers import last_formula, reads_as_mathematics
from .compare import UndecidedError, decide
from .plain import typeset

__all__ = ["UndecidedError", "decide", "last_formula", "reads_as_mathematics", "typeset"]
