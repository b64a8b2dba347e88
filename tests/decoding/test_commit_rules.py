"""The adaptive rules against a loop that decodes one unpadded prompt at a time, in Python."""

import math
from typing import NamedTuple

import pytest
import torch

import diffpo
from diffpo.decoding.step import _guided

MASK, EOS = 2, 1


class Row(NamedTuple):
    tokens: list[int]
    commit_step: list[int]
    logprob: list[float]
    nfe: int
    length: int


def decode_alone(model, prompt, gen_length, block_length, choose, cfg_scale=0.0) -> Row:
    """Greedy decoding of one prompt; ``choose(probabilities [n, V])`` names the masked positions of the block to commit."""
    tokens, commit_step, logprob = [MASK] * gen_length, [0] * gen_length, [0.0] * gen_length
    nfe = 0
    while True:
        known = tokens.index(MASK) if MASK in tokens else gen_length
        if known == gen_length or (model.config.eos_token_id is not None and EOS in tokens[:known]):
            break
        block = known // block_length
        masked = [i for i in range(block * block_length, (block + 1) * block_length) if tokens[i] == MASK]
        logits = model.logits(torch.cat([prompt, torch.tensor(tokens)])[None])[0, len(prompt) :]
        if cfg_scale:
            masked_prompt = torch.full_like(prompt, MASK)
            without = model.logits(torch.cat([masked_prompt, torch.tensor(tokens)])[None])[0, len(prompt) :]
            logits = without + (cfg_scale + 1) * (logits - without)
        logits = logits.double()
        logits[:, MASK] = -math.inf
        nfe += 1
        for n in choose(logits[masked].softmax(dim=1)):
            position = masked[n]
            tokens[position] = int(logits[position].argmax())
            commit_step[position] = nfe
            logprob[position] = logits[position].log_softmax(0).max().item()
    tokens = [EOS if token == MASK else token for token in tokens]
    length = tokens.index(EOS) + 1 if EOS in tokens else gen_length
    return Row(tokens, commit_step, logprob, nfe, length)


def entropy_bounded(gamma, order):
    def choose(p_NV):
        rows = p_NV.tolist()
        entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in rows]
        top = [sorted(row, reverse=True)[:2] for row in rows]
        error = {
            "entropy": entropy,
            "confidence": [-first for first, _ in top],
            "margin": [second - first for first, second in top],
        }[order]
        by_error = sorted(range(len(rows)), key=lambda n: error[n])
        chosen = by_error[:1]
        for n in by_error[1:]:
            costs = [entropy[k] for k in [*chosen, n]]
            if sum(costs) - max(costs) > gamma:
                break
            chosen.append(n)
        return chosen

    return choose


def above(p):
    def choose(p_NV):
        best = p_NV.max(dim=1).values.tolist()
        return {n for n, value in enumerate(best) if value >= p} | {best.index(max(best))}

    return choose


def by_factor(factor):
    def choose(p_NV):
        best = p_NV.max(dim=1).values.tolist()
        order = sorted(range(len(best)), key=lambda n: -best[n])
        chosen = order[:1]
        for rank, n in enumerate(order[1:], start=2):
            if best[n] < 1 - factor / (rank + 1):
                break
            chosen.append(n)
        return chosen

    return choose


def assert_equals_rows(out, rows):
    trajectory = out.trajectory
    assert out.tokens.tolist() == [row.tokens for row in rows]
    assert trajectory.commit_step.tolist() == [row.commit_step for row in rows]
    assert out.nfe.tolist() == [row.nfe for row in rows]
    assert trajectory.length.tolist() == [row.length for row in rows]
    torch.testing.assert_close(trajectory.logprob, torch.tensor([row.logprob for row in rows]), rtol=1e-4, atol=1e-5)
    assert trajectory.logprob.dtype == torch.float32


SHAPES = [([6, 6, 6], 12, 12), ([2, 9, 5, 1], 12, 4), ([8, 3], 10, 5), ([4, 7, 4], 6, 1)]


@pytest.mark.parametrize("order", ["entropy", "confidence", "margin"])
@pytest.mark.parametrize(("lengths", "gen_length", "block_length"), SHAPES)
def test_entropy_bounded(random_model, random_prompts, order, lengths, gen_length, block_length):
    several_at_once = 0
    for seed, gamma in enumerate((0.0, 0.1, 0.7, 2.5, 8.0, math.inf)):
        changes = {"logit_shift": seed % 2 == 1, "num_key_value_heads": 2 if seed % 3 == 0 else 4, "vocab_size": 14}
        model = random_model(seed=seed, **changes)
        prompts = random_prompts(model, lengths, seed)
        rows = [decode_alone(model, p, gen_length, block_length, entropy_bounded(gamma, order)) for p in prompts]
        out = diffpo.generate(model, prompts, gen_length, block_length, diffpo.EntropyBounded(gamma, order))
        assert_equals_rows(out, rows)
        assert torch.equal(out.trajectory.gamma, torch.full((len(lengths),), gamma))
        several_at_once += sum(row.nfe < sum(step > 0 for step in row.commit_step) for row in rows)
    assert several_at_once > 0 or block_length == 1


@pytest.mark.parametrize("order", ["entropy", "confidence", "margin"])
def test_one_gamma_per_row(random_model, random_prompts, order):
    model = random_model(seed=9, scale=0.6)
    prompts = random_prompts(model, [5, 2, 7, 5, 5, 3])
    gammas = [0.0, 0.3, 1.0, 3.0, 6.0, math.inf]
    rows = [decode_alone(model, p, 16, 8, entropy_bounded(g, order)) for p, g in zip(prompts, gammas, strict=True)]
    assert len({row.nfe for row in rows}) >= 4, "the rows should be in different blocks at the same time"
    out = diffpo.generate(model, prompts, 16, 8, diffpo.EntropyBounded(torch.tensor(gammas), order))
    assert_equals_rows(out, rows)
    assert torch.equal(out.trajectory.gamma, torch.tensor(gammas))
    # the thresholds follow their prompts into the batches
    split = diffpo.generate(model, prompts, 16, 8, diffpo.EntropyBounded(torch.tensor(gammas), order), batch_size=4)
    assert_equals_rows(split, rows)


def test_gamma_zero_is_one_token_a_step_and_infinity_one_step_a_block(random_model, random_prompts):
    model = random_model(seed=1, eos_token_id=None)
    prompts = random_prompts(model, [4, 6])
    one = diffpo.generate(model, prompts, 12, 4, diffpo.EntropyBounded(0.0, "confidence"))
    assert one.nfe.tolist() == [12, 12]
    assert torch.equal(one.tokens, diffpo.generate(model, prompts, 12, 4, diffpo.FixedSchedule(12)).tokens)
    all_at_once = diffpo.generate(model, prompts, 12, 4, diffpo.EntropyBounded(math.inf))
    assert all_at_once.nfe.tolist() == [3, 3]
    assert torch.equal(all_at_once.tokens, diffpo.generate(model, prompts, 12, 4, diffpo.FixedSchedule(3)).tokens)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(("lengths", "gen_length", "block_length"), SHAPES)
def test_confidence_threshold(random_model, random_prompts, p, lengths, gen_length, block_length):
    for seed in range(2):
        model = random_model(seed=seed, vocab_size=14, logit_shift=seed == 1)
        prompts = random_prompts(model, lengths, seed)
        rows = [decode_alone(model, prompt, gen_length, block_length, above(p)) for prompt in prompts]
        out = diffpo.generate(model, prompts, gen_length, block_length, diffpo.ConfidenceThreshold(p))
        assert_equals_rows(out, rows)
        assert out.trajectory.gamma.isnan().all()
        assert out.trajectory.actions == {}


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.7, 3.0, math.inf])
@pytest.mark.parametrize(("lengths", "gen_length", "block_length"), SHAPES)
def test_factor_threshold(random_model, random_prompts, factor, lengths, gen_length, block_length):
    for seed in range(2):
        model = random_model(seed=seed, vocab_size=14, logit_shift=seed == 1)
        prompts = random_prompts(model, lengths, seed)
        rows = [decode_alone(model, prompt, gen_length, block_length, by_factor(factor)) for prompt in prompts]
        out = diffpo.generate(model, prompts, gen_length, block_length, diffpo.FactorThreshold(factor))
        assert_equals_rows(out, rows)
        assert out.trajectory.gamma.isnan().all()


def test_a_larger_factor_commits_no_less(random_model, random_prompts):
    model = random_model(seed=1, eos_token_id=None)
    prompts = random_prompts(model, [4, 6, 5])
    factors = (0.0, 0.5, 1.0, 2.0, math.inf)
    spent = [diffpo.generate(model, prompts, 12, 6, diffpo.FactorThreshold(f)).nfe.sum().item() for f in factors]
    assert spent == sorted(spent, reverse=True)
    assert (spent[0], spent[-1]) == (36, 6)
    assert len(set(spent)) >= 3


def test_confidence_threshold_defaults_to_nine_tenths():
    assert diffpo.ConfidenceThreshold().p == 0.9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_early_stop_at_the_first_eos(random_model, random_prompts, temperature):
    model = random_model(seed=2, scale=0.5, vocab_size=7)
    prompts = random_prompts(model, [4] * 60)
    out = diffpo.generate(model, prompts, 12, 6, diffpo.EntropyBounded(2.0), temperature=temperature, seed=3)
    trajectory = out.trajectory
    stopped = 0
    for tokens, steps, logprob, nfe, length in zip(
        out.tokens.tolist(), trajectory.commit_step.tolist(), trajectory.logprob.tolist(), out.nfe.tolist(),
        trajectory.length.tolist(), strict=True,
    ):  # fmt: skip
        never = [i for i in range(12) if steps[i] == 0]
        stopped += bool(never)
        assert nfe == max(steps)
        assert set(steps) - {0} == set(range(1, nfe + 1)), "every step commits something"
        assert length == (tokens.index(EOS) + 1 if EOS in tokens else 12)
        assert 0 not in steps[:length], "all up to the first EOS is committed"
        assert all(tokens[i] == EOS and logprob[i] == 0 and i >= length for i in never)
        assert MASK not in tokens
        if never:
            # not a step too many: before the last step something ahead of the final EOS was still masked
            assert nfe == max(steps[:length])
    assert 5 < stopped < 60
    assert torch.equal(trajectory.committed, trajectory.commit_step > 0)
    counts = trajectory.scored.sum(dim=1)
    assert torch.equal(counts, trajectory.length)


def test_without_an_eos_id_nothing_stops_early(random_model, random_prompts):
    model = random_model(seed=2, vocab_size=7, eos_token_id=None)
    out = diffpo.generate(model, random_prompts(model, [4] * 10), 12, 6, diffpo.EntropyBounded(2.0))
    assert (out.tokens == 1).any()
    assert (out.trajectory.commit_step > 0).all()
    assert (out.trajectory.length == 12).all()


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_finished_rows_cost_nothing(random_model, random_prompts, forward_rows, cfg_scale):
    model = random_model(seed=2, vocab_size=7)
    prompts = random_prompts(model, [6, 5, 7] * 10)
    assert len({tuple(prompt.tolist()) for prompt in prompts}) == 30, "equal prompts would share evaluations"
    with forward_rows(model) as rows:
        out = diffpo.generate(model, prompts, 12, 6, diffpo.EntropyBounded(1.0), cfg_scale=cfg_scale)
    assert len(out.nfe.unique()) > 2
    conditional, unconditional = (rows[::2], rows[1::2]) if cfg_scale else (rows, [])
    assert conditional == [int((out.nfe > step).sum()) for step in range(int(out.nfe.max()))]
    # prompts of equal length are equal once they are masked
    assert all(guide <= row for guide, row in zip(unconditional, conditional, strict=bool(cfg_scale)))


def test_latents_are_the_states_the_network_saw(random_model, random_prompts):
    model = random_model(seed=4, vocab_size=10)
    prompts = torch.stack(random_prompts(model, [5] * 6))
    seen = []
    handle = model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    out = diffpo.generate(model, prompts, 12, 4, diffpo.EntropyBounded(1.0), temperature=1.0)
    handle.remove()
    for step, sequences in enumerate(seen):
        running = out.nfe > step
        expected = torch.cat([prompts, out.trajectory.latent(step)], dim=1)[running]
        assert torch.equal(expected.unique(dim=0), sequences.unique(dim=0))
    final = out.trajectory.latent(out.nfe)
    assert torch.equal(final, torch.where(out.trajectory.commit_step > 0, out.tokens, MASK))
    mixed = out.trajectory.latent(torch.tensor([0, 1, 2, 0, 1, 2]))
    for row, tau in enumerate([0, 1, 2, 0, 1, 2]):
        assert torch.equal(mixed[row], out.trajectory.latent(tau)[row])


def fixed(count):
    def choose(p_NV):
        best = p_NV.max(dim=1).values.tolist()
        return sorted(range(len(best)), key=lambda n: -best[n])[:count]

    return choose


SURE = [
    (diffpo.FixedSchedule(6), fixed(2)),
    (diffpo.ConfidenceThreshold(1), above(1)),
    (diffpo.ConfidenceThreshold(1 - 1e-9), above(1 - 1e-9)),
    (diffpo.ConfidenceThreshold(0.9999), above(0.9999)),
    (diffpo.FactorThreshold(1e-9), by_factor(1e-9)),
    (diffpo.FactorThreshold(1e-4), by_factor(1e-4)),
    (diffpo.EntropyBounded(1e-7, "confidence"), entropy_bounded(1e-7, "confidence")),
    (diffpo.EntropyBounded(1e-7, "margin"), entropy_bounded(1e-7, "margin")),
    (diffpo.EntropyBounded(1e-12), entropy_bounded(1e-12, "entropy")),
]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize(
    ("rule", "choose"), SURE, ids=lambda value: repr(value) if isinstance(value, diffpo.Rule) else ""
)
def test_sure_models_commit_in_the_order_of_float64(random_model, random_prompts, rule, choose, cfg_scale):
    """Logits in the tens and hundreds, where in float32 most confidences are 1."""
    for seed, scale in enumerate((4.0, 8.0, 20.0)):
        model = random_model(seed=seed, scale=scale, vocab_size=14, eos_token_id=None)
        prompts = random_prompts(model, [6, 3, 8], seed)
        rows = [decode_alone(model, prompt, 12, 12, choose, cfg_scale) for prompt in prompts]
        out = diffpo.generate(model, prompts, 12, 12, rule, cfg_scale=cfg_scale)
        assert out.tokens.tolist() == [row.tokens for row in rows]
        assert out.trajectory.commit_step.tolist() == [row.commit_step for row in rows]


class Watched(diffpo.EntropyBounded):
    """Keeps the first step's predictions."""

    def __init__(self, gamma, order):
        super().__init__(gamma, order)
        self.step = None

    def plan(self, step):
        self.step = self.step or step
        return super().plan(step)


SURE_ROWS = {
    "reported": [[104, 91.38, -50, -50], [104, 91, -50, -50]],
    "at 1e4": [[1e4, 9985, 9980, -1e4], [1e4, 9984, 9983.5, 9000]],
    "at -1e4": [[-1e4, -10018, -2e4, -10030], [-1e4, -10019, -10021, -10021]],
    "with impossible tokens": [[-math.inf, 7, -9.5, -math.inf], [30, -math.inf, -math.inf, 13]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("logits", SURE_ROWS.values(), ids=SURE_ROWS.keys())
def test_the_surest_position_goes_first(random_model, monkeypatch, logits, dtype):
    model = random_model(vocab_size=7, eos_token_id=None)
    table_LV = torch.full((2, 7), -math.inf, dtype=dtype)
    table_LV[:, 3:] = torch.tensor(logits).to(dtype)
    table_LV[:, MASK] = 2e4  # never proposed, and in no sum
    monkeypatch.setattr(model, "head", lambda hidden_ND: table_LV)
    exact_LV = table_LV.double().index_fill(1, torch.tensor(MASK), -math.inf)
    weights_LV = (exact_LV - exact_LV.amax(dim=1, keepdim=True)).exp()
    odds = weights_LV.scatter(1, weights_LV.argmax(dim=1, keepdim=True), 0.0).sum(dim=1).tolist()
    for name in ("confidence", "margin", "entropy"):
        rule = Watched(math.inf, name)
        out = diffpo.generate(model, torch.tensor([[4]]), 2, rule=rule)
        assert out.tokens.tolist() == exact_LV.argmax(dim=1)[None].tolist()
        assert rule.step.odds[0].tolist() == pytest.approx(odds, rel=4e-6, abs=0)
        assert rule.step.confidence[0].tolist() == pytest.approx([1 / (1 + o) for o in odds], rel=1e-7)
        order = rule.step.order(name)[0].argsort(stable=True).tolist()
        assert order == sorted(range(2), key=lambda n: odds[n])
    if max(odds) > 1e-15:
        plan = diffpo.ConfidenceThreshold(1).plan(rule.step)
        assert plan.budget.tolist() == [0.0], "one position: none is certain"


def test_ties_of_float64_go_to_the_left(random_model, monkeypatch):
    model = random_model(vocab_size=7, eos_token_id=None)
    table_LV = torch.tensor([[0.0] * 7, [0.0] * 7])
    table_LV[0, 4], table_LV[1, 5] = 41.0, 80.0  # both 1 in float64
    monkeypatch.setattr(model, "head", lambda hidden_ND: table_LV[-len(hidden_ND) :])
    one_by_one = diffpo.generate(model, torch.tensor([[4]]), 2, rule=diffpo.FixedSchedule(2))
    assert one_by_one.trajectory.commit_step.tolist() == [[1, 2]]
    for rule in (diffpo.ConfidenceThreshold(1), diffpo.FactorThreshold(0)):
        assert diffpo.generate(model, torch.tensor([[4]]), 2, rule=rule).nfe.tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 1e30, 1e300])
def test_extreme_temperatures(random_model, random_prompts, temperature):
    model = random_model(seed=3, scale=20.0, eos_token_id=None)
    prompts = random_prompts(model, [4] * 40)
    out = diffpo.generate(model, prompts, 6, rule=diffpo.ConfidenceThreshold(0.5), temperature=temperature)
    assert out.trajectory.logprob.isfinite().all()
    assert not (out.tokens == MASK).any()
    if temperature < 1:
        greedy = diffpo.generate(model, prompts, 6, rule=diffpo.ConfidenceThreshold(0.5))
        assert torch.equal(out.tokens, greedy.tokens)
    else:
        assert out.trajectory.logprob.unique().tolist() == pytest.approx([-math.log(39)])
        assert torch.bincount(out.tokens.flatten(), minlength=40).max() < 30


def test_the_mask_token_is_never_proposed(random_model, random_prompts):
    """Not even where the model prefers it, at any temperature."""
    model = random_model(seed=5, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 0
        model.lm_head.weight *= 0.01  # all nearly equal
        model.lm_head.weight[MASK] = 50 * model.norm(model.embed_tokens.weight).mean(dim=0)
    prompts = random_prompts(model, [4] * 20)
    for temperature in (0.0, 1.0, 50.0):
        out = diffpo.generate(model, prompts, 8, rule=diffpo.FixedSchedule(2), temperature=temperature)
        assert not (out.tokens == MASK).any()


def test_guidance_leaves_float16_its_range_and_keeps_impossible_tokens_impossible():
    conditional = torch.tensor([[3e4, -2e4, -math.inf, 10.0]], dtype=torch.float16)
    unconditional = torch.tensor([[-1e4, 0.0, -math.inf, 9.5]], dtype=torch.float16)
    guided = _guided(conditional, unconditional, 1.5)
    assert guided.tolist() == [[9e4, -5e4, -math.inf, 10.75]]
    bfloat16 = _guided(conditional.bfloat16(), unconditional.bfloat16(), 1.5)
    assert bfloat16.dtype == torch.bfloat16


def test_guidance_beyond_float32_is_named(random_model, random_prompts):
    model = random_model(seed=5)
    with pytest.raises(FloatingPointError, match=r"logits, guided with cfg_scale 1e\+38, are NaN or infinite"):
        diffpo.generate(model, random_prompts(model, [4, 6]), 8, cfg_scale=1e38)
