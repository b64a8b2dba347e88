"""Stop strings: where the text ends, and when the row does."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import diffpo
from diffpo.decoding.generation import stream
from diffpo.decoding.stopping import StopText, check_stop
from diffpo.models.word_tokenizer import word_tokenizer

WORDS = [str(n) for n in range(10)]
PROMPTS = [f"{a} {b}" for a in range(6) for b in range(5)]


@pytest.fixture
def model(random_model):
    tokenizer = word_tokenizer(WORDS)
    model = random_model(3, vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    return model


def options(**changes):
    return {"gen_length": 16, "block_length": 4, "rule": diffpo.EntropyBounded(1.0), "temperature": 1.0} | changes


@pytest.mark.parametrize("stop", ["7", ("7",), ["7", "3 4", "9"]])
def test_text_is_cut_and_rows_end_early(model, stop):
    strings = [stop] if isinstance(stop, str) else list(stop)
    whole = diffpo.generate(model, PROMPTS, **options())
    stopped = diffpo.generate(model, PROMPTS, **options(stop=stop))
    ended = 0
    for i, text in enumerate(whole.text):
        shown = model.tokenizer.decode(whole.tokens[i, : whole.trajectory.length[i]])  # with the special tokens
        cuts = [string for string in strings if string in shown]
        assert stopped.text[i] == (text[: min(map(text.index, cuts))] if cuts else text)
        assert stopped.nfe[i] <= whole.nfe[i]
        ended += int(stopped.nfe[i] < whole.nfe[i])
        steps = stopped.trajectory.commit_step[i]
        same = steps > 0
        assert torch.equal(steps[same], whole.trajectory.commit_step[i][same]), "what is committed does not change"
        assert torch.equal(stopped.tokens[i][same], whole.tokens[i][same])
        if not cuts:
            assert torch.equal(steps, whole.trajectory.commit_step[i])
    assert ended > 1
    assert not torch.isin(stopped.tokens, model.mask_id).any()


def test_rows_and_static_steps_change_nothing(model, decode_with, assert_same):
    whole = diffpo.generate(model, PROMPTS, **options(stop="7")).trajectory
    assert_same(diffpo.generate(model, PROMPTS, **options(stop="7", batch_size=4)).trajectory, whole)
    assert_same(decode_with(static=True)(model, PROMPTS, **options(stop="7", batch_size=4)), whole)


def test_a_row_ends_only_when_all_before_the_stop_is_committed(model):
    out = diffpo.generate(model, PROMPTS, **options(stop="7"))
    for tokens, steps, text in zip(out.tokens, out.trajectory.commit_step, out.text, strict=True):
        words = model.tokenizer.convert_ids_to_tokens(tokens.tolist())
        if (steps == 0).any() and "7" in words:
            assert (steps[: words.index("7") + 1] > 0).all()
            assert "7" not in text


def test_stream_cuts_the_text_too(model):
    whole = diffpo.generate(model, PROMPTS, **options(stop="7"))
    assert {row: one.text[0] for row, one in stream(model, PROMPTS, **options(stop="7"))} == dict(enumerate(whole.text))


@pytest.mark.parametrize("stop", [7, b"7", ["7", 3], [""], "", {"7"}, [None], 2.5])
def test_what_is_no_stop_string(model, forward_rows, stop):
    with forward_rows(model) as rows, pytest.raises(ValueError, match="stop must be a string or a list of strings"):
        diffpo.generate(model, PROMPTS, **options(stop=stop))
    assert rows == []


def test_without_a_tokenizer_or_an_eos(random_model):
    prompts = [torch.tensor([3, 4])]
    with pytest.raises(ValueError, match="stop needs a model with a tokenizer"):
        diffpo.generate(random_model(), prompts, 4, stop="7")
    model = random_model(eos_token_id=None, vocab_size=40)
    model.tokenizer = word_tokenizer(WORDS)
    model.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="stop needs a model with an eos_token_id"):
        diffpo.generate(model, prompts, 4, stop="7")
    assert diffpo.generate(random_model(), prompts, 4, stop=()).tokens.shape == (1, 4)


# ---- special tokens


@pytest.fixture
def byte_tokenizer():
    """One token a byte; <|eot_id|>, <|eot_id|>x (its continuation) and <|im_end|> are special, <think> is a word of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eot_id|>", "<|im_end|>", "<|eot"])
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize(
    ("completion", "stop", "text"),
    [
        ("YES<|eot_id|>user: more", "<|eot_id|>", "YES"),
        ("YES<|eot_id|>user: more", "ESus", None),
        ("YES<|eot_id|>user: more", "S<|eot_id|>us", "YE"),
        ("YES<|eot_id|>user: more", "<|eot_id|>user", "YES"),
        ("YES<|eot_id|>user: more", "YES<|eot_id|>", ""),
        ("YES<|eot_id|>user: more", "S<|im_end|>u", None),
        ("YES<|eot_id|>user: more", "<|im_end|>", None),
        ("YES<|eot_id|>user: more", "|", None),
        ("YES<|eot_id|>user: more", "eot_id", None),
        ("YES<|eot_id|>user: more", "<|eot", None),
        ("YES<|eotuser<|eot_id|>", "<|eot", "YES"),
        ("YES<|eot_id|>user: more", "user", "YES"),
        ("a<|eot_id|>b<|eot_id|><|eot_id|>c", "<|eot_id|><|eot_id|>", "ab"),
        ("a<|eot_id|>b<|eot_id|>c", ["c", "b<|eot_id|>"], "a"),
        ("a<|im_end|>b<|eot_id|>c", ["<|eot_id|>", "<|im_end|>"], "a"),
        ("<|eot_id|>", "<|eot_id|>", ""),
        ("a<think>b", "<think>", "a"),
        ("a<think>b", "a<th", ""),
        ("caf\u00e9<|eot_id|>\u00e9", "\u00e9", "caf"),
        ("\U0001f600<|eot_id|>x\U0001f600", "x\U0001f600", "\U0001f600"),
        ("no end", "<|eot_id|>", None),
        ("", "<|eot_id|>", None),
    ],
)
def test_special_tokens_and_stop_strings(byte_tokenizer, completion, stop, text):
    ids = byte_tokenizer(completion)["input_ids"]
    shown = byte_tokenizer.decode(ids, skip_special_tokens=True)
    strings = [stop] if isinstance(stop, str) else stop
    found = StopText(byte_tokenizer, strings).cut([ids, [], ids])
    assert found == [(shown if text is None else text, text is not None), ("", False), found[0]]


def test_a_special_token_spelled_in_ordinary_ones_stops_too(byte_tokenizer):
    ids = [index for character in "YES<|eot_id|>user" for index in byte_tokenizer(character)["input_ids"]]
    assert StopText(byte_tokenizer, ["<|eot_id|>"]).cut([ids]) == [("YES", True)]


def test_a_character_cut_by_a_special_token(byte_tokenizer):
    first, second = byte_tokenizer("\u00e9")["input_ids"]
    (eot,) = byte_tokenizer("<|eot_id|>")["input_ids"]
    assert StopText(byte_tokenizer, ["x"]).cut([[first, eot, second]]) == [("\u00e9", False)]
    assert StopText(byte_tokenizer, ["<|eot_id|>"]).cut([[first, eot, second]]) == [("", True)]


def test_a_row_ends_at_a_special_token(model):
    """<pad> is special and no EOS; rows end there, as at any stop string, with the text before it."""
    whole = diffpo.generate(model, PROMPTS, **options())
    stopped = diffpo.generate(model, PROMPTS, **options(stop="<pad>"))
    streamed = dict(stream(model, PROMPTS, **options(stop="<pad>")))
    ended = 0
    for i in range(len(PROMPTS)):
        tokens = whole.tokens[i, : whole.trajectory.length[i]].tolist()
        kept = tokens[: tokens.index(0)] if 0 in tokens else tokens
        text = model.tokenizer.decode(kept, skip_special_tokens=True)
        assert stopped.text[i].strip() == streamed[i].text[0].strip() == text
        assert stopped.tokens[i, : len(kept)].tolist() == kept
        assert stopped.trajectory.length[i] <= whole.trajectory.length[i]
        ended += int(stopped.nfe[i] < whole.nfe[i])
    assert ended > 1


def test_what_stands_behind_an_eos_stops_nothing(model):
    """A row that goes on behind its EOS (a fixed schedule) is not ended there by a stop string."""
    fixed = {"rule": diffpo.FixedSchedule(16), "temperature": 1.0}
    whole = diffpo.generate(model, PROMPTS, 16, 16, **fixed)
    stopped = diffpo.generate(model, PROMPTS, 16, 16, **fixed, stop="7")
    assert [text.split("7")[0] for text in whole.text] == stopped.text
    for i, text in enumerate(whole.text):
        if "7" not in text:
            assert stopped.nfe[i] == whole.nfe[i]


def test_stop_strings_that_no_completion_can_hold(model):
    with pytest.raises(ValueError, match="holds the mask token <mask>"):
        check_stop(model, "x<mask>")
    with pytest.raises(ValueError, match=r"not valid Unicode: \\ud83d"):
        check_stop(model, ["a", "\ud83d"])
