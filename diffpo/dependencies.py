"""Packages that only some parts of diffpo need: what to say where one is missing.

``import diffpo``, load, generate, trajectory_logprobs and save need torch, numpy, safetensors and transformers alone.
"""

import importlib
import inspect
import sys


def require(*modules: str) -> None:
    """Return if all of ``modules`` can be imported. Otherwise a command ends with one line and exit code 2; elsewhere it is an ImportError."""
    missing = [module.replace("_", "-") for module in modules if not _importable(module)]
    if not missing:
        return
    command = _running_command()
    who = "this part of diffpo" if command is None else f"python -m {command}"
    message = f"{who} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
    if command is None:
        raise ImportError(message)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _running_command() -> str | None:
    """The module that ``python -m`` runs, if it is one of diffpo's."""
    for entry in inspect.stack(context=0):
        names = entry.frame.f_globals
        if names.get("__name__") == "__main__" and names.get("__spec__") is not None:
            name = names["__spec__"].name
            return name if name.startswith("diffpo.") else None
    return None
