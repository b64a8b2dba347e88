"""setup.py: what becomes of an earlier extension when there is, or is not, a newer one."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_TOOL = {"native": "the build failed at install time: No module named 'pybind11'", "cuda": "nvcc was not found"}


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("diffpo_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path):
    """One with an extension of the sources "a", and the older file of another Python."""
    (tmp_path / "_native.cpython-311.so").write_text("old")
    report = {"native": "built", "cuda": "built with nvcc", "sources": "a"}
    (tmp_path / "_build_report.json").write_text(json.dumps(report))
    return tmp_path


def report_in(package):
    return json.loads((package / "_build_report.json").read_text())


def test_a_failed_build_keeps_an_extension_of_the_same_sources_and_says_so(setup, package):
    setup.replace_extension(package, [], NO_TOOL | {"sources": "a"})
    assert (package / "_native.cpython-311.so").read_text() == "old"
    report = report_in(package)
    assert report["native"].startswith("kept from an earlier build of the same sources: ")
    assert "pybind11" in report["native"]
    assert (report["cuda"], report["sources"]) == ("built with nvcc", "a")


@pytest.mark.parametrize(
    "before", [{"native": "built", "cuda": "", "sources": "a"}, {"native": "built", "cuda": ""}, None]
)
def test_an_extension_of_other_or_unknown_sources_is_not_left_to_be_loaded(setup, package, before):
    (package / "_build_report.json").unlink()
    if before is not None:
        (package / "_build_report.json").write_text(json.dumps(before))
    setup.replace_extension(package, [], NO_TOOL | {"sources": "b"})
    assert not list(package.glob("_native.*"))
    assert report_in(package) == NO_TOOL | {"sources": "b"}


def test_what_was_built_replaces_what_was_there(setup, package, tmp_path_factory):
    new = tmp_path_factory.mktemp("built") / "_native.cpython-312.so"
    new.write_text("new")
    report = {"native": "built", "cuda": "nvcc was not found", "sources": "b"}
    setup.replace_extension(package, [new], report)
    assert [path.name for path in package.glob("_native.*")] == ["_native.cpython-312.so"]
    assert report_in(package) == report


def test_the_digest_follows_the_sources(setup, tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    for name in ("CMakeLists.txt", "csrc/a.cpp"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    before = setup.sources_digest()
    assert setup.sources_digest() == before
    (tmp_path / "csrc/a.cpp").write_text("2")
    assert setup.sources_digest() != before
