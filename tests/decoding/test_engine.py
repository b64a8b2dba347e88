"""The open queue: every option by row, requests that come and go, failures of one row, weights that change."""

import itertools
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import diffpo
from diffpo import DecodingOptions, Engine, Request, Trajectory
from diffpo.decoding.decoder import StepMode
from diffpo.decoding.engine import Committed, Failed, Finished, Restarted
from diffpo.models.word_tokenizer import word_tokenizer

WORDS = [str(n) for n in range(10)]
RULES = [
    diffpo.FixedSchedule(8),
    diffpo.FixedSchedule(4),
    diffpo.ConfidenceThreshold(0.4),
    diffpo.ConfidenceThreshold(0.7),
    diffpo.FactorThreshold(1.0),
    diffpo.FactorThreshold(0.2),
    diffpo.EntropyBounded(0.7),
    diffpo.EntropyBounded(2.0, "margin"),
    diffpo.PromptThreshold(sample=True),
    diffpo.PromptThreshold("confidence"),
]
SHAPES = [(16, 4), (8, 8), (16, 16), (8, 2), (4, 4), (12, 6)]


@pytest.fixture
def model(random_model):
    """In float64, so that rows differ by no rounding that would change a decision."""
    tokenizer = word_tokenizer(WORDS)
    model = random_model(3, scale=0.6, vocab_size=len(tokenizer), threshold_gammas=(0.0, 1.0, 3.0)).double()
    model.tokenizer = tokenizer
    return model


def requests(model, prompts, *, guided=True):
    """One for each prompt: all rules, with temperatures, lengths, blocks, seeds, guidance and stop strings that never repeat together."""
    found = []
    choices = zip(
        prompts, itertools.cycle(RULES), itertools.cycle(SHAPES), itertools.cycle([0.0, 1.0, 0.7]), strict=False
    )
    for number, (ids, rule, (gen_length, block_length), temperature) in enumerate(choices):
        blocks = gen_length // block_length
        if isinstance(rule, diffpo.FixedSchedule):
            rule = diffpo.FixedSchedule(max(rule.steps // blocks, 1) * blocks)
        options = DecodingOptions(
            gen_length, block_length, rule, temperature, seed=number % 4, cfg_scale=(0.0, 0.0, 0.5, 1.5)[number % 4] * guided,
            stop=(None, "7", None, None, ["3 4", "5"])[number % 5],
        )  # fmt: skip
        found.append(Request(ids, options, key=100 + 7 * number))
    return found


def drained(engine, most=1000):
    """All events until nothing is open."""
    events = []
    while len(engine):
        events += engine.step()
        assert len(events) < 100 * most
    return events


def results(events) -> dict[int, Trajectory]:
    return {event.id: event.trajectory for event in events if isinstance(event, Finished)}


def alone(model, request, **options) -> Trajectory:
    engine = Engine(model, 1, len(request.ids), request.options.gen_length, **options)
    engine.submit(request)
    (trajectory,) = results(drained(engine)).values()
    return trajectory


def assert_equal(one: Trajectory, other: Trajectory):
    """The same rollout; log-probs and entropies as exactly as float32 records them."""
    for item in fields(Trajectory):
        a, b = getattr(one, item.name), getattr(other, item.name)
        if item.name == "actions":
            assert a.keys() == b.keys()
            for name in a:
                assert torch.equal(a[name].choice, b[name].choice)
                torch.testing.assert_close(a[name].logprob, b[name].logprob, rtol=1e-6, atol=1e-6)
        elif isinstance(a, torch.Tensor) and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True, msg=item.name)
        else:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, item.name


LENGTHS = [3, 20, 1, 11, 8, 15, 2, 25, 5, 12, 17, 6, 0, 9, 4, 7, 10, 13, 14, 16]


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
    model = random_model(3, scale=0.6, vocab_size=len(tokenizer), threshold_gammas=(0.0, 1.0), logit_shift=shift)
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


# ---- events


def check_commits(events, found):
    for number, one in found.items():
        tokens, steps = torch.full_like(one.tokens[0], -1), torch.zeros_like(one.tokens[0])
        for event in events:
            if isinstance(event, Committed) and event.id == number:
                assert (steps[event.positions] == 0).all()
                tokens[event.positions], steps[event.positions] = torch.tensor(event.tokens), event.nfe
        assert torch.equal(steps, one.commit_step[0])
        assert torch.equal(tokens[steps > 0], one.tokens[0][steps > 0])


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_commits_add_up_to_the_trajectory(model, random_prompts, cache):
    asked = requests(model, random_prompts(model, LENGTHS), guided=False)
    engine = Engine(model, 6, 25, 16, cache=cache)
    for request in asked:
        engine.submit(request)
    events = drained(engine)
    found = results(events)
    assert len(found) == 20
    check_commits(events, found)
    ended = {}
    for place, event in enumerate(events):
        assert event.id not in ended, "nothing comes after the end"
        if isinstance(event, Finished):
            ended[event.id] = place


@pytest.mark.parametrize("lag", [1, 2])
def test_commits_of_a_lagging_engine(model, random_prompts, monkeypatch, lag):
    monkeypatch.setattr(StepMode, "of", lambda model, options: StepMode(static=True, lag=lag))
    engine, options = Engine(model, 3, 25, 16), DecodingOptions(16, 4, diffpo.EntropyBounded(1.0), 1.0)
    for prompt in random_prompts(model, LENGTHS):
        engine.submit(Request(prompt, options))
    events = drained(engine)
    found = results(events)
    assert len(found) == 20
    check_commits(events, found)


def test_first_come_first_served(model, random_prompts):
    engine, options = Engine(model, 3, 25, 8), DecodingOptions(8, 4, diffpo.EntropyBounded(1.0))
    for prompt in random_prompts(model, LENGTHS):
        engine.submit(Request(prompt, options))
    first = list(dict.fromkeys(event.id for event in drained(engine) if isinstance(event, Committed)))
    assert first == list(range(20))


def test_the_example_of_the_documentation_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()
    (code,) = re.findall(r"```python\n(import.*?)```", page, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.count("Finished(id=") == 2


# ---- coming and going


def test_submit_during_decoding(model, random_prompts):
    asked = requests(model, random_prompts(model, LENGTHS))
    engine, events = Engine(model, 4, 25, 16), []
    for request in asked:
        engine.submit(request)
        events += engine.step()
    events += drained(engine)
    found = results(events)
    for number, request in enumerate(asked):
        assert_equal(found[number], alone(model, request))
    check_commits(events, found)
    assert engine.step() == []
    late = engine.submit(asked[3])
    assert late == 20
    assert_equal(results(drained(engine))[late], found[3])


@pytest.mark.parametrize(("cache", "lag"), [("none", 0), ("none", 2), ("prefix", 0)])
def test_cancel(model, random_prompts, monkeypatch, cache, lag):
    asked = requests(model, random_prompts(model, LENGTHS), guided=False)
    expected = [alone(model, request, cache=cache) for request in asked]
    monkeypatch.setattr(StepMode, "of", lambda model, options: StepMode(lag=lag))
    engine = Engine(model, 4, 25, 16, cache=cache)
    for request in asked:
        engine.submit(request)
    events = engine.step() + engine.step()
    in_flight = engine.decoder.ids.tolist()
    gone = [in_flight[0], in_flight[2], 15]
    assert [engine.cancel(row) for row in gone] == [True] * 3
    assert [engine.cancel(row) for row in gone] == [False] * 3
    assert not engine.cancel(99)
    before = len(events)
    events += engine.step()
    assert engine.decoder.free == 0, "waiting requests took the places"
    events += drained(engine)
    assert not any(event.id in gone for event in events[before:])
    found = results(events)
    assert sorted(found) == [number for number in range(20) if number not in gone]
    for number, one in found.items():
        assert_equal(one, expected[number])


def test_cancel_all(model, random_prompts):
    engine = Engine(model, 2, 5, 8)
    rows = [engine.submit(Request(prompt, DecodingOptions(8))) for prompt in random_prompts(model, [3, 4, 5])]
    engine.step()
    for row in rows:
        assert engine.cancel(row)
    assert len(engine) == 0
    assert engine.step() == []


# ---- failures


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_failure_is_its_rows_own(model, random_prompts, cache):
    """Also where a longer row takes over the place and the cache of a failed one, and rows become wider than when they began."""
    with torch.no_grad():  # NaN wherever token 4 stands, which no completion takes
        model.embed_tokens.weight[4], model.lm_head.weight[4] = float("nan"), 0
    prompts = [prompt.clamp(min=5) for prompt in random_prompts(model, [9, 3, 9, 2, 25, 20, 4])]
    prompts[2][0] = 4
    asked = [
        Request(prompt, DecodingOptions(8, 4, diffpo.EntropyBounded(0.5)), key=n + 50)
        for n, prompt in enumerate(prompts)
    ]
    engine = Engine(model, 3, 25, 8, cache=cache)
    for request in asked:
        engine.submit(request)
    events = drained(engine)
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert (failed.id, failed.key) == (2, 52)
    with pytest.raises(FloatingPointError, match=r"1 prompts.*\[52\]"):
        raise failed.error
    assert not any(isinstance(event, Committed) and event.id == 2 for event in events)
    found = results(events)
    assert sorted(found) == [0, 1, 3, 4, 5, 6]
    for number, one in found.items():
        assert_equal(one, alone(model, asked[number], cache=cache))


def test_a_failed_row_changes_no_bit_of_the_others(random_model, random_prompts):
    """Against the same batch in which the prompt of the failing row is sound."""
    model = random_model(3, scale=0.6, vocab_size=16)
    with torch.no_grad():
        model.embed_tokens.weight[4], model.lm_head.weight[4] = float("nan"), 0
    prompts = [prompt.clamp(min=5) for prompt in random_prompts(model, [9, 3, 9, 2])]
    options, found = DecodingOptions(8, 8, diffpo.FixedSchedule(8)), []
    for token in (5, 4):
        prompts[2][:] = torch.tensor([token, *range(5, 13)])
        engine = Engine(model, 4, 9, 8)
        for prompt in prompts:
            engine.submit(Request(prompt, options))
        first = engine.step()
        found.append({event.id: event for event in first if isinstance(event, Committed)})
        logprobs = engine.decoder.rows.logprob[: len(engine.decoder.ids)]
        found[-1]["logprob"] = {int(row): one.clone() for row, one in zip(engine.decoder.ids, logprobs, strict=True)}
    sound, ill = found
    assert 2 in sound
    assert 2 not in ill
    for row in (0, 1, 3):
        assert sound[row] == ill[row]
        assert torch.equal(sound["logprob"][row], ill["logprob"][row])


def test_a_row_that_does_not_fit_in_memory_fails_alone(random_model, random_prompts):
    model, calls = random_model(1, vocab_size=16), []

    def check(module, arguments):
        calls.append(arguments[0].shape[0])
        if arguments[0].numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    prompts = random_prompts(model, [5, 9, 50, 8, 3])
    options = DecodingOptions(12, 4, diffpo.EntropyBounded(0.5), 1.0)
    expected = [alone(model, Request(prompt, options, key=number)) for number, prompt in enumerate(prompts)]
    model.register_forward_pre_hook(check)
    engine = Engine(model, 4, 50, 12)
    for prompt in prompts:
        engine.submit(Request(prompt, options))
    with pytest.warns(RuntimeWarning, match="out of memory with . rows in flight: going on with") as warned:
        events = drained(engine)
    assert ["4 rows" in str(warned[0].message), "2 rows" in str(warned[1].message), len(warned)] == [True, True, 2]
    assert [event.id for event in events if isinstance(event, Restarted)][:4] == [0, 1, 2, 3]
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.id == 2
    assert isinstance(failed.error, torch.OutOfMemoryError)
    assert "gen_length (12) or block_length (4)" in str(failed.error)
    found = results(events)
    assert sorted(found) == [0, 1, 3, 4]
    for number, one in found.items():
        assert torch.equal(one.tokens, expected[number].tokens)
        assert torch.equal(one.commit_step, expected[number].commit_step)


def test_an_error_of_a_rule_is_the_failure_of_its_rows_in_flight(model, random_prompts):
    class Stumbling(diffpo.EntropyBounded):
        calls = 0

        def plan(self, step):
            type(self).calls += 1
            if self.calls == 3:
                raise ZeroDivisionError
            return super().plan(step)

    prompts = random_prompts(model, [5, 9, 7])
    engine, options = Engine(model, 2, 9, 12), DecodingOptions(12, 4, Stumbling(0.5), 1.0)
    for prompt in prompts:
        engine.submit(Request(prompt, options))
    events = engine.step() + engine.step()
    in_flight = sorted(engine.open)[:2]  # a waiting one enters first
    failed = engine.step()
    assert [(event.id, type(event.error)) for event in failed] == [(id, ZeroDivisionError) for id in in_flight]
    plain = replace(options, rule=diffpo.EntropyBounded(0.5))
    found = results(events + drained(engine))
    assert sorted(found) == [id for id in range(3) if id not in in_flight]
    for number, one in found.items():
        assert_equal(one, alone(model, Request(prompts[number], plain, key=number)))


# ---- other weights


def test_load(random_model, random_prompts):
    old, new = (random_model(seed, vocab_size=16, scale=0.6).double() for seed in (1, 2))
    model = random_model(1, vocab_size=16, scale=0.6).double()
    asked = [
        Request(prompt, DecodingOptions(8, 4, temperature=1.0), key=number)
        for number, prompt in enumerate(random_prompts(model, [5, 9, 7, 3]))
    ]
    engine = Engine(model, 2, 9, 8, version=7)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for request in asked:
        engine.submit(request)
    engine.step()
    engine.load(new.state_dict(), 8)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
    found = results(drained(engine))
    assert [int(found[number].version) for number in range(4)] == [7, 7, 8, 8]
    for number, request in enumerate(asked):
        of_old, of_new = alone(old, request), replace(alone(new, request), version=torch.tensor([8]))
        if number >= 2:
            assert_equal(found[number], of_new)
        else:
            first = found[number].commit_step == 1
            assert torch.equal(found[number].tokens[first], of_old.tokens[first])
            assert not torch.equal(found[number].logprob, of_old.logprob.float())


def test_weights_of_another_model(random_model):
    model = random_model(1)
    engine = Engine(model, 2, 9, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fewer = dict(list(before.items())[:-1])
    with pytest.raises(ValueError, match=f"weights: missing.*{list(before)[-1]}"):
        engine.load(fewer, 1)
    with pytest.raises(ValueError, match=r"weights: missing or not of this model: more"):
        engine.load(before | {"more": torch.zeros(1)}, 1)
    wrong = {name: tensor + 1 for name, tensor in before.items()} | {"norm.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"weights: norm.weight must be \[32\], got \[3\]"):
        engine.load(wrong, 1)
    assert engine.version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_named_once(random_model):
    model, other = random_model(1, tie_word_embeddings=True), random_model(2, tie_word_embeddings=True)
    engine = Engine(model, 2, 9, 8)
    engine.load({name: tensor for name, tensor in other.state_dict().items() if name != "lm_head.weight"}, 1)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)


# ---- what cannot be

BAD_OPTIONS = {
    "gen_length": ({"gen_length": 0}, "gen_length must be at least 1"),
    "no int": ({"gen_length": "8"}, "gen_length must be an int"),
    "block_length": ({"block_length": 3}, "multiple of block_length, got 3"),
    "rule": ({"rule": "eb"}, "rule must be a commit rule"),
    "temperature": ({"temperature": -1}, "temperature must be a finite number"),
    "temperature of no number": ({"temperature": "warm"}, "temperature must be a finite number"),
    "cfg_scale": ({"cfg_scale": float("inf")}, "cfg_scale must be a finite number"),
    "seed": ({"seed": 0.5}, "seed must be an int"),
    "seed of 65 bits": ({"seed": 2**64}, "seed must be an int of 64 bits"),
    "stop": ({"stop": [""]}, "stop must be a string or a list"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_options_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        DecodingOptions(**{"gen_length": 8} | changes)


def test_an_unknown_option_is_named_with_the_nearest(model, random_prompts):
    prompts = random_prompts(model, [3])
    for call in (diffpo.generate, diffpo.stream):
        with pytest.raises(TypeError, match=rf"{call.__name__}\(\).*'temprature'.*'temperature'"):
            call(model, prompts, 8, temprature=1.0)
        with pytest.raises(TypeError, match=rf"{call.__name__}\(\).*gen_length"):
            call(model, prompts)
        with pytest.raises(TypeError, match=rf"{call.__name__}\(\).*multiple values.*block_length"):
            call(model, prompts, 8, 4, block_length=4)
    with pytest.raises(TypeError, match="chache"):
        Engine(model, 1, 8, 8, chache="dual")
    assert "temperature: 0 takes the most probable token" in diffpo.generate.__doc__


BAD_REQUESTS = {
    "vocabulary": (lambda: Request([3, 99], DecodingOptions(8)), "ids: .*outside the vocabulary"),
    "mask": (lambda: Request([3, 2], DecodingOptions(8)), "ids: .*mask token"),
    "floats": (lambda: Request([0.5], DecodingOptions(8)), "ids must be a 1-d integer tensor"),
    "matrix": (lambda: Request(torch.zeros(1, 2).long(), DecodingOptions(8)), "ids must be a 1-d integer tensor"),
    "options": (lambda: Request([3], {"gen_length": 8}), "options must be DecodingOptions, got dict"),
    "key": (lambda: Request([3], DecodingOptions(8), key="a"), "key must be an int"),
    "completion": (
        lambda: Request([3], DecodingOptions(16)),
        r"a completion of 16 do not fit.*of 12 and 16 tokens in all",
    ),
    "both": (lambda: Request([3] * 9, DecodingOptions(8)), r"a prompt of 9 tokens.*do not fit.*16 tokens in all"),
    "steps": (lambda: Request([3], DecodingOptions(8, 4, diffpo.FixedSchedule(3))), "steps 3"),
    "gammas": (lambda: Request([3], DecodingOptions(8, rule=diffpo.EntropyBounded(torch.ones(2)))), "2 values for 1"),
    "guided": (lambda: Request([3], DecodingOptions(8, cfg_scale=1.0)), 'needs cache="none"'),
    "stop": (lambda: Request([3], DecodingOptions(8, stop="x")), "stop needs a model with a tokenizer"),
}


@pytest.mark.parametrize(("make", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_requests_that_cannot_be(random_model, make, message):
    engine = Engine(random_model(), 1, 4, 12, cache="dual")
    with pytest.raises(ValueError, match=message):
        engine.submit(make())
    assert len(engine) == 0
    engine.submit(Request([3] * 8, DecodingOptions(8)))
    assert len(results(drained(engine))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 4), "rows must be an int of at least 1"),
        ((1, -1, 4), "prompt_length must be"),
        ((1, 4, 0), "gen_length must be"),
        ((1, 60, 5), "prompt_length 60 and gen_length 5 exceed the model's context of 64"),
    ],
)
def test_engines_that_cannot_be(random_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(random_model(), *arguments)
    with pytest.raises(ValueError, match="cache must be one of"):
        Engine(random_model(), 1, 4, 4, cache="some")
    with pytest.raises(ValueError, match="cuda_graph=True needs a model on a GPU"):
        Engine(random_model(), 1, 4, 4, cuda_graph=True)
