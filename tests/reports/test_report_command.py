"""``diffpo report`` and the page at the end of a training."""

import json
import os
from pathlib import Path

import pytest

from diffpo.report import _runs_as_flag, main


@pytest.fixture
def refused(capsys):
    """refused(*arguments) -> the one line of standard error of a command that ends with exit code 2."""

    def run(*arguments) -> str:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        assert code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def test_a_page_in_the_folder_of_the_run(make_run, capsys):
    folder = make_run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "finished, 40 updates" in (folder / "report.html").read_text()
    assert main([str(folder)]) == 0  # its own page is replaced
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.html"}
    assert after == before


def test_several_runs_make_a_page_here(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("a"), make_run("b")
    assert main(["a", "b"]) == 0
    assert "2 runs compared" in Path("comparison.html").read_text()
    assert not Path("a/report.html").exists()


def test_the_page_goes_where_the_user_says(make_run, tmp_path):
    folder = make_run()
    for arguments in ([str(folder), "--output", f"{tmp_path}/x.html"], [f"--output={tmp_path}/y.html", str(folder)]):
        assert main(arguments) == 0
    assert (tmp_path / "x.html").read_bytes() == (tmp_path / "y.html").read_bytes()
    assert not (folder / "report.html").exists()


def test_runs_stand_before_and_behind_flags():
    assert _runs_as_flag(["a", "--output", "x", "b"]) == ["--output", "x", "--runs", "a", "b"]
    assert _runs_as_flag(["--runs", "a", "b", "--output=x"]) == ["--output=x", "--runs", "a", "b"]
    assert _runs_as_flag(["--help"]) == ["--help"]


def test_what_is_no_training_is_refused(refused, make_run, tmp_path):
    assert "give the folder of a training" in refused()
    assert "none is not there" in refused(tmp_path / "none")
    assert "holds no training" in refused(make_run(), tmp_path)
    assert "stands there twice" in refused(tmp_path / "first", f"{tmp_path}/./first")
    assert "holds a run of diffpo.evaluate" in refused(make_run("e", **{"__diffpo-run": {"command": "evaluate"}}))
    assert "nearest: --output" in refused(tmp_path / "first", "--outptu", "x")


def test_nothing_of_somebody_else_is_replaced(refused, make_run, tmp_path):
    folder = make_run()
    (tmp_path / "thesis.html").write_text("four years")
    (tmp_path / "link.html").symlink_to(tmp_path / "thesis.html")
    assert "somebody else's file" in refused(folder, "--output", tmp_path / "thesis.html")
    assert "is a link" in refused(folder, "--output", tmp_path / "link.html")
    assert "is a link, a folder" in refused(folder, "--output", tmp_path)
    assert "there is no folder" in refused(folder, "--output", tmp_path / "no/such/page.html")
    assert "somebody else's file" in refused(folder, "--output", folder / "metrics.jsonl")
    assert (tmp_path / "thesis.html").read_text() == "four years"
    assert not (folder / "report.html").exists()


def test_a_full_disk_is_one_line_and_no_half_page(make_run, full_disk, capsys):
    folder = make_run()
    with full_disk(1000):
        assert main([str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir() if "report" in path.name) == []


def test_others_cannot_read_it_where_the_umask_says_so(make_run):
    folder = make_run()
    before = os.umask(0o077)
    try:
        assert main([str(folder)]) == 0
    finally:
        os.umask(before)
    assert (folder / "report.html").stat().st_mode & 0o077 == 0


def test_the_page_says_the_same_as_the_run(make_run):
    folder = make_run()
    summary = json.loads((folder / "summary.json").read_text())
    assert main([str(folder)]) == 0
    assert f"{summary['trained']['accuracy']:.1%}" in (folder / "report.html").read_text()
