"""What a benchmark says of itself: --help shows it and measures nothing, and what a script does not know ends it."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(
    str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py") if '__name__ == "__main__"' in path.read_text()
)


def ending(script: str, monkeypatch, *arguments: str) -> int | str | None:
    """The exit code, or what it says as it leaves."""
    monkeypatch.setattr("sys.argv", [str(FOLDER / script), *arguments])
    monkeypatch.syspath_prepend(str((FOLDER / script).parent))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    return stopped.value.code


def test_the_scripts_are_found():
    assert {"hops.py", "kernels.py", "decoding.py", "experiments/estimators.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_shown_and_nothing_is_measured(script, monkeypatch, capsys):
    assert not ending(script, monkeypatch, "--help")
    assert f"python benchmarks/{script}" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_refused(script, monkeypatch, capsys):
    assert ending(script, monkeypatch, "--halp")
    assert capsys.readouterr().out == ""
