"""What a resumed evaluation must agree with, and what of a folder is never touched."""

import os
import shutil

import pytest
from chat_models import LLADA_TEMPLATE
from evaluate_runs import failing, items_in
from safetensors.torch import load_file, save_file

from diffpo.runs.item_log import ItemLog
from diffpo.tasks import GSM8K
from diffpo.training.config import TrainConfig


def test_the_log_refuses_a_damaged_line(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"index": 0}\n{"inde\n{"index": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        ItemLog(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--rule", "confidence"], "rule: fixed -> confidence; steps: 8 -> None"),
        (["--gen-length", "8"], "gen_length: 16 -> 8; steps: 8 -> 4"),
        (["--limit", "3"], "limit: None -> 3"),
    ],
)
def test_resuming_with_another_configuration_is_refused(run, chat_flags, tmp_path, capsys, change, message):
    assert run(*chat_flags) == 0
    before = items_in(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags, *change, "--resume")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "allow-config-change" not in error
    assert items_in(tmp_path / "run") == before


def test_a_run_of_an_earlier_version_goes_on(run, chat_flags, tmp_path):
    """Its settings say proxy, which is now order."""
    config = tmp_path / "run/config.json"
    assert run(*chat_flags, "--rule", "eb", "--order", "margin") == 0
    config.write_text(config.read_text().replace('"order"', '"proxy"'))
    assert run(*chat_flags, "--rule", "eb", "--order", "margin", "--resume") == 0
    assert '"order": "margin"' in config.read_text()


def test_resuming_with_other_files_is_refused(run, chat_flags, gsm8k, capsys):
    assert run(*chat_flags) == 0
    with open(gsm8k, "a") as file:
        file.write("\n")
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags, "--resume")
    assert stopped.value.code == 2
    assert "the files changed: data: sha256:" in capsys.readouterr().err


def test_a_used_folder_is_not_touched_and_overwrite_empties_it(run, chat_flags, tmp_path, capsys):
    assert run(*chat_flags, "--limit", "2") == 0
    with pytest.raises(SystemExit):
        run(*chat_flags)
    assert "--resume continues it" in capsys.readouterr().err
    assert run(*chat_flags, "--limit", "1", "--overwrite") == 0
    assert len(items_in(tmp_path / "run")) == 1


def test_overwrite_leaves_the_run_of_another_command_alone(run, chat_flags, tmp_path, capsys):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(TrainConfig(name="run").model_dump_json())
    (tmp_path / "run/checkpoints/000001").write_text("a day of training")
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags, "--overwrite")
    assert stopped.value.code == 2
    assert "no run of this command" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoints/000001").exists()


@pytest.mark.parametrize("content", ['{"model": "tin', "[]"])
def test_an_unreadable_configuration_is_no_run_to_continue(run, chat_flags, tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(content)
    for flag, message in (("--resume", "no run to continue"), ("--overwrite", "no run of this command")):
        with pytest.raises(SystemExit) as stopped:
            run(*chat_flags, flag)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "run/config.json").read_text() == content


def test_overwrite_leaves_somebodys_folder_alone(run, chat_flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("")
    (tmp_path / "run/items.jsonl").write_text("")
    (tmp_path / "run/thesis.tex").write_text("four years")
    for flag in ("--overwrite", "--resume", "--no-resume"):
        assert "run" in failing(run, capsys, *chat_flags, flag)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "items.jsonl", "thesis.tex"]


@pytest.mark.parametrize("name", ["items.jsonl", "summary.json", "config.json", ".lock"])
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_link_keeps_its_target(run, chat_flags, tmp_path, capsys, name, flag):
    assert run(*chat_flags, "--limit", "1") == 0
    capsys.readouterr()
    os.rename(tmp_path / "run" / name, tmp_path / "mine")
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    before = (tmp_path / "mine").read_bytes()
    assert name in failing(run, capsys, *chat_flags, "--limit", "1", flag)
    assert (tmp_path / "mine").read_bytes() == before


@pytest.fixture
def copied_model(chat_model, tmp_path):
    shutil.copytree(chat_model, tmp_path / "chat")
    return tmp_path / "chat"


def other_weights(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"] * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_template(folder) -> None:
    (folder / "chat_template.jinja").write_text(LLADA_TEMPLATE.replace("\n\n", "\n"))


@pytest.mark.parametrize(
    ("change", "named"), [(other_weights, "model: sha256:"), (other_template, "tokenizer: sha256:")]
)
def test_another_model_under_the_same_name_is_refused(run, chat_flags, copied_model, tmp_path, capsys, change, named):
    flags = [*chat_flags, "--model", copied_model]
    assert run(*flags) == 0
    before = items_in(tmp_path / "run")
    capsys.readouterr()
    change(copied_model)
    error = failing(run, capsys, *flags, "--resume")
    assert named in error
    assert ("prompts: sha256:" in error) is (change is other_template)
    assert items_in(tmp_path / "run") == before


def test_another_instruction_is_refused(run, chat_flags, tmp_path, capsys, monkeypatch):
    assert run(*chat_flags) == 0
    capsys.readouterr()
    monkeypatch.setattr(GSM8K, "instruction", "Answer in <answer> tags.")
    assert "prompts: sha256:" in failing(run, capsys, *chat_flags, "--resume")


def test_the_same_contents_under_other_names_go_on(run, chat_flags, copied_model, gsm8k, tmp_path):
    assert run(*chat_flags) == 0
    shutil.copy(gsm8k, tmp_path / "copy.jsonl")
    assert run(*chat_flags, "--model", copied_model, "--data", tmp_path / "copy.jsonl", "--resume") == 0
