"""Failures of one row are its own: numbers that are not finite, memory, rules that raise."""

from dataclasses import replace

import pytest
import torch
from engine_runs import alone, assert_equal, drained, results

import diffpo
from diffpo import DecodingOptions, Engine, Request
from diffpo.decoding.engine import Committed, Failed, Restarted
from diffpo.decoding.rules import Plan, Rule


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


def _plan(**changes):
    return lambda self, step: Plan(
        **{"order": step.doubt(), "cost": step.entropy, "budget": torch.zeros_like(step.gamma)} | changes
    )


class _Draws(Rule):
    draws_gamma = True


UNUSABLE = {
    "no plan": (Rule, {"plan": lambda self, step: None}),
    "no order": (Rule, {"plan": _plan(order=None)}),
    "another shape": (Rule, {"plan": _plan(cost=torch.zeros(1, 1))}),
    "another dtype": (Rule, {"plan": _plan(budget=torch.zeros(1, dtype=torch.int64))}),
    "an unknown way": (Rule, {"plan": _plan(rule="unknown")}),
    "no number": (Rule, {"plan": _plan(budget=torch.full((1,), float("nan")))}),
    "no thresholds": (_Draws, {"thresholds": lambda self, *given: None}),
    "too many thresholds": (_Draws, {"thresholds": lambda self, *given: [torch.zeros(7)] * 3}),
}


@pytest.mark.parametrize("together", [False, True], ids=["alone", "beside another rule"])
@pytest.mark.parametrize(("kind", "members"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_what_a_rule_cannot_return_is_the_failure_of_its_row(model, random_prompts, kind, members, together):
    rule = type("Unusable", (kind,), members)()
    ill, sound = (
        Request(prompt, DecodingOptions(12, 4, rule, 1.0), key=number)
        for number, (prompt, rule) in enumerate(
            zip(random_prompts(model, [5, 9]), (rule, diffpo.EntropyBounded(0.5)), strict=True)
        )
    )
    engine = Engine(model, 2 if together else 1, 9, 12)
    engine.submit(ill), engine.submit(sound)
    events = drained(engine)
    assert [event.id for event in events if isinstance(event, Failed)] == [0]
    assert_equal(results(events)[1], alone(model, sound))


def test_a_rule_may_plan_in_another_precision_whatever_is_beside_it(model, random_prompts):
    rule = type("Double", (Rule,), {"plan": lambda self, step: Plan(step.doubt().double(), step.entropy, step.gamma)})
    rule.gamma = 0.5
    asked = [
        Request(prompt, DecodingOptions(12, 4, rule, 1.0), key=number)
        for number, (prompt, rule) in enumerate(
            zip(random_prompts(model, [5, 9]), (rule(), diffpo.EntropyBounded(0.5)), strict=True)
        )
    ]
    engine = Engine(model, 2, 9, 12)
    for request in asked:
        engine.submit(request)
    found = results(drained(engine))
    for number, request in enumerate(asked):
        assert_equal(found[number], alone(model, request))


@pytest.mark.parametrize("wrong", [{"gamma": torch.zeros(2)}, {"number": "3"}, {"family": [1]}], ids=str)
def test_a_rule_that_no_batch_can_hold_is_refused(model, wrong):
    engine, rule = Engine(model, 1, 4, 8), type("Odd", (Rule,), wrong)()
    with pytest.raises(ValueError, match="rule: Odd has no gamma, number or family for a row"):
        engine.submit(Request([3, 4], DecodingOptions(8, rule=rule)))
    assert len(engine) == 0


@pytest.mark.parametrize("wrong", [{"stops_at_eos": None}, {"draws_gamma": "no"}], ids=str)
def test_a_rule_that_says_neither_yes_nor_no_is_refused(model, wrong):
    engine, rule = Engine(model, 1, 4, 8), type("Odd", (Rule,), wrong)()
    with pytest.raises(ValueError, match=f"rule: {next(iter(wrong))} of Odd must be True or False"):
        engine.submit(Request([3, 4], DecodingOptions(8, rule=rule)))
    assert len(engine) == 0


def test_more_steps_than_an_integer_of_the_device_holds(model, random_prompts):
    asked = [
        Request(prompt, DecodingOptions(12, 4, diffpo.FixedSchedule(steps)), key=number)
        for number, (prompt, steps) in enumerate(zip(random_prompts(model, [5, 9]), (3 * 2**70, 6), strict=True))
    ]
    engine = Engine(model, 2, 9, 12)
    for request in asked:
        engine.submit(request)
    found = results(drained(engine))
    assert [int(found[number].nfe) for number in range(2)] == [12, 6]
    for number, request in enumerate(asked):
        assert_equal(found[number], alone(model, request))
