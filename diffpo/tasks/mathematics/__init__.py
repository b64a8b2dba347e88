"""Answers to mathematical problems: read from LaTeX, and compared exactly."""

from .compare import UndecidedError, decide
from .plain import typeset
from .reading import answer_in_prose, reads_as_mathematics

__all__ = ["UndecidedError", "answer_in_prose", "decide", "reads_as_mathematics", "typeset"]
