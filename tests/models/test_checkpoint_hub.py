"""Hub ids, from a cache laid out as huggingface_hub lays it out; nothing here touches the network."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch

import diffpo

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """hub_cache(folder, commit, *refs): cache a folder as owner/model at a commit that the refs point to."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def add(folder, commit, *refs):
        repository = cache / "models--owner--model"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        for ref in refs:
            (repository / "refs" / ref).write_text(commit)

    return add


def test_a_cached_hub_id_loads_offline_with_its_revision(published, hub_cache):
    old, _, tensors = published("llada", "old")
    new, _, _ = published("llada", "new", seed=1, shards=2)
    hub_cache(old, OLD, "v1")
    hub_cache(new, NEW, "main")
    model = diffpo.load("owner/model")
    assert (model.source.name, model.source.revision) == ("owner/model", NEW)
    for revision in ("v1", OLD):
        model = diffpo.load("owner/model", revision=revision)
        assert model.source.revision == OLD
        assert torch.equal(model.embed_tokens.weight, tensors["model.transformer.wte.weight"])
    with pytest.raises(FileNotFoundError, match="'owner/model' at revision 'v2'"):
        diffpo.load("owner/model", revision="v2")


def test_a_folder_has_no_revision(published):
    folder, _, _ = published("llada")
    assert diffpo.load(folder).source.revision is None
    assert diffpo.load(folder).source.name == str(folder)
    with pytest.raises(ValueError, match=r"revision 'main'.*local folder"):
        diffpo.load(folder, revision="main")
    with pytest.raises(ValueError, match=r"revision 'main'.*local folder"):
        diffpo.load("tiny-countdown", revision="main")


def test_an_incomplete_cache_names_what_is_missing(published, hub_cache):
    folder, _, _ = published("Dream", shards=3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    hub_cache(folder, NEW, "main")
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00003\.safetensors"):
        diffpo.load("owner/model")


def test_weights_of_an_unsupported_model_are_not_fetched(tmp_path, monkeypatch):
    """The config alone is asked for first; and neither pickles nor nested folders ever are."""
    (tmp_path / "config.json").write_text('{"model_type": "sdar"}')
    asked = []

    def snapshot_download(hub_id, *, revision, allow_patterns, ignore_patterns, local_files_only):
        asked.append((revision, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="owner/model: 'sdar' is a model with block-causal attention"):
        diffpo.load("owner/model")
    assert asked == [(None, ["config.json"], ["*/*"])]
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    with pytest.raises(ValueError, match="lacks embedding_size"):
        diffpo.load("owner/model", revision="v1")
    (first, _, _), (commit, wanted, ignored) = asked[1:]
    assert (first, commit) == ("v1", tmp_path.name), "both requests must be for one commit"
    assert "*.safetensors" in wanted
    assert not [pattern for pattern in wanted if "bin" in pattern or "pt" in pattern]
    assert ignored == ["*/*"]


OFFLINE = """
import socket, sys
def refuse(*arguments, **options):
    raise SystemExit("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import diffpo
assert "transformers" not in sys.modules and "huggingface_hub" not in sys.modules, "imported with diffpo"
try:
    diffpo.load("owner/absent")
except FileNotFoundError as error:
    print("absent" in str(error) and "offline" in str(error).lower())
print(diffpo.load("owner/model").source.revision)
"""


def test_offline_mode_of_the_environment_is_honoured(published, hub_cache, tmp_path):
    folder, _, _ = published("llada", tokenizer=False)
    hub_cache(folder, NEW, "main")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    result = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["True", NEW], result.stderr


def test_remote_code_is_neither_run_nor_asked_about(published, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to trust remote code"))
    for family in ("llada", "Dream"):
        folder, config, _ = published(family, family)
        before = set(sys.modules)
        model = diffpo.load(folder)
        assert type(model) is diffpo.MaskedDiffusionLM
        assert model.source.config["auto_map"] == config["auto_map"]
        code = {module.split(".")[0] for module in config["auto_map"].values()}
        assert not [name for name in set(sys.modules) - before if name.rsplit(".", 1)[-1] in code]
        assert json.loads((folder / "config.json").read_text()) == config
