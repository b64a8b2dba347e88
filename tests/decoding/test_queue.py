"""A queue of prompts through a fixed number of rows: who is in flight when, running out of memory, and the static step."""

import pytest
import torch

import diffpo
from diffpo.decoding.generation import stream

MASK = 2
LENGTHS = [3, 30, 1, 17, 8, 40, 2, 25, 5, 12, 33, 6]
GAMMAS = torch.tensor([0.0, 5.0, 0.5, 2.0] * 3)
RULE = diffpo.EntropyBounded(GAMMAS)


@pytest.fixture
def seen():
    """seen(model) -> the list that collects the shape of every network evaluation."""

    def watch(model) -> list[tuple[int, int]]:
        shapes = []
        model.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
        return shapes

    return watch


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
def test_any_number_of_rows_gives_what_each_prompt_gives_alone(
    random_model, random_prompts, assert_same, temperature, shift
):
    model = random_model(seed=1, scale=0.6, vocab_size=16, logit_shift=shift)
    prompts = random_prompts(model, LENGTHS)
    whole = diffpo.generate(model, prompts, 16, 4, RULE, temperature, seed=3).trajectory
    assert len(whole.nfe.unique()) > 5, "rows should end at different times"
    for rows in (1, 2, 5):
        queued = diffpo.generate(model, prompts, 16, 4, RULE, temperature, seed=3, batch_size=rows).trajectory
        assert_same(queued, whole)


def test_a_waiting_prompt_enters_as_soon_as_a_row_ends(random_model, random_prompts, seen):
    model = random_model(seed=1, vocab_size=16, eos_token_id=None)
    shapes = seen(model)
    out = diffpo.generate(model, random_prompts(model, LENGTHS), 16, 4, RULE, batch_size=3)
    rows = [count for count, _ in shapes]
    assert sum(rows) == out.nfe.sum(), "no evaluation is wasted"
    full = len(rows) - rows[::-1].index(3)
    assert set(rows[:full]) == {3}, "every place is taken while prompts wait"
    assert full > 0.7 * len(rows)


def test_prompts_of_similar_length_are_together(random_model, random_prompts, seen):
    model = random_model(seed=1, vocab_size=16, eos_token_id=None)
    shapes = seen(model)
    out = diffpo.generate(model, random_prompts(model, LENGTHS), 16, 4, RULE, batch_size=3)
    evaluated = sum(rows * width for rows, width in shapes)
    needed = sum(int(n) * (length + 16) for n, length in zip(out.nfe, LENGTHS, strict=True))
    assert evaluated < 1.35 * needed
    assert shapes[-1][1] < max(LENGTHS) + 16, "the batch becomes narrower when its long prompts are done"


def test_stream_yields_a_row_after_its_last_step(random_model, random_prompts, seen):
    model = random_model(seed=1, vocab_size=16, eos_token_id=None)
    prompts = random_prompts(model, LENGTHS)
    whole = diffpo.generate(model, prompts, 16, 4, RULE)
    shapes, yielded = seen(model), []
    for row, one in stream(model, prompts, 16, 4, RULE, batch_size=12):
        assert len(shapes) == one.nfe[0], "all twelve start together, so a row's NFE is the time of its end"
        assert torch.equal(one.tokens[0], whole.tokens[row])
        assert one.trajectory.prompt_ids.shape == (1, max(LENGTHS))
        yielded.append(row)
    assert sorted(yielded) == list(range(12))
    assert yielded != sorted(yielded)


def test_seconds_count_from_entering_the_batch_to_leaving_it(random_model, random_prompts, seen, monkeypatch):
    """By a clock that ticks with every network evaluation: each is one of all rows in flight."""
    model = random_model(seed=1, vocab_size=16, eos_token_id=None)
    prompts, shapes = random_prompts(model, LENGTHS), seen(model)
    monkeypatch.setattr("diffpo.decoding.decoder.perf_counter", lambda: float(len(shapes)))
    for rows in (3, 12):
        streamed = list(stream(model, prompts, 16, 4, RULE, batch_size=rows))
        assert [one.seconds for _, one in streamed] == [float(one.nfe) for _, one in streamed]
        assert len({one.seconds for _, one in streamed}) > 5
    assert diffpo.generate(model, prompts, 16, 4, RULE).seconds is None


RULES_THAT_DRAW = [RULE, diffpo.FixedSchedule(8), diffpo.PromptThreshold(sample=True)]


@pytest.mark.parametrize("rule", RULES_THAT_DRAW, ids=lambda rule: type(rule).__name__)
def test_row_ids_key_the_draws(random_model, random_prompts, assert_same, rule):
    """Some prompts of a list, with their places in it, give what they give in the whole list."""
    model = random_model(seed=1, scale=0.6, vocab_size=16, threshold_gammas=(0.0, 1.0, 3.0))
    prompts = random_prompts(model, [9] * 12)
    whole = diffpo.generate(model, prompts, 16, 4, rule, 1.0, seed=3)
    some = torch.tensor([7, 2, 11])
    options = {"rule": diffpo.EntropyBounded(GAMMAS[some]) if rule is RULE else rule, "temperature": 1.0, "seed": 3}
    chosen = [prompts[i] for i in some]
    assert_same(diffpo.generate(model, chosen, 16, 4, **options, row_ids=some).trajectory, whole.trajectory[some])
    without = diffpo.generate(model, chosen, 16, 4, **options)
    assert not torch.equal(without.tokens, whole.tokens[some])
    for row, one in stream(model, chosen, 16, 4, **options, row_ids=some, batch_size=2):
        assert torch.equal(one.tokens[0], whole.tokens[some[row]])


@pytest.mark.parametrize("row_ids", [[0, 1], torch.arange(3), torch.tensor([0.0, 1.0]), torch.zeros(2, 1).long()])
def test_row_ids_that_do_not_fit(random_model, random_prompts, row_ids):
    model = random_model()
    with pytest.raises(ValueError, match=r"row_ids must be an int64 tensor \[2\]"):
        diffpo.generate(model, random_prompts(model, [3, 3]), 4, row_ids=row_ids)


def test_stream_checks_its_arguments_when_it_is_called(random_model, random_prompts):
    model = random_model()
    with pytest.raises(ValueError, match="gen_length"):
        stream(model, random_prompts(model, [3]), 0)


def test_rows_that_finished_are_yielded_before_an_error(random_model, random_prompts):
    model = random_model(seed=1, vocab_size=16, eos_token_id=None)
    prompts = [*random_prompts(model, [9, 8, 7]), torch.tensor([15])]
    with torch.no_grad():
        model.embed_tokens.weight[15] = float("nan")
    prompts = [prompt.clamp(max=14) for prompt in prompts[:3]] + prompts[3:]
    rows, got = stream(model, prompts, 4, rule=diffpo.EntropyBounded(float("inf")), batch_size=2), []
    with pytest.raises(FloatingPointError, match=r"1 prompts.*\[3\]"):
        got.extend(row for row, _ in rows)
    assert sorted(got) == [0, 1, 2]
    with pytest.raises(FloatingPointError, match=r"1 prompts.*\[33\]"):
        diffpo.generate(model, prompts, 4, row_ids=torch.tensor([30, 31, 32, 33]))


class Memory:
    """A model that runs out of memory when more than ``positions`` go through it at once."""

    def __init__(self, model, positions):
        self.shapes = []

        def check(module, arguments):
            self.shapes.append(tuple(arguments[0].shape))
            if arguments[0].numel() > positions:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        model.register_forward_pre_hook(check)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_out_of_memory_halves_the_rows_and_loses_nothing(random_model, random_prompts, assert_same, cache):
    model = random_model(seed=1, scale=0.6, vocab_size=16)
    prompts = random_prompts(model, LENGTHS)
    whole = diffpo.generate(model, prompts, 16, 4, RULE, 1.0, seed=3, cache=cache).trajectory
    memory = Memory(model, positions=4 * (40 + 16))
    with pytest.warns(RuntimeWarning, match=r"out of memory with (12|6) rows.*batch_size"):
        halved = diffpo.generate(model, prompts, 16, 4, RULE, 1.0, seed=3, cache=cache).trajectory
    assert_same(halved, whole)
    assert [rows for rows, _ in memory.shapes[:2]] == [12, 6]
    assert max(rows for rows, _ in memory.shapes[2:]) == 3


def test_out_of_memory_later_on(random_model, random_prompts, assert_same):
    model = random_model(seed=1, scale=0.6, vocab_size=16)
    prompts = random_prompts(model, LENGTHS)
    whole = diffpo.generate(model, prompts, 16, 4, RULE, 1.0, seed=3).trajectory
    calls = []

    def fail_once(module, arguments):
        calls.append(len(arguments[0]))
        if len(calls) == 25:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(fail_once)
    rows = stream(model, prompts, 16, 4, RULE, 1.0, seed=3, batch_size=4)
    with pytest.warns(RuntimeWarning, match="out of memory with 4 rows"):
        items = [(row, one, len(calls)) for row, one in rows]
    yielded = {row: (one.trajectory, at) for row, one, at in items}
    assert len(yielded) == len(items)
    assert sorted(yielded) == list(range(12))
    assert sum(at < 25 for _, at in yielded.values()) > 1, "some rows had finished before"
    assert max(calls[25:]) == 2
    assert_same(type(whole).concatenate([yielded[row][0] for row in range(12)]), whole)


def test_a_single_row_that_does_not_fit(random_model, random_prompts):
    model = random_model(seed=1, vocab_size=16)
    prompts = random_prompts(model, [5, 40, 6])
    Memory(model, positions=30)
    with (
        pytest.warns(RuntimeWarning, match="out of memory"),
        pytest.raises(torch.OutOfMemoryError, match=r"single row.*gen_length \(16\).*block_length \(4\).*20.00 GiB"),
    ):
        diffpo.generate(model, prompts, 16, 4, RULE.__class__(1.0))
    with pytest.raises(torch.OutOfMemoryError, match='cache="none"'):
        diffpo.generate(model, prompts[1:2], 16, 4, cache="prefix")


RULES = [
    diffpo.FixedSchedule(8),
    diffpo.ConfidenceThreshold(0.4),
    diffpo.FactorThreshold(1.0),
    diffpo.EntropyBounded(GAMMAS, "margin"),
    diffpo.PromptThreshold(sample=True),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_static_step_equals_the_ordinary_one(
    random_model, random_prompts, decode_with, assert_same, rule, temperature
):
    model = random_model(
        seed=2, scale=0.6, vocab_size=16, threshold_gammas=(0.0, 1.0, 3.0), threshold_reads="both", logit_shift=True
    )
    prompts = random_prompts(model, LENGTHS)
    ordinary = diffpo.generate(model, prompts, 16, 4, rule, temperature, seed=5).trajectory
    for lag, rows in ((0, 12), (1, 5), (3, 3)):
        static = decode_with(static=True, lag=lag)
        assert_same(static(model, prompts, 16, 4, rule, temperature, seed=5, batch_size=rows), ordinary)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_row_that_is_done_keeps_its_place_for_the_lag_alone(random_model, random_prompts, decode_with, seen, lag):
    model = random_model(seed=1, vocab_size=16, eos_token_id=None)
    prompts = random_prompts(model, sorted(LENGTHS, reverse=True))
    for rows in (1, 3, 12):
        shapes = seen(model)
        out = decode_with(static=True, lag=lag)(model, prompts, 16, 4, RULE, batch_size=rows)
        free_at = [0] * rows
        for nfe in out.nfe.tolist():
            free_at.sort()
            free_at[0] += nfe + lag
        assert len(shapes) == max(free_at)


def test_static_shapes_are_few(random_model, random_prompts, decode_with, seen):
    model = random_model(seed=2, vocab_size=16, max_position_embeddings=200)
    prompts = random_prompts(model, [3, 100, 60, 65, 64, 20, 9, 130, 90, 70, 40, 11])
    shapes = seen(model)
    decode_with(static=True, lag=1)(model, prompts, 16, 4, RULE, batch_size=6)
    assert set(shapes) <= {(rows, width + 16) for rows in (1, 2, 4, 6) for width in (64, 128, 130)}


def test_the_static_step_with_guidance(random_model, random_prompts, decode_with, assert_same):
    model = random_model(seed=3, vocab_size=16)
    prompts = random_prompts(model, [4, 9, 2])
    ordinary = diffpo.generate(model, prompts, 8, 4, diffpo.FixedSchedule(4), cfg_scale=1.5).trajectory
    static = decode_with(static=True, lag=1)(model, prompts, 8, 4, diffpo.FixedSchedule(4), cfg_scale=1.5, batch_size=2)
    assert_same(static, ordinary)


def test_the_static_step_names_the_prompts_whose_logits_are_not_finite(random_model, decode_with):
    model = random_model(seed=1)
    with torch.no_grad():
        model.embed_tokens.weight[39] = float("nan")
    prompts = [torch.tensor([3, 4]), torch.tensor([5, 6]), torch.tensor([7, 39]), torch.tensor([8, 9])]
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match=r"1 prompts.*\[2\]"):
            decode_with(static=True, lag=2)(model, prompts, 4, temperature=temperature)


def test_long_blocks_go_through_the_head_in_parts(random_model, random_prompts, assert_same, monkeypatch):
    model = random_model(seed=2, vocab_size=16)
    prompts = random_prompts(model, [4, 9, 2, 7])
    for options in ({"temperature": 1.0}, {"cfg_scale": 1.0}):
        whole = diffpo.generate(model, prompts, 12, 12, diffpo.EntropyBounded(1.0), **options).trajectory
        with monkeypatch.context() as patch:
            patch.setattr("diffpo.decoding.step._LOGITS_AT_ONCE", 5 * 16)
            heads = []
            handle = model.lm_head.register_forward_hook(
                lambda module, arguments, out, heads=heads: heads.append(len(out))
            )
            assert_same(
                diffpo.generate(model, prompts, 12, 12, diffpo.EntropyBounded(1.0), **options).trajectory, whole
            )
            handle.remove()
            assert max(heads) == 5
