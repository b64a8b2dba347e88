"""Checkpoints: what is saved comes back bit for bit, and whatever does not fit says so."""

import errno
import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpo
import diffpo.device
from diffpo.models import checkpoints, saving
from diffpo.models.word_tokenizer import word_tokenizer

WORDS = [str(n) for n in range(10)] + list("+-*/=")
BINS = (0.0, 0.01, 0.5, 1.5)


@pytest.fixture
def word_model(random_model):
    """word_model(seed, **config changes): a random model with a word tokenizer."""

    def build(seed: int = 0, **changes):
        tokenizer = word_tokenizer(WORDS)
        model = random_model(seed, vocab_size=len(tokenizer), **changes)
        model.tokenizer = tokenizer
        return model

    return build


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"threshold_gammas": BINS},
        {"threshold_gammas": (0.0, 1.0, float("inf"))},
        {"num_key_value_heads": 2, "attention_bias": True, "logit_shift": True, "eos_token_id": None},
    ],
    ids=["plain", "tied", "threshold", "infinite bin", "everything else"],
)
def test_round_trip_is_bitwise(word_model, tmp_path, changes):
    model = word_model(1, **changes)
    model.save(tmp_path)
    loaded = diffpo.load(tmp_path)
    assert loaded.config == model.config
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokens = torch.randint(0, 18, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == model.config.tie_word_embeddings
    if "threshold_gammas" in changes:
        assert torch.equal(loaded.threshold.gammas, model.threshold.gammas)
        assert torch.equal(loaded.threshold.linear.weight, model.threshold.linear.weight)
    assert loaded.tokenizer("1 + 2 <eos>")["input_ids"] == model.tokenizer("1 + 2 <eos>")["input_ids"]
    assert loaded.tokenizer.mask_token_id == 2


def test_threshold_added_after_construction_is_saved(word_model, tmp_path):
    model = word_model()
    model.add_threshold(BINS)
    model.save(tmp_path)
    assert diffpo.load(tmp_path).config.threshold_gammas == BINS


def test_model_without_tokenizer(random_model, tmp_path):
    random_model().save(tmp_path)
    assert diffpo.load(tmp_path).tokenizer is None


def test_saving_over_a_checkpoint_replaces_all_of_it(word_model, random_model, tmp_path):
    word_model(1, threshold_gammas=BINS).save(tmp_path)
    replacement = random_model(2)
    replacement.save(tmp_path)
    loaded = diffpo.load(tmp_path)
    assert torch.equal(loaded.lm_head.weight, replacement.lm_head.weight)
    assert loaded.threshold is None
    assert loaded.tokenizer is None, "the tokenizer of the previous checkpoint was left behind"


def test_saved_files(word_model, tmp_path):
    model = word_model(tie_word_embeddings=True)
    model.save(tmp_path / "new" / "folder")
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith((".bin", ".pt"))]
    assert "lm_head.weight" not in load_file(tmp_path / "new" / "folder" / "model.safetensors")
    assert (tmp_path / "new" / "folder" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_saved_weights_do_not_share_storage_with_the_model(word_model, tmp_path):
    model = word_model()
    model.save(tmp_path)
    loaded = diffpo.load(tmp_path)
    kept = loaded.lm_head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save(tmp_path)
    assert torch.equal(loaded.lm_head.weight, kept)


def test_a_shipped_name_is_loaded_and_a_misspelt_one_names_the_nearest(word_model, tmp_path, monkeypatch):
    for name in ("tiny-countdown", "tiny-sudoku"):
        word_model().save(tmp_path / name)
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert isinstance(diffpo.load("tiny-sudoku"), diffpo.MaskedDiffusionLM)
    with pytest.raises(FileNotFoundError, match=r"'tiny-countdwn'.*did you mean tiny-countdown"):
        diffpo.load("tiny-countdwn")
    with pytest.raises(FileNotFoundError, match=r"did you mean tiny-sudoku"):
        diffpo.load("tinysudoku")


def test_a_hub_id_that_cannot_be_fetched_is_an_error(monkeypatch):
    with pytest.raises(FileNotFoundError, match="nobody/no-such-model"):
        diffpo.load("nobody/no-such-model")


def test_missing_config(word_model, tmp_path):
    word_model().save(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        diffpo.load(tmp_path)
    word_model().save(tmp_path / "checkpoint-500")
    with pytest.raises(FileNotFoundError, match=r"folders that do are checkpoint-500"):
        diffpo.load(tmp_path)


def test_missing_weights(word_model, tmp_path):
    word_model().save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors") as caught:
        diffpo.load(tmp_path)
    assert "pickle" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_and_never_opened(word_model, tmp_path, name):
    model = word_model()
    model.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Trap(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=rf"{name}.*safetensors"):
        diffpo.load(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1], ids=["empty", "half a length", "header", "half", "last byte"])
def test_truncated_weights(word_model, tmp_path, keep):
    word_model().save(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        diffpo.load(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_name_themselves(word_model, tmp_path):
    word_model().save(tmp_path / "good")
    for name, change, message in (
        ("missing", lambda t: t.pop("layers.1.mlp.up_proj.weight"), r"missing.*layers\.1\.mlp\.up_proj\.weight"),
        ("unexpected", lambda t: t.update(stray=torch.zeros(2)), r"unexpected.*stray"),
        ("shape", lambda t: t.update({"norm.weight": torch.ones(31)}), r"norm\.weight.*\[31\].*\[32\]"),
        ("transposed", lambda t: t.update({"lm_head.weight": torch.zeros(32, 18)}), r"lm_head\.weight.*\[32, 18\]"),
    ):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        edit_weights(tmp_path / name, change)
        with pytest.raises(ValueError, match=message):
            diffpo.load(tmp_path / name)


@pytest.mark.parametrize("model_type", ["llama", None, 3])
def test_unknown_model_type(word_model, tmp_path, model_type):
    word_model().save(tmp_path)
    edit_config(tmp_path, model_type=model_type)
    with pytest.raises(ValueError, match=r"model_type.*not supported.*diffpo"):
        diffpo.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 32}, "hiden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 33}, "hidden_size 33"),
        ({"mask_token_id": 1000}, "mask_token_id 1000"),
        ({"threshold_gammas": [-1.0]}, "threshold_gammas"),
    ],
    ids=["unknown key", "type", "head size", "mask id", "bins"],
)
def test_config_that_does_not_fit(word_model, tmp_path, changes, message):
    word_model().save(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        diffpo.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"diffpo"'])
def test_config_that_is_no_json_object(word_model, tmp_path, content):
    word_model().save(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        diffpo.load(tmp_path)


def test_vocabulary_that_does_not_match_the_tokenizer(word_model, random_model, tmp_path):
    word_model().save(tmp_path / "words")
    for name, model, message in (
        ("small", random_model(vocab_size=17), r"18 tokens.*vocab_size is 17"),
        ("mask", random_model(vocab_size=18, mask_token_id=3), r"mask id is 2.*mask_token_id 3"),
    ):
        shutil.copytree(tmp_path / "words", tmp_path / name)
        model.save(tmp_path / name)  # writes no tokenizer of its own
        shutil.copy(tmp_path / "words" / "tokenizer.json", tmp_path / name)
        shutil.copy(tmp_path / "words" / "tokenizer_config.json", tmp_path / name)
        with pytest.raises(ValueError, match=message):
            diffpo.load(tmp_path / name)


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("when", ["writing", "renaming", "renaming the second file"])
def test_an_interrupted_save_leaves_the_old_checkpoint_intact(word_model, tmp_path, monkeypatch, when):
    old, new = word_model(1), word_model(2, threshold_gammas=BINS)
    old.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    replace, calls = os.replace, []

    def interrupt(*arguments, **options):
        calls.append(arguments)
        if when == "renaming the second file" and len(calls) == 1:
            return replace(*arguments, **options)
        raise InterruptionError

    if when == "writing":
        monkeypatch.setattr(saving, "save_file", interrupt)
    else:
        monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(InterruptionError):
        new.save(tmp_path)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == names, "a temporary file was left behind"
    loaded = diffpo.load(tmp_path)
    assert torch.equal(loaded.lm_head.weight, old.lm_head.weight)
    assert loaded.config == old.config


@pytest.mark.parametrize(
    ("module", "step", "kind"),
    [(saving, "save_file", {}), (saving, "write_threshold", {"model_type": "llada"}), (saving, "_write_published_files", {}),
     (Path, "write_text", {})],
    ids=["weights", "threshold", "tokenizer", "config"],
)  # fmt: skip
def test_a_full_disk_is_an_os_error_that_names_the_folder(
    word_model, tmp_path, monkeypatch, full_disk, module, step, kind
):
    """Whatever wrote the file that found no room: safetensors and tokenizers raise types of their own."""
    old, new = word_model(1, **kind), word_model(2, threshold_gammas=BINS, **kind)
    old.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = getattr(module, step)

    def full(*arguments, **options):
        with full_disk(10):
            return write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, full)
        with pytest.raises(OSError, match="File too large") as caught:
            new.save(tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_first_save_is_no_checkpoint(word_model, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "save_file", lambda *a, **k: (_ for _ in ()).throw(InterruptionError()))
    with pytest.raises(InterruptionError):
        word_model().save(tmp_path)
    with pytest.raises(FileNotFoundError):
        diffpo.load(tmp_path)


def test_a_model_is_put_where_auto_says_unless_a_device_is_given(monkeypatch):
    assert diffpo.load("tiny-countdown").device == diffpo.load("tiny-countdown", "auto").device == torch.device("cpu")
    monkeypatch.setattr("diffpo.device.default_device", lambda: "meta")  # any machine has one, and it is refused
    for device in ((), ("auto",)):
        with pytest.raises(ValueError, match="meta device"):
            diffpo.load("tiny-countdown", *device)
    for device in ("cpu", torch.device("cpu")):
        assert diffpo.load("tiny-countdown", device).device.type == "cpu"


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch, there):
    default_device = runpy.run_path(diffpo.device.__file__)["default_device"]  # that of the tests is another
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert default_device() == ("cuda" if there else "cpu")


def test_weights_that_are_not_finite_are_not_saved(random_model, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite are not saved: lm_head\.weight"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_meta_device_has_no_weights():
    with pytest.raises(ValueError, match="device"):
        diffpo.load("tiny-countdown", device="meta")
