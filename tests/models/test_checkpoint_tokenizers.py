"""Tokenizers as published: LLaDA's fast one, Dream's vocab.json; chat templates; disagreement with the config."""

import json
import shutil

import pytest

import diffpo

MESSAGES = [{"role": "user", "content": " Two plus two? "}]
LLADA_CHAT = (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nTwo plus two?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_llada_tokenizer_and_chat_template(published, where):
    folder, config, _ = published("llada")
    if where == "chat_template.jinja":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / where).write_text(settings.pop("chat_template"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = diffpo.load(folder).tokenizer
    assert tokenizer.mask_token_id == config["mask_token_id"], "the published files declare no mask token"
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == LLADA_CHAT
    ids = tokenizer(LLADA_CHAT, add_special_tokens=False)["input_ids"]
    assert ids[:2] == [256, 258]
    assert tokenizer.decode(ids) == LLADA_CHAT
    assert tokenizer.decode([*ids, 261], skip_special_tokens=True) == "user\n\nTwo plus two?assistant\n\n"


def test_dream_tokenizer_without_its_remote_code(published):
    folder, config, _ = published("Dream")
    tokenizer = diffpo.load(folder).tokenizer
    assert tokenizer.mask_token_id == config["mask_token_id"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n Two plus two? <|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids.count(258)) == (257, 1)
    assert tokenizer.decode(ids) == text


def test_chat_prompts_decode_with_a_published_folder(published):
    for family in ("llada", "Dream"):
        model = diffpo.load(published(family, family)[0])
        out = diffpo.generate(model, [MESSAGES], gen_length=8, block_length=4, rule=diffpo.FixedSchedule(4))
        assert out.tokens.shape == (1, 8)
        assert (out.tokens != model.mask_id).all()


def change_mask_id(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 259}))


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_a_mask_id_other_than_the_configs(published, family):
    folder, config, _ = published(family)
    change_mask_id(folder)
    with pytest.raises(ValueError, match=f"mask id is {config['mask_token_id']}, the config's mask_token_id 259"):
        diffpo.load(folder)


def test_a_tokenizer_larger_than_the_vocabulary(published):
    folder, _, _ = published("llada", embedding_size=262, vocab_size=262)
    assert len(diffpo.load(folder).tokenizer) == 262
    small, _, _ = published("llada", "small", embedding_size=262, vocab_size=262)
    settings = json.loads((small / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][-1] | {"id": 262, "content": "<|one more|>"})
    (small / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="tokenizer has 263 tokens, the model's vocab_size is 262"):
        diffpo.load(small)


def test_damaged_and_partial_tokenizers(published):
    folder, _, _ = published("llada")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer is not readable"):
        diffpo.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"parts of a tokenizer, but no tokenizer\.json"):
        diffpo.load(folder)


def test_a_changed_tokenizer_is_saved_as_changed(published, tmp_path):
    folder, _, _ = published("llada")
    model = diffpo.load(folder)
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.save(tmp_path / "changed")
    tokenizer = diffpo.load(tmp_path / "changed").tokenizer
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == " Two plus two? "
    assert model.tokenizer.add_tokens(["a"], special_tokens=True) == 1
    model.save(tmp_path / "changed")
    assert diffpo.load(tmp_path / "changed").tokenizer.decode([64, 65], skip_special_tokens=True) == "b"
    model.tokenizer = None
    model.save(tmp_path / "changed")
    assert diffpo.load(tmp_path / "changed").tokenizer is None


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_nothing_remembers_the_copy_that_was_loaded(published, tmp_path, family):
    folder, _, _ = published(family)
    model = diffpo.load(folder)
    assert model.tokenizer.name_or_path == str(folder)
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.save(tmp_path / "changed")
    for path in (tmp_path / "changed").iterdir():
        assert b"diffpo-tokenizer-" not in path.read_bytes(), path.name
    again = diffpo.load(tmp_path / "changed").tokenizer
    assert again("3 apples <")["input_ids"] == model.tokenizer("3 apples <")["input_ids"]


def test_the_source_folder_may_be_gone_when_the_model_is_saved(published, tmp_path):
    folder, _, _ = published("Dream")
    model = diffpo.load(folder)
    names = {path.name for path in folder.iterdir()}
    shutil.rmtree(folder)
    model.save(tmp_path / "later")
    assert {path.name for path in (tmp_path / "later").iterdir()} == names
