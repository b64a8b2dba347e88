"""Options as users write them: integers for temperatures, numpy's numbers, rules of their own, which may raise; and rows that differ under a lag."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import diffpo
from diffpo import DecodingOptions, Engine, Request
from diffpo.decoding.decoder import StepMode
from diffpo.decoding.engine import Failed, Finished, Restarted
from diffpo.decoding.rules import Plan, Rule

PROMPT = torch.tensor([4, 5, 6])


def finished(engine: Engine) -> dict:
    events = []
    while len(engine):
        events += engine.step()
    return {event.id: event.trajectory for event in events if isinstance(event, Finished)}


def test_whole_numbers_as_temperatures_in_one_batch(random_model):
    model = random_model(0).double()
    mixed = Engine(model, 2, 3, 4)
    for temperature in (0, 1):
        mixed.submit(Request(PROMPT, DecodingOptions(4, temperature=temperature), key=5))
    for id, found in finished(mixed).items():
        alone = Engine(model, 1, 3, 4)
        alone.submit(Request(PROMPT, DecodingOptions(4, temperature=float(id)), key=5))
        assert torch.equal(found.tokens, finished(alone)[0].tokens)


def test_numbers_of_numpy(random_model, random_prompts):
    model = random_model(0)
    prompts = random_prompts(model, [3, 5, 2])
    wanted = diffpo.generate(model, prompts, 4, temperature=1.0, seed=3, batch_size=2)
    got = diffpo.generate(
        model, prompts, np.int64(4), temperature=np.float32(1), seed=np.int64(3), batch_size=np.int64(2)
    )
    assert torch.equal(got.tokens, wanted.tokens)


@dataclass
class OneAtATime(Rule):
    """A dataclass that compares by value has no hash."""

    steps: int = 4

    def plan(self, step):
        return Plan(step.doubt(), torch.ones_like(step.entropy), torch.zeros_like(step.gamma))


def test_a_rule_without_a_hash(random_model):
    out = diffpo.generate(random_model(0), [PROMPT], 4, rule=OneAtATime())
    assert out.nfe.tolist() == [4]


def test_rows_that_differ_end_together_under_a_lag(random_model):
    """As on a GPU, where the host learns a step late which rows are done."""
    engine = Engine(random_model(0), 2, 3, 4)
    engine.mode = StepMode(static=True, graphs=False, lag=1)
    for scale in (0.0, 1.0):
        engine.submit(Request(PROMPT, DecodingOptions(4, cfg_scale=scale)))
    assert sorted(finished(engine)) == [0, 1]


class Broken(Rule):
    def plan(self, step):
        raise KeyError("mine")


def test_a_rule_that_raises_fails_its_own_rows(random_model):
    model = random_model(0).double()
    engine = Engine(model, 3, 3, 4)
    for rule in (diffpo.FixedSchedule(4), Broken(), diffpo.EntropyBounded(0.5)):
        engine.submit(Request(PROMPT, DecodingOptions(4, rule=rule, temperature=1.0), key=5))
    events = []
    while len(engine):
        events += engine.step()
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.id == 1
    assert isinstance(failed.error, KeyError)
    assert {event.id for event in events if isinstance(event, Restarted)} == {0, 2}
    for event in events:
        if isinstance(event, Finished):
            rule = (diffpo.FixedSchedule(4), None, diffpo.EntropyBounded(0.5))[event.id]
            alone = diffpo.generate(model, [PROMPT], 4, rule=rule, temperature=1.0, row_ids=torch.tensor([5]))
            assert torch.equal(event.trajectory.tokens, alone.tokens)


def test_generate_raises_what_a_rule_raises(random_model):
    with pytest.raises(KeyError, match="mine"):
        diffpo.generate(random_model(0), [PROMPT, PROMPT], 4, rule=Broken())


class Several(diffpo.EntropyBounded):
    """Plans by something that its parent does not have."""

    def __init__(self, count: int):
        super().__init__(0.0)
        self.count = count

    def plan(self, step):
        return Plan(step.doubt(), torch.ones_like(step.entropy), torch.full_like(step.gamma, self.count - 1))


def test_a_rule_derived_from_ours_plans_its_own_rows_alone(random_model):
    engine = Engine(random_model(0, eos_token_id=None), 3, 3, 8)
    for count in (1, 2, 8):
        engine.submit(Request(PROMPT, DecodingOptions(8, rule=Several(count))))
    assert [int(one.nfe) for _, one in sorted(finished(engine).items())] == [8, 4, 1]
