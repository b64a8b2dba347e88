"""Other weights, while rows are in flight."""

from dataclasses import replace

import pytest
import torch
from engine_runs import alone, assert_equal, drained, results

from diffpo import DecodingOptions, Engine, Request


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
    for other in (None, "a folder", model):
        with pytest.raises(ValueError, match=r"weights must be named as in model\.state_dict\(\), got"):
            engine.load(other, 1)
    last, changed = list(before)[-1], {name: tensor + 1 for name, tensor in before.items()}
    for value, got in ((before[last].numpy(), "ndarray"), (before[last].int(), "torch.int32")):
        with pytest.raises(ValueError, match=f"weights: {last} must be a tensor of floats, got {got}"):
            engine.load(changed | {last: value}, 1)
    with pytest.raises(ValueError, match="version must be an int"):
        engine.load(changed, "a")
    assert engine.version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_named_once(random_model):
    model, other = random_model(1, tie_word_embeddings=True), random_model(2, tie_word_embeddings=True)
    engine = Engine(model, 2, 9, 8)
    engine.load({name: tensor for name, tensor in other.state_dict().items() if name != "lm_head.weight"}, 1)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)
