"""Requests of every kind for the engine, and what it makes of them."""

import itertools
from dataclasses import fields

import torch

import diffpo
from diffpo import DecodingOptions, Engine, Request, Trajectory
from diffpo.decoding.engine import Finished

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
LENGTHS = [3, 20, 1, 11, 8, 15, 2, 25, 5, 12, 17, 6, 0, 9, 4, 7, 10, 13, 14, 16]
SHAPES = [(16, 4), (8, 8), (16, 16), (8, 2), (4, 4), (12, 6)]


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
