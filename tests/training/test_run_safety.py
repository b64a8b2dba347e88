"""What a run may delete and write: its own files alone, through no link, and none of it lost when it is killed between two files."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

import diffpo.train
from diffpo.models.checkpoints import load
from diffpo.runs.metrics import read_metrics
from diffpo.runs.run_files import MARKER
from diffpo.runs.run_folder import RunFolder
from diffpo.training.config import TrainConfig

FLAGS = {"plain": (), "--resume": ("--resume",), "--overwrite": ("--overwrite",)}


@pytest.fixture
def finished_once(whole_run) -> Path:
    """The folder of a finished run of one update."""
    return whole_run("--updates", "1", "--no-sweep")


@pytest.fixture
def finished(finished_run) -> Path:
    """A copy of it."""
    return finished_run("--updates", "1", "--no-sweep")


@pytest.fixture
def claim(finished_once, tmp_path):
    """claim(*flags) -> the folder of that run, in tmp_path, claimed again with the same settings as the command would."""
    config = TrainConfig(**json.loads((finished_once / "config.json").read_text()) | {"runs": str(tmp_path)})
    inputs = json.loads((finished_once / MARKER).read_text())["inputs"]

    def begin(*flags: str, **changes) -> RunFolder:
        settings = {flag.removeprefix("--"): True for flag in flags}
        run = diffpo.train.run_folder(config.model_copy(update=changes | settings), inputs)
        if run.resumes:
            read_metrics(run.path).close()
        run.begin()
        return run

    return begin


@pytest.fixture
def refused(claim):
    """refused(*flags) -> the message of a claim that was not given."""

    def check(*flags: str) -> str:
        with pytest.raises(ValueError) as stopped:  # noqa: PT011
            claim(*flags)
        return str(stopped.value)

    return check


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


# Whose folder it is


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": ""},
        {"config.json": "{}", "metrics.jsonl": "", "checkpoints/000001/state.json": "{}"},
        {"config.json": TrainConfig().model_dump_json()},
        {".lock": "", "letter.txt": ""},
        {MARKER: ""},
        {MARKER: "{}"},
        {MARKER: "[1]"},
        {MARKER: '{"format": 2, "command": "train", "begun": true, "inputs": {}}'},
        {MARKER: '{"format": 1, "command": "train", "begun": "yes", "inputs": {}}'},
        {MARKER: "[" * 100_000},
    ],
)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_folder_without_a_runs_marker_is_refused_and_untouched(refused, tmp_path, files, flags):
    for name, text in (files | {"thesis.tex": "four years"}).items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    before = contents(tmp_path / "run")
    assert "run" in refused(*flags)
    assert contents(tmp_path / "run") == before


def test_the_run_of_another_command_is_refused(finished, refused):
    marker = json.loads((finished / MARKER).read_text())
    (finished / MARKER).write_text(json.dumps(marker | {"command": "evaluate"}))
    before = contents(finished)
    for flags in FLAGS.values():
        assert "a run of diffpo.evaluate" in refused(*flags)
    assert contents(finished) == before


@pytest.mark.parametrize(
    "name",
    ["notes.md", "data/train.csv", "checkpoints/notes", "checkpoints/000001/plot.pdf", "checkpoints/best/x", "model/README.md",
     "tensorboard/events", ".config.json.swp/x", "checkpoints/1/state.json", "summary.json.bak"],
)  # fmt: skip
def test_overwrite_names_what_no_run_wrote_and_deletes_nothing(finished, refused, claim, name):
    (finished / name).parent.mkdir(parents=True, exist_ok=True)
    (finished / name).write_text("somebody's")
    before = contents(finished)
    message = refused("--overwrite")
    assert any(str(part) in message for part in (Path(name), Path(name).parent) if str(part) != ".")
    assert contents(finished) == before
    claim("--resume")  # which deletes nothing
    assert (finished / name).read_text() == "somebody's"


CODE = ["model/thesis.py", "checkpoints/000001/analysis.py", "model/modeling_mine.py", "model/__init__.py"]


@pytest.mark.parametrize("name", CODE)
def test_overwrite_keeps_code_that_no_run_carried(finished, refused, claim, name):
    (finished / name).write_text("somebody's")
    before = contents(finished)
    assert name in refused("--overwrite")
    assert contents(finished) == before
    claim("--resume")
    assert name in refused("--overwrite"), "the resumed run did not carry it either"


def test_overwrite_deletes_the_code_that_came_with_the_model(sudoku_model, train, tmp_path, capsys):
    folder = tmp_path / "with code"
    model = load(sudoku_model)
    model.source, model.config = (
        None,
        model.config.model_copy(update={"model_type": "llada"}),
    )  # a format that is published with code
    model.save(folder)
    (folder / "modeling_tiny.py").write_text("# as published")
    short = ("--updates", "1", "--no-sweep")
    assert train(*short, "--model", str(folder)) == 0
    carried = [tmp_path / "run" / place / "modeling_tiny.py" for place in ("model", "checkpoints/000001")]
    assert all(path.exists() for path in carried)
    carried[0].with_name("thesis.py").write_text("four years")
    with pytest.raises(SystemExit):
        train(*short, "--overwrite")
    message = capsys.readouterr().err
    assert "model/thesis.py" in message
    assert "modeling_tiny.py" not in message
    carried[0].with_name("thesis.py").unlink()
    assert train(*short, "--overwrite") == 0  # from a model without code
    assert not any(path.exists() for path in carried)


def test_what_an_overwrite_left_when_it_was_killed_is_deleted(finished, claim, killed_at):
    marker = json.loads((finished / MARKER).read_text())
    (finished / MARKER).write_text(json.dumps(marker | {"carried": ["modeling_tiny.py"]}))
    (finished / "model/modeling_tiny.py").write_text("# as published")
    whole = finished.with_name("whole")
    shutil.copytree(finished, whole)
    for event in range(1, 100):
        shutil.rmtree(finished)
        shutil.copytree(whole, finished)
        if not killed_at(event, lambda: claim("--overwrite")):
            break
        claim("--overwrite")
        assert {path.name for path in finished.rglob("*")} == {".lock", MARKER, "config.json"}
    assert event > 10


@pytest.mark.parametrize("carried", ["modeling.py", {"a.py": 1}, [1], None, 5])
def test_a_marker_with_damaged_names_is_refused(finished, refused, carried):
    marker = json.loads((finished / MARKER).read_text())
    (finished / MARKER).write_text(json.dumps(marker | {"carried": carried}))
    assert MARKER in refused("--overwrite")


def test_overwrite_leaves_nothing_of_the_run_before(finished, claim):
    (finished / "checkpoints/.000007.partial").mkdir()
    (finished / "checkpoints/.000007.partial/half").write_text("")
    (finished / "model/.saving-abc12345/new").mkdir(parents=True)
    (finished / ".summary.json.0a1b2c3d").write_text("half")
    (finished / "items.jsonl").write_text("")
    claim("--overwrite")
    assert {path.name for path in finished.rglob("*")} == {".lock", MARKER, "config.json"}


def test_a_resume_removes_leftovers_alone(finished, claim):
    before = contents(finished)
    (finished / "checkpoints/.000007.partial/.saving-x").mkdir(parents=True)
    (finished / "model/.saving-abc12345").mkdir()
    (finished / ".base.json.0a1b2c3d").write_text("half")
    claim("--resume")
    assert contents(finished).keys() == before.keys()
    assert not [path for path in finished.rglob(".*") if path.name not in (".lock", MARKER)]


# Links


OUTPUTS = ["config.json", "metrics.jsonl", "base.json", "samples.jsonl", "summary.json", "curves.png", "report.html",
           "model/config.json",
           "checkpoints/000001/state.json", "checkpoints", "checkpoints/000001", "model", "tensorboard", MARKER]  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_link_where_a_run_writes_is_refused(finished, refused, tmp_path, name, flag):
    path, aside = finished / name, tmp_path / "aside"
    if path.exists():
        os.rename(path, aside)
    else:
        aside.write_text("somebody's")
    path.symlink_to(aside)
    before = contents(tmp_path)
    assert Path(name).name in refused(flag)
    assert contents(tmp_path) == before
    assert path.is_symlink()


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_lock_that_is_a_link_keeps_its_target(refused, tmp_path, flags):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis").write_text("four years")
    (tmp_path / "run/.lock").symlink_to(tmp_path / "thesis")
    assert "not writable" in refused(*flags)
    assert (tmp_path / "thesis").read_text() == "four years"


def test_a_lock_that_is_another_name_of_a_file_keeps_its_content(claim, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis").write_text("four years")
    os.link(tmp_path / "thesis", tmp_path / "run/.lock")
    claim()
    assert (tmp_path / "thesis").read_text() == "four years"


def test_metrics_that_are_another_name_of_a_file_are_refused(finished, refused, tmp_path):
    os.link(finished / "metrics.jsonl", tmp_path / "mine")
    before = contents(tmp_path)
    assert "no file of its own" in refused("--resume")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", MARKER, "config.json"])
def test_a_pipe_does_not_hang(finished, refused, name):
    (finished / name).unlink()
    os.mkfifo(finished / name)
    assert name in refused("--resume")


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_run_folder_that_is_a_link_is_refused(refused, tmp_path, target, flags):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / target)
    assert "is a link" in refused(*flags)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("umask", "folders", "files"), [(0o077, 0o700, 0o600), (0o027, 0o750, 0o640), (0o002, 0o775, 0o664)]
)
def test_the_umask_decides_who_may_read(flags, tmp_path, umask, folders, files):
    before = os.umask(umask)
    try:
        assert diffpo.train.main([*flags, "--updates", "1", "--no-sweep"]) == 0  # with its figure
    finally:
        os.umask(before)
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (folders if path.is_dir() else files), path


# Killed between two files


def fill(run: Path) -> None:
    for name in (
        "metrics.jsonl",
        "checkpoints/000001/state.json",
        "checkpoints/.000002.partial/x",
        "model/config.json",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")


@pytest.mark.parametrize("next_flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("killed_flags", [(), ("--overwrite",)], ids=["a first start", "an overwrite"])
def test_a_start_that_was_killed_anywhere_can_be_repeated(claim, killed_at, tmp_path, killed_flags, next_flags):
    repeated = 0
    for event in range(1, 100):
        runs = tmp_path / str(event)
        if killed_flags:
            claim(runs=str(runs))
            fill(runs / "run")
        before = contents(runs)
        if not killed_at(event, lambda runs=runs: claim(*killed_flags, runs=str(runs), seed=1)):
            break
        if not (runs / "run").exists():
            continue  # killed before its first folder
        if killed_flags and json.loads((runs / "run" / MARKER).read_text())["begun"]:
            assert contents(runs).items() >= before.items()  # the run before is whole
            continue
        claim(*next_flags, runs=str(runs), seed=1)
        assert {path.name for path in (runs / "run").rglob("*")} == {".lock", MARKER, "config.json"}
        assert json.loads((runs / "run/config.json").read_text())["seed"] == 1
        repeated += 1
    assert repeated >= 5


def test_two_claims_of_one_folder(claim):
    first = claim()
    for flags, reason in (((), "already used"), (("--resume",), "in use"), (("--overwrite",), "in use")):
        with pytest.raises(ValueError, match=reason):
            claim(*flags)
    del first
    claim("--resume")


def test_the_command_refuses_in_one_line(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("")
    (tmp_path / "run/thesis.tex").write_text("four years")
    for flags in FLAGS.values():
        with pytest.raises(SystemExit) as stopped:
            train(*flags)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "thesis.tex"]
