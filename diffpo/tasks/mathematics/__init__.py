"""Answers to mathematical problems: read from LaTeX, and compared exactly."""

from .compare import UndecidedError, decide
from .plain import typeset
from .reading import answer_in_prose, is_list, reads_as_mathematics

__all__ = ["UndecidedError", "answer_in_prose", "decide", "is_list", "reads_as_mathematics", "typeset"]
