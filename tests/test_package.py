"""``import diffpo``: what it offers, when that is loaded, and that ``diffpo.generate`` is the function whatever is imported."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import diffpo

CHECK = """
import types, diffpo
function = diffpo.public.generate
assert isinstance(diffpo.generate, types.FunctionType) and diffpo.generate is function, diffpo.generate
from diffpo import generate
assert generate is function, generate
import diffpo.generate as named
assert named is function, named
"""
ORDERS = [
    "import diffpo.generate",
    "import diffpo; diffpo.generate; import diffpo.generate",
    "from diffpo import generate",
    "from diffpo import *; assert generate is __import__('diffpo').generate",
    "import diffpo.public, diffpo.generate",
    "import diffpo.generate, diffpo.public",
    "import importlib; module = importlib.import_module('diffpo.generate'); importlib.reload(module)",
    "import importlib, diffpo; importlib.import_module('diffpo.generate'); importlib.reload(diffpo)",
    "import sys, diffpo.generate; del sys.modules['diffpo.generate']; import diffpo.generate",
    "import threading, importlib\n"
    "threads = [threading.Thread(target=importlib.import_module, args=(name,))\n"
    "           for name in 8 * ['diffpo.generate', 'diffpo', 'diffpo.public']]\n"
    "[t.start() for t in threads]; [t.join() for t in threads]",
]


def python(code: str, *paths: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *sys.path])}
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("order", ORDERS)
def test_generate_is_the_function_whatever_is_imported(order, tmp_path):
    """In a process of its own, with a public module that takes no time."""
    package = tmp_path / "diffpo"
    package.mkdir()
    for name in ("__init__.py", "generate.py"):
        shutil.copy(Path(diffpo.__file__).with_name(name), package)
    (package / "public.py").write_text("__all__ = ['generate']\n\ndef generate():\n    pass\n")
    done = python(order + CHECK, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_generate_is_the_function_of_the_real_package():
    done = python(f"import diffpo.generate{CHECK}assert generate.__module__ == 'diffpo.decoding.generation'")
    assert done.returncode == 0, done.stderr


def test_the_module_of_the_command_is_a_module():
    import importlib

    module = importlib.import_module("diffpo.generate")
    assert isinstance(module, types.ModuleType)
    assert module is sys.modules["diffpo.generate"]
    assert diffpo.generate is diffpo.decoding.generation.generate


def test_the_function_can_be_replaced(monkeypatch):
    def another():
        pass

    monkeypatch.setattr(diffpo, "generate", another)
    assert diffpo.generate is another


def test_what_is_offered_is_there():
    assert set(diffpo.__all__) <= set(dir(diffpo))
    for name in diffpo.__all__:
        assert getattr(diffpo, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        diffpo.generat  # noqa: B018
    with pytest.raises(ImportError):
        from diffpo import no_such_name  # noqa: F401


def test_nothing_heavy_is_loaded_before_it_is_asked_for():
    """torch with diffpo.load, torch._dynamo, which takes as long, not even with a model."""
    done = python(
        "import diffpo, sys; assert diffpo.__version__; assert 'torch' not in sys.modules; diffpo.load; assert 'torch' in sys.modules;"
        "diffpo.load('tiny-countdown'); assert 'torch._dynamo' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
