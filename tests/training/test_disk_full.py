"""A full disk, wherever it strikes: one line and exit code 1, or the run goes on; all that was written is whole, and a resume ends in the same bits."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

import diffpo.models.saving
import diffpo.training.checkpointing
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.runs.json_lines import JsonLines, own_file
from diffpo.runs.tensor_board import TensorBoard
from diffpo.training.checkpointing import checkpoints
from diffpo.training.trainer import Trainer

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail_renames(patch, name: str, after: int = 0) -> None:
    """No file called ``name`` comes into being any more, after it has been written ``after`` times."""
    rename, seen = os.replace, 0

    def full(source, target):
        nonlocal seen
        if Path(target).name == name:
            seen += 1
            if seen > after:
                raise FULL
        rename(source, target)

    patch.setattr(os, "replace", full)


def whole(folder: Path) -> None:
    """Every file of the run can be read, and nothing is half-written."""
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else ():
        json.loads(line, parse_constant=pytest.fail)
    assert not [path for path in folder.rglob(".*") if path.name not in (".lock", ".diffpo-run")]


@pytest.mark.parametrize("name", [".diffpo-run", "config.json", "base.json", "summary.json", "model.safetensors"])
def test_a_file_that_cannot_be_written_ends_the_run_in_one_line(
    train, whole_run, tmp_path, monkeypatch, capsys, assert_same_weights, name
):
    with monkeypatch.context() as patch:
        # the weights of the finished model, not those of a checkpoint: they come after both
        fail_renames(patch, name, after=2 if name == "model.safetensors" else 0)
        assert train("--updates", "2") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("stopped")
    assert "No space left" in error
    whole(tmp_path / "run")
    begun = (
        json.loads((tmp_path / "run/.diffpo-run").read_text())["begun"]
        if (tmp_path / "run/.diffpo-run").exists()
        else False
    )
    assert train("--updates", "2", *(["--resume"] if begun else [])) == 0
    assert_same_weights(tmp_path / "run/model", whole_run("--updates", "2") / "model")


def fail_writes(patch, after: int) -> None:
    """The disk takes half of the next line once ``after`` lines are written, and no more."""
    write, lines = JsonLines.write, 0

    class Full:
        def __init__(self, file):
            self.file, self.full = file, False

        def write(self, data):
            if self.full:
                raise FULL
            self.full = True
            return self.file.write(data[: len(data) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def limited(self, row):
        nonlocal lines
        lines += 1
        if lines > after:
            self._file = Full(self._file)
        write(self, row)

    patch.setattr(JsonLines, "write", limited)


@pytest.mark.parametrize("after", [0, 2])
def test_metrics_that_cannot_be_written(
    train, whole_run, tmp_path, monkeypatch, capsys, assert_same_weights, metrics_of, after
):
    with monkeypatch.context() as patch:
        fail_writes(patch, after)
        assert train("--samples.every", "0") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left" in error
    whole(tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == after
    assert train("--resume") == 0
    assert_same_weights(tmp_path / "run/model", whole_run() / "model")
    assert metrics_of(tmp_path / "run") == metrics_of(whole_run())


def test_samples_that_cannot_be_written(train, tmp_path, monkeypatch, capsys, whole_run, assert_same_weights):
    with monkeypatch.context() as patch:
        fail_writes(patch, 2)
        assert train() == 1
    assert "No space left" in capsys.readouterr().err
    whole(tmp_path / "run")
    assert (tmp_path / "run/samples.jsonl").read_bytes().count(b"\n") == 2
    assert train("--resume") == 0
    assert (tmp_path / "run/samples.jsonl").read_bytes() == (whole_run() / "samples.jsonl").read_bytes()
    assert_same_weights(tmp_path / "run/model", whole_run() / "model")


def test_sigterm_with_a_full_disk_does_not_say_that_it_saved(train, tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def interrupted(self):
        metrics = step(self)
        if self.update == 2:
            signal.raise_signal(signal.SIGTERM)
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        fail_renames(patch, "000002")
        assert train("--save-every", "1") == 1
    captured = capsys.readouterr()
    assert "interrupted" not in captured.out
    assert "after update 2" in captured.err
    assert "the last good weights are in" in captured.err
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["000001"]
    assert train("--resume") == 0


def test_the_type_that_safetensors_has_for_a_full_disk(train, monkeypatch, tmp_path, capsys):
    def full(tensors, path, metadata=None):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(diffpo.training.checkpointing, "save_file", full)
        patch.setattr(diffpo.models.saving, "save_file", full)
        assert train() == 1
    captured = capsys.readouterr()
    assert captured.out.count("training goes on") == 4
    assert "No space left" in captured.err
    assert "there is no checkpoint" in captured.err
    assert train("--resume") == 0


def test_no_room_for_the_trained_model(train, whole_run, tmp_path, monkeypatch, capsys, assert_same_weights, full_disk):
    """The weights are written by safetensors, which asks the system itself."""
    save = MaskedDiffusionLM.save

    def on_a_full_disk(model, folder):
        with full_disk(1000):
            save(model, folder)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedDiffusionLM, "save", on_a_full_disk)
        assert train("--updates", "2") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"stopped after update 2: {tmp_path / 'run/model'}: File too large" in error
    assert "continue with --resume" in error
    whole(tmp_path / "run")
    assert train("--updates", "2", "--resume") == 0
    assert_same_weights(tmp_path / "run/model", whole_run("--updates", "2") / "model")


def test_no_room_for_a_checkpoint_names_its_file(train, tmp_path, capsys, monkeypatch, full_disk):
    write = diffpo.training.checkpointing.save_file

    def on_a_full_disk(tensors, path):
        with full_disk(1000):
            write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(diffpo.training.checkpointing, "save_file", on_a_full_disk)
        assert train("--updates", "1") == 1
    captured = capsys.readouterr()
    assert "optimizer.safetensors: File too large" in captured.err
    assert captured.out.count("training goes on") == 1
    assert train("--updates", "1", "--resume") == 0


def test_tensorboard_on_a_full_disk_costs_a_warning(train, monkeypatch, metrics_of, tmp_path):
    def full(self, record):
        raise FULL

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    with pytest.warns(UserWarning, match="TensorBoard is not written"):
        assert train() == 0
    assert len(metrics_of(tmp_path / "run")) == 4


def test_a_line_that_did_not_fit_is_not_there(tmp_path, monkeypatch):
    lines = JsonLines(own_file(tmp_path / "x.jsonl"), "x.jsonl", "line")
    lines.write({"a": 1})
    with monkeypatch.context() as patch:
        fail_writes(patch, 0)
        with pytest.raises(OSError, match="No space"):
            lines.write({"b": "x" * 100})
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n'


def test_a_missing_folder_costs_tensorboard_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="TensorBoard is not written"):
        board = TensorBoard(tmp_path / "no/such", first_update=1)
    board.write({"update": 1, "reward": 0.5})
    board.close()
