"""diffpo: reinforcement learning that makes masked diffusion language models reason better in fewer network evaluations."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from diffpo.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """The names of diffpo.public, at first use: torch takes seconds to import, and ``diffpo --help`` needs none of it."""
        if name == "__all__" or not name.startswith("_"):
            public = importlib.import_module("diffpo.public")
            if name == "__all__":
                return public.__all__
            for offered in public.__all__:
                globals().setdefault(offered, getattr(public, offered))
            if name in globals():  # among them the subpackages that came with it
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})


class _Package(ModuleType):
    """``diffpo.generate`` is the function, although ``python -m diffpo.generate`` needs a file of that name.

    Python makes an imported submodule an attribute of its package: this one alone does not become it.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "generate" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
