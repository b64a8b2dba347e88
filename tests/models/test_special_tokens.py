"""One BOS, and every id that ends a completion, wherever a folder declares it."""

import json

import pytest
import torch
from tokenizers import processors

import diffpo
from diffpo.models.special_tokens import END_OF_TURN, encode_text, special_tokens
from diffpo.tasks import GSM8K
from diffpo.tasks.gsm8k import GSM8KProblem
from diffpo.tasks.prompts import check_no_mask, prompt_ids

BOS, EOS, EOT, MASK = 256, 257, 260, 261


def add_bos(folder, template="<|startoftext|> $A"):
    """The folder's tokenizer puts a BOS before every text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [("<|startoftext|>", BOS), ("<|endoftext|>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))


# ---- one BOS


@pytest.mark.parametrize("template", ["<|startoftext|> $A", "<|startoftext|> $A <|endoftext|>"])
def test_a_text_has_one_bos(published, template):
    folder, _, _ = published("llada")
    add_bos(folder, template)
    tokenizer = diffpo.load(folder).tokenizer
    rest = tokenizer("<|start_header_id|>user", add_special_tokens=False)["input_ids"]
    end = [EOS] if "endoftext" in template else []
    for text in ("<|startoftext|><|start_header_id|>user", "<|start_header_id|>user"):
        assert encode_text(tokenizer, text) == [BOS, *rest, *end]
    assert encode_text(tokenizer, "") == [BOS, *end]
    assert encode_text(tokenizer, "<|startoftext|>") == [BOS, *end]
    assert encode_text(tokenizer, "aab")[:1] == [BOS]
    assert encode_text(tokenizer, "<|startoftext|>x", add_special_tokens=False)[0] == BOS


def test_what_a_tokenizer_without_bos_reads_stays(published):
    tokenizer = diffpo.load(published("llada")[0]).tokenizer
    for text in ("<|startoftext|><|startoftext|>x", "aax", "<|eot_id|><|eot_id|>"):
        assert encode_text(tokenizer, text) == tokenizer(text)["input_ids"]


def test_prompts_chats_and_questions_have_one_bos(published):
    folder, _, _ = published("llada", max_sequence_length=2048)
    add_bos(folder)
    model = diffpo.load(folder)
    chat = [{"role": "user", "content": "hi"}]
    written = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for prompt in (written, written.removeprefix("<|startoftext|>"), chat):
        ids = diffpo.generate(model, [prompt], 2).trajectory.prompt_ids[0].tolist()
        assert (ids[0], ids.count(BOS)) == (BOS, 1), prompt
    (question,) = prompt_ids(model.tokenizer, GSM8K(), [GSM8KProblem("1 + 1?", 2)])
    assert (question[0], (question == BOS).sum()) == (BOS, 1)


# ---- the mask token


def test_the_mask_token_in_a_question(published):
    tokenizer = diffpo.load(published("llada")[0]).tokenizer
    prompts = prompt_ids(tokenizer, GSM8K(), [GSM8KProblem("1?", 1), GSM8KProblem("What is <|mdm_mask|>?", 1)])
    with pytest.raises(ValueError, match=r"problem 1 \(row 2\) contains the mask token \(id 261\)"):
        check_no_mask(prompts, MASK)
    check_no_mask(prompts[:1], MASK)


# ---- ends


@pytest.mark.parametrize(
    ("config", "generation", "eos_token", "expected"),
    [
        (EOS, None, "<|endoftext|>", (EOS, EOT)),
        ([EOS, 258], None, "<|endoftext|>", (EOS, 258, EOT)),
        ([EOT], {"eos_token_id": EOS}, "<|endoftext|>", (EOT, EOS)),
        (259, {"eos_token_id": [258, EOS]}, "<|endoftext|>", (259, 258, EOS, EOT)),
        (None, {"bos_token_id": BOS}, "<|startoftext|>", (BOS, EOT)),
        (EOS, {"eos_token_id": None}, None, (EOS, EOT)),
    ],
)
def test_every_declared_end_is_one(published, tmp_path, config, generation, eos_token, expected):
    folder, _, _ = published("llada", eos_token_id=config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "special_tokens_map.json").unlink()  # it would win
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": eos_token}))
    model = diffpo.load(folder)
    assert model.eos_ids == expected
    model.save(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == config
    assert diffpo.load(tmp_path / "again").eos_ids == expected
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_an_end_of_turn_counts_where_the_template_writes_it(published):
    model = diffpo.load(published("Dream")[0])
    assert "<|im_end|>" in END_OF_TURN
    assert 258 in model.eos_ids
    model.tokenizer.chat_template = None
    assert 258 not in model.eos_ids
    model.tokenizer.chat_template = {"default": "{{ messages[0].content }}<|im_end|>", "tools": "x"}
    assert 258 in model.eos_ids
    model.tokenizer.chat_template = "<|eot_id|>"  # no token of this tokenizer
    assert model.eos_ids == (256, 257)


def test_diffpos_own_format_keeps_a_list_of_ends(random_model, tmp_path):
    random_model(eos_token_id=(1, 5)).save(tmp_path / "list")
    assert json.loads((tmp_path / "list/config.json").read_text())["eos_token_id"] == [1, 5]
    (tmp_path / "list/generation_config.json").write_text('{"eos_token_id": 7}')
    model = diffpo.load(tmp_path / "list")
    assert model.eos_ids == (1, 5, 7)
    model.save(tmp_path / "again")
    assert diffpo.load(tmp_path / "again").eos_ids == (1, 5, 7)


@pytest.mark.parametrize("value", ["</s>", [1, "x"], 320, [1, 320], -1, True, 1.5, {"id": 1}])
def test_an_end_that_cannot_be(published, value):
    folder, _, _ = published("llada")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id must be an id, or a list of ids, below 320"
    ):
        diffpo.load(folder)


@pytest.mark.parametrize(
    ("value", "named"), [([1, 40], "40 is outside"), ([], "eos_token_id"), ((2, 1), "mask token"), (2, "mask token")]
)
def test_an_end_that_cannot_be_in_a_config(random_model, value, named):
    with pytest.raises(ValueError, match=named):
        random_model(eos_token_id=value)


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_a_byte_order_mark_in_the_configs(published, family):
    folder, _, _ = published(family)
    expected = diffpo.load(folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    model = diffpo.load(folder)
    assert (model.config, model.eos_ids) == (expected.config, expected.eos_ids)


def test_the_tokenizers_end_cuts_the_text(published):
    model = diffpo.load(published("llada")[0])
    assert special_tokens(model.tokenizer)[EOT] == "<|eot_id|>"
    ids = encode_text(model.tokenizer, "YES<|eot_id|>user: more")
    assert first_end(model, ids) == ("YES", 4)
    assert first_end(model, encode_text(model.tokenizer, "NO<|endoftext|><|eot_id|>x")) == ("NO", 3)


def first_end(model, ids: list[int]) -> tuple[str, int]:
    """Text and length of a completion of these ids, as the decoder leaves it."""
    from diffpo.decoding.generation import decode_text
    from diffpo.decoding.step import first_position
    from diffpo.trajectory import Trajectory

    tokens = torch.tensor([ids])
    length = (first_position(tokens, model.eos_ids) + 1).clamp(max=len(ids))
    ones, none, zero = torch.ones_like(tokens), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    trajectory = Trajectory(
        ones, ones.bool(), tokens, ones, none, none, none, zero, length, zero, zero, zero, model.mask_id, 0.0, len(ids)
    )
    return decode_text(model, trajectory)[0], length.item()
