"""What cannot be: one error that names the field, before any work."""

import numpy as np
import pytest
import torch
from engine_runs import drained, results

import diffpo
from diffpo import DecodingOptions, Engine, Request

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
    for make, name, near in (
        (lambda **wrong: Engine(model, 1, 8, 8, **wrong), "cach", "cache"),
        (lambda **wrong: DecodingOptions(8, **wrong), "temprature", "temperature"),
        (lambda **wrong: Request([3], DecodingOptions(8), **wrong), "keys", "key"),
    ):
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'; the nearest is '{near}'"):
            make(**{name: 1})
    assert "temperature: 0 takes the most probable token" in diffpo.generate.__doc__


BAD_REQUESTS = {
    "vocabulary": (lambda: Request([3, 99], DecodingOptions(8)), "ids: .*outside the vocabulary"),
    "mask": (lambda: Request([3, 2], DecodingOptions(8)), "ids: .*mask token"),
    "floats": (lambda: Request([0.5], DecodingOptions(8)), "ids must be a 1-d integer tensor"),
    "text": (lambda: Request("3 4", DecodingOptions(8)), "ids must be token ids, got the text '3 4': encode it"),
    "words": (lambda: Request(["3", "4"], DecodingOptions(8)), "ids must be .*a list of token ids, got list"),
    "nothing": (lambda: Request(None, DecodingOptions(8)), "ids must be .*got NoneType"),
    "bools": (lambda: Request([True, False], DecodingOptions(8)), "ids must be token ids, got a mask of bools"),
    "a mask": (lambda: Request(torch.tensor([True]), DecodingOptions(8)), "ids must be token ids, got a mask of bools"),
    "complex": (lambda: Request(torch.tensor([1j]), DecodingOptions(8)), "ids must be a 1-d integer tensor"),
    "no request": (lambda: [3], "request must be a Request"),
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


@pytest.mark.parametrize("ids", [[], range(3, 5), (3, 4), np.array([3, 4]), torch.tensor([3, 4], dtype=torch.uint8)])
def test_ids_in_every_form(random_model, ids):
    assert Request(ids, DecodingOptions(8)).ids.tolist() == list(ids)
    assert Request(ids, DecodingOptions(8)).ids.dtype == torch.int64


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
    with pytest.raises(ValueError, match="version must be an int"):
        Engine(random_model(), 1, 4, 4, version="a")


def test_a_request_keeps_its_ids_whatever_becomes_of_the_buffer() -> None:
    buffer = torch.tensor([5, 6, 7])
    request = Request(buffer, DecodingOptions(8))
    buffer.fill_(9)
    assert request.ids.tolist() == [5, 6, 7]
