"""Stop strings: where the text ends, and when the row does."""

import pytest
import torch

import diffpo
from diffpo.decoding.generation import stream
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
