"""Any strategy of hypothesis: nothing is drawn from it."""

from hypothesis import Anything


def __getattr__(name: str) -> Anything:
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything()
