"""The files of a checkpoint folder: links, permissions, byte order marks, memory."""

import json
import os

import pytest

import diffpo


def test_folders_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x" * 5000, "a\0b", "a/" + "b" * 300):
        with pytest.raises((ValueError, FileNotFoundError)):
            diffpo.load(name)


@pytest.mark.parametrize(
    "name", ["stolen.py", "chat_template.jinja", "special_tokens_map.json", "generation_config.json"]
)
def test_a_file_outside_is_never_copied(published, tmp_path, name):
    """Nor is one that a link points to when the model is saved: the link is replaced, its target keeps its content."""
    folder, _, _ = published("Dream")
    secret = tmp_path / "secret"
    secret.write_text('{"password": "hunter2"}')
    model = diffpo.load(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name} is a link to .*secret, outside"):
        diffpo.load(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(secret)
    model.save(folder)
    assert secret.read_text() == '{"password": "hunter2"}'
    assert not (folder / "config.json").is_symlink()


def test_links_within_the_folder_and_into_the_hubs_blobs_are_followed(published, tmp_path):
    folder, _, _ = published("llada", "plain")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    expected = diffpo.load(folder).lm_head.weight
    repository = tmp_path / "models--owner--model"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert (diffpo.load(snapshot).lm_head.weight == expected).all()
    (tmp_path / "alias").symlink_to(snapshot)
    assert (diffpo.load(tmp_path / "alias").lm_head.weight == expected).all()
    (blobs / "0").unlink()
    (blobs / "0").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="outside"):
        diffpo.load(snapshot)


def test_the_tokenizers_config_names_no_file_to_open(published, tmp_path):
    folder, config, _ = published("llada")
    os.mkfifo(tmp_path / "pipe")
    paths = ("tokenizer_file", "vocab_file", "merges_file", "tokenizer_object", "gguf_file")
    path = folder / "tokenizer_config.json"
    hostile = dict.fromkeys(paths, str(tmp_path / "pipe")) | {"init_inputs": [1], "fast_tokenizer_files": ["x.json"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | hostile))
    assert diffpo.load(folder).tokenizer.mask_token_id == config["mask_token_id"]


def test_a_byte_order_mark_is_no_fault(published):
    folder, config, _ = published("llada", shards=2)
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert diffpo.load(folder).tokenizer.mask_token_id == config["mask_token_id"]


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o027])
def test_saved_files_honour_the_umask(random_model, tmp_path, umask):
    before = os.umask(umask)
    try:
        random_model().save(tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o666 & ~umask}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(published):
    folder, _, _ = published("llada")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).chmod(0)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            diffpo.load(folder)


def test_a_file_that_cannot_be_read_is_named(published, monkeypatch):
    def refuse(path, mode="r", *arguments, **options):
        raise PermissionError(13, "Permission denied")

    folder, _, _ = published("llada")
    monkeypatch.setattr("diffpo.models.folder_files.open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"config\.json cannot be read: Permission denied"):
        diffpo.load(folder)


def test_a_model_larger_than_the_memory_is_refused(published, monkeypatch):
    folder, _, _ = published("llada")
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(ValueError, match=r"the model needs .* GB"):
        diffpo.load(folder)


def test_a_model_has_a_name_and_a_folder_a_path(random_model, tmp_path):
    for name in (None, 3, b"tiny-countdown"):
        with pytest.raises(ValueError, match="a model is a shipped name, a folder or a hub id, got"):
            diffpo.load(name)
        with pytest.raises(ValueError, match="folder must be a path, got"):
            random_model().save(name)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"folder: .*file is a file; give the folder to save into"):
        random_model().save(file)
    assert file.read_text() == "mine"


def test_a_folder_without_a_name_is_refused(random_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder: the name is empty"):
        random_model().save("")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_run_says_where_its_model_is(tmp_path):
    """Its config.json holds the settings of a training."""
    (tmp_path / "model").mkdir()
    for folder, content in ((tmp_path, '{"model": "tiny-countdown"}'), (tmp_path / "model", "{}")):
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds no model: .* names no model_type; its folders that do are model$"):
        diffpo.load(tmp_path)
    with pytest.raises(ValueError, match="model_type None is not supported"):
        diffpo.load(tmp_path / "model")
