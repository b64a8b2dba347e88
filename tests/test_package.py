"""``import diffpo``: what it offers, when that is loaded, and that ``diffpo.generate`` is the function whatever is imported."""

import subprocess
import sys
import types

import pytest

import diffpo

IS_THE_FUNCTION = """
import types, diffpo
from diffpo.decoding.generation import generate as function
assert isinstance(diffpo.generate, types.FunctionType) and diffpo.generate is function, diffpo.generate
from diffpo import generate
assert generate is function, generate
import diffpo.generate as named
assert named is function, named
"""


def python(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    "before",
    [
        "import diffpo.generate",
        "import diffpo; diffpo.generate; import diffpo.generate",
        "from diffpo import generate",
        "from diffpo import *; assert generate is __import__('diffpo').generate",
        "import diffpo.decoding.generation, diffpo.generate",
        "import diffpo.generate_command, diffpo.generate",
        "import importlib; module = importlib.import_module('diffpo.generate'); importlib.reload(module)",
        "import importlib, diffpo; importlib.import_module('diffpo.generate'); importlib.reload(diffpo)",
        "import sys, diffpo.generate; del sys.modules['diffpo.generate']; import diffpo.generate",
        "import pkgutil, importlib, diffpo\nfor m in pkgutil.iter_modules(diffpo.__path__, 'diffpo.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)",
        "import threading, importlib\n"
        "threads = [threading.Thread(target=importlib.import_module, args=(name,))\n"
        "           for name in 8 * ['diffpo.generate', 'diffpo', 'diffpo.decoding.generation', 'diffpo.public']]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]",
    ],
)  # fmt: skip
def test_generate_is_the_function_whatever_is_imported(before):
    done = python(f"{before}\n{IS_THE_FUNCTION}")
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
    done = python("import diffpo, sys; assert diffpo.__version__; assert 'torch' not in sys.modules; diffpo.load; assert 'torch' in sys.modules")  # fmt: skip
    assert done.returncode == 0, done.stderr
