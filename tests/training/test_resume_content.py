"""A resumed run goes on with the contents it began with, whatever they are called; the difference is listed."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpo.training.checkpointing import checkpoints


@pytest.fixture
def model(sudoku_model, tmp_path) -> Path:
    """A copy of the model, to change."""
    shutil.copytree(sudoku_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refused(train, capsys):
    def check(*more: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            train(*more)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return check


def other_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(model: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))


@pytest.mark.parametrize(
    ("change", "named"), [(other_weights, "model: sha256:"), (other_tokenizer, "tokenizer: sha256:")]
)
def test_other_content_under_the_same_name_is_refused(train, refused, model, tmp_path, change, named):
    assert train("--model", str(model), "--updates", "1") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    change(model)
    error = refused("--model", str(model), "--updates", "1", "--resume")
    assert named in error
    assert " -> sha256:" in error
    assert "--allow-config-change" in error
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert train("--model", str(model), "--updates", "1", "--resume", "--allow-config-change") == 0
    assert train("--model", str(model), "--updates", "1", "--resume") == 0  # it is the run's now


def test_the_same_content_under_another_name_goes_on(train, finished_run, model):
    finished_run("--updates", "1")
    assert train("--updates", "1", "--resume", "--model", str(model)) == 0


def test_a_run_of_an_earlier_version_goes_on(train, tmp_path):
    """Its settings say proxy, which is now order."""
    config = tmp_path / "run/config.json"
    assert train("--updates", "1", "--rollout.order", "margin") == 0
    config.write_text(config.read_text().replace('"order"', '"proxy"'))
    assert train("--updates", "1", "--rollout.proxy", "margin", "--resume") == 0
    assert '"order": "margin"' in config.read_text()


def test_after_an_allowed_change_the_base_is_measured_on_the_model_as_it_came(train, model, tmp_path):
    """Not on the weights of the checkpoint, which are loaded later."""
    assert train("--model", str(model)) == 0
    first = json.loads((tmp_path / "run/base.json").read_text())
    (tmp_path / "run/base.json").write_text("[{")
    assert train("--model", str(model), "--resume") == 0
    again = json.loads((tmp_path / "run/base.json").read_text())
    timed = {"tokens_per_second", "decoding_seconds"}
    for before, after in zip(first["heldout"], again["heldout"], strict=True):
        assert {k: v for k, v in before.items() if k not in timed} == {k: v for k, v in after.items() if k not in timed}


@pytest.mark.parametrize(
    "change",
    [("--algorithm.name", "d1"), ("--algorithm.train", "threshold"), ("--algorithm.train", "model"),
     ("--rollout.threshold-gammas", "0.5", "1.0"), ("--rollout.threshold-gammas", "9", "8", "7", "6")],
)  # fmt: skip
def test_an_algorithm_cannot_be_changed_even_if_changes_are_allowed(train, finished_run, refused, tmp_path, change):
    finished_run("--updates", "1")
    config = (tmp_path / "run/config.json").read_text()
    error = refused("--updates", "1", "--resume", "--allow-config-change", *change)
    assert "another algorithm" in error or "another model" in error
    assert (tmp_path / "run/config.json").read_text() == config
    assert train("--updates", "1", "--resume") == 0


def test_a_run_cannot_go_on_to_fewer_updates_than_it_has(finished_run, refused, tmp_path):
    """What it then reported would not be the model of so many updates."""
    finished_run("--updates", "2")
    config = (tmp_path / "run/config.json").read_text()
    error = refused("--updates", "1", "--resume", "--allow-config-change")
    assert "000002 has 2 updates, updates is 1: give at least as many" in error
    assert (tmp_path / "run/config.json").read_text() == config


def test_a_checkpoint_of_another_model_says_what_differs(finished_run, refused):
    """And nothing else of the two configurations."""
    finished_run("--updates", "1", "--rollout.threshold-gammas", "0.5", "1")
    error = refused("--updates", "1", "--resume", "--allow-config-change", "--rollout.threshold-gammas", "2")
    assert "cannot change: threshold_gammas: (0.5, 1.0) -> (2.0,); begin a new run" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"update": 1}\nnonsense\n', "metrics.jsonl, line 2 is not valid JSON"),
        ("metrics.jsonl", b'{"update": 1}\n[1]\n{"update": 3}\n', "line 2 is no line of metrics"),
        (
            "metrics.jsonl",
            b'{"update": 1}\n{"reward": 1}\n',
            "line 2 is no line of metrics: it is not of the next update",
        ),
        (
            "metrics.jsonl",
            b'{"update": 2}\n{"update": 1}\n',
            "line 2 is no line of metrics: it is not of the next update",
        ),
        ("metrics.jsonl", b'{"update": "1"}\n', "line 1 is no line of metrics: it is not of the next update"),
        ("metrics.jsonl", b"\xff\xfe\n", "is not UTF-8 text"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "line 1 is not valid JSON: it is nested too deeply"),
        ("config.json", b"", "config.json is not readable"),
        ("config.json", b"[]", "config.json is no configuration"),
        ("config.json", b"\xff", "config.json is not readable"),
        ("config.json", b"[" * 100_000, "config.json is not readable"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line(train, finished_run, refused, tmp_path, name, content, message):
    finished_run("--updates", "1")
    (tmp_path / "run" / name).write_bytes(content)
    assert message in refused("--updates", "1", "--resume")
    assert (tmp_path / "run" / name).read_bytes() == content
    assert train("--updates", "1", "--overwrite") == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--runs", "r" * 300), "output folder"),
        (("--runs", "/dev/null/x"), "output folder"),
        (("--model", "m" * 5000), "model"),
        (("--model", "/" + "m" * 300), "m"),
        (("--task", "countdown", "--model", "tiny-countdown", "--algorithm.prompts-per-update", "60000"), "prompts_per_update"),
        (("--heldout", "2000000000"), "heldout"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_found_before_the_folder_is_made(refused, tmp_path, flags, named):
    before = list(tmp_path.iterdir())
    assert named in refused(*flags)
    assert list(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 1500, 20_000, 60_000])
def test_a_limit_of_the_kernel_on_every_file(train, in_a_child, tmp_path, size, whole_run, assert_same_weights):
    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))  # a write beyond fails in the kernel, as on a full disk
        return train("--no-sweep")

    code, errors = in_a_child(limited)
    assert code == 1, errors
    assert "Traceback" not in errors
    assert [line for line in errors.splitlines() if line.startswith("stopped")], errors
    for path in checkpoints(tmp_path / "run/checkpoints"):
        assert (path / "manifest.json").exists()
    marker = tmp_path / "run/.diffpo-run"
    begun = marker.exists() and json.loads(marker.read_text())["begun"]
    more = ["--no-sweep", *(["--resume"] if begun else [])]
    assert train(*more) == 0
    assert_same_weights(tmp_path / "run/model", whole_run("--no-sweep") / "model")
    assert torch.isfinite(load_file(tmp_path / "run/model/model.safetensors")["lm_head.weight"]).all()
