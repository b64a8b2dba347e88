"""What the engine tells of each step, and requests that come and go."""

import re
from pathlib import Path

import pytest
import torch
from engine_runs import LENGTHS, alone, assert_equal, drained, requests, results

import diffpo
from diffpo import DecodingOptions, Engine, Request
from diffpo.decoding.decoder import StepMode
from diffpo.decoding.engine import Committed, Finished


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
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "Engine(" in code]
    exec(code, {})
    assert capsys.readouterr().out.count("Finished(id=") == 2


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
    assert len(engine.decoder.jobs) == 4, "waiting requests took the places"
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
