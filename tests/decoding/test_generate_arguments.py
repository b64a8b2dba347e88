"""Prompts in every accepted form, and one clear error for everything else."""

import math

import pytest
import torch

import diffpo
from diffpo.models.word_tokenizer import word_tokenizer

MASK, EOS = 2, 1
WORDS = [str(n) for n in range(10)] + ["+", "=", "user", "assistant"]


@pytest.fixture
def word_model(random_model):
    tokenizer = word_tokenizer(WORDS)
    model = random_model(3, vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    return model


def test_strings_and_their_ids_are_the_same_prompts(word_model):
    texts = ["1 + 2 =", "7", "3 + 4 + 5 ="]
    ids = [torch.tensor([WORDS.index(word) + 3 for word in text.split()]) for text in texts]
    out = diffpo.generate(word_model, texts, 8, 4, diffpo.EntropyBounded(1.0))
    from_ids = diffpo.generate(word_model, ids, 8, 4, diffpo.EntropyBounded(1.0))
    assert torch.equal(out.tokens, from_ids.tokens)
    assert out.text == from_ids.text
    # left-padded, with a mask that tells padding from prompt
    trajectory = out.trajectory
    assert trajectory.prompt_ids.shape == trajectory.prompt_mask.shape == (3, 6)
    for i, row in enumerate(ids):
        assert trajectory.prompt_mask[i].tolist() == [False] * (6 - len(row)) + [True] * len(row)
        assert torch.equal(trajectory.prompt_ids[i, 6 - len(row) :], row)
        assert (trajectory.prompt_ids[i, : 6 - len(row)] == 0).all()


def test_text_ends_before_the_first_eos(word_model):
    out = diffpo.generate(word_model, ["1", "2", "3"] * 10, 12, 4, diffpo.FixedSchedule(12), temperature=1.0)
    words = [*["<pad>", "<eos>", "<mask>"], *WORDS]
    stopped = 0
    for text, tokens in zip(out.text, out.tokens.tolist(), strict=True):
        kept = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
        stopped += EOS in tokens
        assert text.split() == [words[token] for token in kept if token > 2]
    assert stopped


def test_one_tensor_of_ids(random_model, random_prompts):
    model = random_model()
    prompts = random_prompts(model, [5, 5, 5])
    out = diffpo.generate(model, torch.stack(prompts), 4)
    assert torch.equal(out.tokens, diffpo.generate(model, prompts, 4).tokens)
    assert out.text is None
    assert out.tokens.shape == (3, 4)
    assert out.tokens.dtype == out.nfe.dtype == torch.int64


def test_chats_go_through_the_tokenizers_template(word_model):
    word_model.tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    chats = [[{"role": "user", "content": "1 + 2"}], [{"role": "user", "content": "3 ="}]]
    out = diffpo.generate(word_model, chats, 4)
    assert torch.equal(
        out.tokens, diffpo.generate(word_model, ["user 1 + 2 assistant", "user 3 = assistant"], 4).tokens
    )


def test_a_prompt_may_be_empty(random_model, random_prompts):
    for shift in (False, True):
        model = random_model(logit_shift=shift)
        # whole blocks, drawn: all positions of an empty prompt's completion are alike at first, and rounding would decide an order
        empty, options = (
            torch.zeros(0, dtype=torch.int64),
            {"rule": diffpo.EntropyBounded(math.inf), "temperature": 1.0},
        )
        options["block_length"] = 3
        alone = diffpo.generate(model, [empty, empty], 6, **options)
        assert alone.trajectory.prompt_ids.shape == (2, 0)
        padded = diffpo.generate(model, [empty, *random_prompts(model, [5])], 6, **options)
        assert torch.equal(padded.tokens[0], alone.tokens[0])


def ids(*values):
    return [torch.tensor(values)]


GOOD = {"prompts": ids(3, 4, 5), "gen_length": 8, "block_length": 4}
BAD = {
    "gen_length zero": ({"gen_length": 0}, "gen_length"),
    "gen_length negative": ({"gen_length": -4}, "gen_length"),
    "block_length zero": ({"block_length": 0}, "block_length"),
    "block_length negative": ({"block_length": -4}, "block_length"),
    "not divisible": ({"block_length": 3}, r"gen_length 8.*block_length.*3"),
    "block longer than all": ({"block_length": 16}, "block_length"),
    "steps": ({"rule": diffpo.FixedSchedule(5)}, r"steps 5.*blocks 2"),
    "gamma per row": ({"rule": diffpo.EntropyBounded(torch.tensor([0.1, 0.2]))}, r"gamma has 2 values for 1 prompts"),
    "temperature negative": ({"temperature": -0.1}, "temperature"),
    "temperature nan": ({"temperature": float("nan")}, "temperature"),
    "temperature inf": ({"temperature": float("inf")}, "temperature"),
    "cfg_scale negative": ({"cfg_scale": -1.0}, "cfg_scale"),
    "cfg_scale nan": ({"cfg_scale": float("nan")}, "cfg_scale"),
    "batch_size": ({"batch_size": 0}, "batch_size"),
    "no prompts": ({"prompts": []}, "prompts"),
    "empty tensor": ({"prompts": torch.zeros(0, 4, dtype=torch.int64)}, "prompts"),
    "bare string": ({"prompts": "1 + 2"}, r"prompts.*\[prompt\]"),
    "strings without tokenizer": ({"prompts": ["1 + 2"]}, "tokenizer"),
    "3-d prompts": ({"prompts": torch.zeros(1, 2, 3, dtype=torch.int64)}, "prompts"),
    "a mask": ({"prompts": [torch.tensor([3]), torch.tensor([True])]}, r"prompts\[1\].*a mask of bools: ids\[mask\]"),
    "a mask of all": ({"prompts": torch.ones(2, 3) > 0}, r"prompts\[0\].*a mask of bools"),
    "floats": ({"prompts": [torch.tensor([3.0])]}, r"prompts\[0\].*1-d integer tensor"),
    "no list": ({"prompts": iter([torch.tensor([3])])}, "prompts must be a list, got list_iterator"),
    "nothing": ({"prompts": None}, "prompts must be a list, got NoneType"),
    "a dictionary": ({"prompts": {"prompt": "1"}}, "prompts must be a list, got dict"),
    "1-d tensor": ({"prompts": torch.tensor([3, 4])}, "prompts"),
    "context": ({"prompts": [torch.full((57,), 3)]}, r"prompt.*57.*gen_length 8.*context of 64"),
    "mask token": ({"prompts": ids(3, MASK)}, "prompts.*mask token"),
    "id too large": ({"prompts": ids(3, 40)}, "prompt.*vocabulary of 40"),
    "id negative": ({"prompts": ids(-1)}, "prompt.*vocabulary of 40"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_errors_name_the_argument_before_any_network_evaluation(random_model, forward_rows, changes, message):
    model = random_model()
    diffpo.generate(model, **GOOD)
    with forward_rows(model) as rows, pytest.raises(ValueError, match=message):
        diffpo.generate(model, **GOOD | changes)
    assert rows == []


def test_the_longest_prompt_that_fits_fits(random_model):
    diffpo.generate(random_model(), [torch.full((56,), 3)], 8)


def test_chats_without_a_template(word_model):
    with pytest.raises(ValueError, match="chat template"):
        diffpo.generate(word_model, [[{"role": "user", "content": "1"}]], 4)


@pytest.mark.parametrize("has_template", [False, True])
@pytest.mark.parametrize("prompt", [[3, 4], [0.5], ["1"], []], ids=["ids", "floats", "strings", "empty"])
def test_a_list_that_is_no_chat_says_so(word_model, prompt, has_template):
    """Whether or not the model has a template, which is not the fault."""
    word_model.tokenizer.chat_template = "{{ messages[0]['content'] }}" if has_template else None
    numbers = bool(prompt) and not isinstance(prompt[0], str)
    message = r"give token ids as a tensor, torch\.tensor\(ids\)" if numbers else "messages must be a list of"
    with pytest.raises(ValueError, match=rf"prompts\[0\]: .*{message}"):
        diffpo.generate(word_model, [prompt], 4)


@pytest.mark.parametrize("model", ["tiny-countdown", None, torch.nn.Linear(1, 1)], ids=["name", "none", "module"])
def test_what_is_no_model_says_so(random_model, random_prompts, model):
    trajectory = diffpo.generate(random_model(), random_prompts(random_model(), [3]), 4).trajectory
    for call in (
        lambda: diffpo.generate(model, ids(3), 4),
        lambda: diffpo.stream(model, ids(3), 4),
        lambda: diffpo.Engine(model, 1, 4, 4),
        lambda: diffpo.trajectory_logprobs(model, trajectory, [0]),
    ):
        with pytest.raises(ValueError, match=r"model must be a model, as diffpo.load\(name\) gives it, got"):
            call()


def test_a_bare_string_is_an_error_with_a_tokenizer_too(word_model):
    with pytest.raises(ValueError, match="prompts"):
        diffpo.generate(word_model, "1 + 2", 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: diffpo.FixedSchedule(0), "steps"),
        (lambda: diffpo.FixedSchedule(-2), "steps"),
        (lambda: diffpo.ConfidenceThreshold(-0.1), "p must"),
        (lambda: diffpo.ConfidenceThreshold(1.1), "p must"),
        (lambda: diffpo.ConfidenceThreshold(float("nan")), "p must"),
        (lambda: diffpo.FactorThreshold(-0.1), "factor must be at least 0"),
        (lambda: diffpo.FactorThreshold(float("nan")), "factor"),
        (lambda: diffpo.EntropyBounded(-0.1), "gamma"),
        (lambda: diffpo.EntropyBounded(float("nan")), "gamma"),
        (lambda: diffpo.EntropyBounded(torch.tensor([0.1, float("nan")])), "gamma"),
        (lambda: diffpo.EntropyBounded(torch.tensor([0.1, -1.0])), "gamma"),
        (lambda: diffpo.EntropyBounded(torch.zeros(2, 2)), "gamma"),
        (lambda: diffpo.EntropyBounded(0.1, order="entropie"), r"order.*entropy, confidence, margin.*'entropie'"),
        (lambda: diffpo.PromptThreshold(order="random"), r"order.*'random'"),
        (lambda: diffpo.FixedSchedule(2.5), r"steps must be an int, got 2\.5"),
        (lambda: diffpo.FixedSchedule("4"), "steps must be an int, got '4'"),
        (lambda: diffpo.ConfidenceThreshold("0.9"), "p must be a probability.*got '0.9'"),
        (lambda: diffpo.FactorThreshold("1"), "factor must be at least 0.*got '1'"),
        (lambda: diffpo.FactorThreshold(None), "factor must be at least 0.*got None"),
        (lambda: diffpo.EntropyBounded("0.1"), "gamma must be a number or a tensor.*got '0.1'"),
        (lambda: diffpo.EntropyBounded(None), "gamma must be a number or a tensor.*got None"),
        (lambda: diffpo.EntropyBounded(True), "gamma must be a number or a tensor.*got True"),
    ],
)
def test_rules_that_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite(random_model, random_prompts, bad, temperature):
    model = random_model(threshold_gammas=(0.0, 1.0))
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = bad
    for rule in (diffpo.FixedSchedule(4), diffpo.EntropyBounded(0.1), diffpo.PromptThreshold(sample=True)):
        with pytest.raises(FloatingPointError, match="NaN"):
            diffpo.generate(model, random_prompts(model, [4, 6]), 4, rule=rule, temperature=temperature)


def test_the_error_names_the_prompts_whose_logits_are_not_finite(random_model):
    model = random_model(seed=1)
    with torch.no_grad():
        model.embed_tokens.weight[39] = float("nan")
    prompts = [torch.tensor([3, 4]), torch.tensor([5, 6]), torch.tensor([7, 39]), torch.tensor([8, 9])]
    with pytest.raises(FloatingPointError, match=r"1 prompts.*\[2\]"):
        diffpo.generate(model, prompts, 4)
    with pytest.raises(FloatingPointError, match=r"1 prompts.*\[2\]"):
        diffpo.generate(model, prompts, 4, batch_size=2)


def test_order_was_called_proxy():
    for make in (diffpo.PromptThreshold, lambda **name: diffpo.EntropyBounded(0.1, **name)):
        with pytest.warns(DeprecationWarning, match="order"):
            rule = make(proxy="margin")
        assert rule.proxy == rule.order == make(order="margin").order == "margin"


def test_repr_of_the_rules():
    assert repr(diffpo.FixedSchedule(8)) == "FixedSchedule(steps=8)"
    assert repr(diffpo.EntropyBounded(0.1)) == "EntropyBounded(gamma=0.1, order=entropy)"
    assert repr(diffpo.ConfidenceThreshold(0.9)) == "ConfidenceThreshold(p=0.9)"
    assert repr(diffpo.FactorThreshold(1.5)) == "FactorThreshold(factor=1.5)"
    assert "sample" in repr(diffpo.PromptThreshold(sample=True))


def test_a_double_precision_model_decodes(random_model):
    model = random_model(seed=3)
    prompts, rule = [torch.tensor([5, 6, 7])], diffpo.EntropyBounded(0.5)
    single = diffpo.generate(model, prompts, 8, 4, rule)
    assert torch.equal(diffpo.generate(model.double(), prompts, 8, 4, rule).tokens, single.tokens)


def test_a_guided_trajectory_is_not_scored(random_model):
    model = random_model(seed=3)
    out = diffpo.generate(model, [torch.tensor([5, 6, 7])], 4, cfg_scale=1.0)
    with pytest.raises(ValueError, match="cfg_scale"):
        diffpo.trajectory_logprobs(model, out.trajectory, [0])


def test_equal_rows_are_evaluated_once(random_model):
    model, calls = random_model(seed=3), []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    diffpo.generate(model, [torch.tensor([5, 6, 7])] * 6, 4, temperature=1.0)
    assert calls[0] == 1
    assert calls[-1] > 1, "the rows part ways when different tokens are drawn"


def test_a_rule_is_no_name(random_model, random_prompts):
    model = random_model()
    with pytest.raises(ValueError, match="rule must be a commit rule"):
        diffpo.generate(model, random_prompts(model, [3]), 4, rule="eb")
