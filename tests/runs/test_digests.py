"""What a run reads is known by its content."""

import os
import shutil

from diffpo.models.checkpoints import SHIPPED
from diffpo.runs.digests import model_inputs, tokenizer_digest, weights_digest


def test_the_digest_is_of_config_and_weights(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        shutil.copytree(SHIPPED / "tiny-sudoku", folder)
    before = weights_digest(first)
    assert before == weights_digest(second)
    (second / "README.md").write_text("another card")
    assert weights_digest(first) == weights_digest(second)
    weights = bytearray((second / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (second / "model.safetensors").write_bytes(weights)
    assert weights_digest(first) != weights_digest(second)
    (first / "diffpo_threshold.st").write_bytes(b"a threshold")
    assert weights_digest(first) != before


def test_the_digest_of_the_tokenizer_is_of_all_that_makes_tokens(tmp_path):
    first, second = tmp_path / "a", tmp_path / "elsewhere" / "b"
    for folder in (first, second):
        shutil.copytree(SHIPPED / "tiny-sudoku", folder)
    before = tokenizer_digest(first)
    assert before == tokenizer_digest(second)
    (second / "notes.txt").write_text("no part of it")
    os.mkfifo(second / "x.safetensors")  # must not hang
    assert model_inputs(second, None) == model_inputs(first, None)
    for name in ("chat_template.jinja", "generation_config.json"):
        (second / name).write_text("{}")
        assert tokenizer_digest(second) != before
        (second / name).unlink()
    assert model_inputs(first, "0123abc") == {"model": "0123abc", "tokenizer": before}
