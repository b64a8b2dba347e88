"""The open queue: every option by row, and none that another row's result depends on."""

from dataclasses import replace

import pytest
from engine_runs import LENGTHS, RULES, WORDS, alone, assert_equal, drained, requests, results

import diffpo
from diffpo import DecodingOptions, Engine, Request
from diffpo.decoding.decoder import StepMode
from diffpo.models.word_tokenizer import word_tokenizer


@pytest.mark.parametrize("rows", [20, 6])
def test_a_mixed_batch_gives_what_each_row_gives_alone(model, random_prompts, rows):
    asked = requests(model, random_prompts(model, LENGTHS))
    engine = Engine(model, rows, 25, 20)
    assert [engine.submit(request) for request in asked] == list(range(20))
    found = results(drained(engine))
    assert sorted(found) == list(range(20))
    for number, request in enumerate(asked):
        assert_equal(found[number], alone(model, request))
        assert found[number].tokens.shape == (1, request.options.gen_length)
        assert found[number].prompt_ids.tolist() == [request.ids.tolist()]
        assert found[number].key.tolist() == [request.key]
    assert len({int(one.nfe) for one in found.values()}) > 5


@pytest.mark.parametrize("shift", [False, True])
def test_alone_is_what_generate_gives(random_model, random_prompts, shift):
    model = random_model(1, scale=0.6, vocab_size=16, threshold_gammas=(0.0, 1.0, 3.0), logit_shift=shift).double()
    prompts = random_prompts(model, LENGTHS[:10])
    for rule in RULES[shift::3]:
        options = DecodingOptions(16, 8, rule, 0.8, 3)
        whole = diffpo.generate(model, prompts, 16, 8, rule, 0.8, 3).trajectory
        engine = Engine(model, 4, 30, 30)  # wider than needed
        for prompt in prompts:
            engine.submit(Request(prompt, options))
        found = results(drained(engine))
        for number, prompt in enumerate(prompts):
            one = replace(found[number], prompt_ids=whole.prompt_ids[:1], prompt_mask=whole.prompt_mask[:1])
            expected = replace(
                whole[number : number + 1], prompt_ids=whole.prompt_ids[:1], prompt_mask=whole.prompt_mask[:1]
            )
            assert_equal(one, expected)
            assert found[number].prompt_ids[0].tolist() == prompt.tolist()


@pytest.mark.parametrize(
    ("cache", "refresh", "shift"),
    [("prefix", None, True), ("prefix", 2, False), ("dual", None, False), ("dual", 2, True)],
)
def test_mixed_rows_with_a_cache(random_model, random_prompts, cache, refresh, shift):
    tokenizer = word_tokenizer(WORDS)
    model = random_model(
        3, scale=0.6, vocab_size=len(tokenizer), threshold_gammas=(0.0, 1.0), threshold_reads="both", logit_shift=shift
    )
    model.double().tokenizer = tokenizer
    asked = requests(model, random_prompts(model, LENGTHS), guided=False)
    engine = Engine(model, 7, 25, 16, cache=cache, cache_refresh=refresh)
    for request in asked:
        engine.submit(request)
    found = results(drained(engine))
    for number, request in enumerate(asked):
        assert_equal(found[number], alone(model, request, cache=cache, cache_refresh=refresh))


@pytest.mark.parametrize("lag", [0, 2])
def test_a_static_engine_takes_mixed_rows_too(model, random_prompts, monkeypatch, lag):
    asked = requests(model, random_prompts(model, LENGTHS))
    same = [replace(request, options=replace(asked[0].options, stop=None)) for request in asked[10:]]
    expected = [alone(model, request) for request in asked + same]
    monkeypatch.setattr(StepMode, "of", lambda model, options: StepMode(static=True, lag=lag))
    engine = Engine(model, 5, 25, 16)
    for request in asked + same:
        engine.submit(request)
    found = results(drained(engine))
    for number, one in enumerate(expected):
        assert_equal(found[number], one)


def test_one_pass_of_the_network_for_all_rows(model, random_prompts, forward_rows):
    asked = requests(model, random_prompts(model, LENGTHS), guided=False)
    engine = Engine(model, 20, 25, 16)
    for request in asked:
        engine.submit(request)
    with forward_rows(model) as rows:
        engine.step()
    assert rows == [20]


def test_columns_that_no_row_needs_are_not_evaluated(model, random_prompts):
    shapes = []
    model.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    engine = Engine(model, 4, 10, 50)
    for prompt in random_prompts(model, [3, 5]):
        engine.submit(Request(prompt, DecodingOptions(4)))
    drained(engine)
    assert set(shapes) == {(2, 9)}
