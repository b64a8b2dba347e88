"""The version is written once, in diffpo/__init__.py; what is installed and the changelog say the same."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import diffpo

ROOT = Path(__file__).parents[1]


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert first in (diffpo.__version__, f"{diffpo.__version__} (unreleased)")


def test_the_metadata_are_made_from_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    pyprojecttoml = pytest.importorskip("setuptools.config.pyprojecttoml")
    assert pyprojecttoml.read_configuration(ROOT / "pyproject.toml")["project"]["version"] == diffpo.__version__


def test_what_is_installed_says_so():
    try:
        installed = distribution("diffpo")
    except PackageNotFoundError:
        pytest.skip("diffpo is not installed")
    if ROOT.as_uri() not in (installed.read_text("direct_url.json") or ""):
        pytest.skip("another checkout is installed")
    assert installed.version == diffpo.__version__, "installed before the version changed: pip install -e . again"


@pytest.mark.parametrize("package", ["diffpo", "diffpo_kernels"])
def test_the_types_are_shipped(package):
    assert (ROOT / package / "py.typed").is_file()
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in shipped[package]
