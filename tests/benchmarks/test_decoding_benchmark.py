"""The decoding benchmark: nobody is timed whose tokens differ, verdicts follow from numbers, and the whole script on tiny models."""

import json
import time
from dataclasses import replace

import decoding
import pytest
import torch
from decoding_cases import against_loops, cache_error, full_size, plain_loops
from decoding_cases.full_size import Case, Deadline, Row, Variant
from decoding_cases.plain_loops import PlainLoop, Prediction
from decoding_cases.random_models import SHAPES, random_model, random_prompts

import diffpo

CPU = torch.device("cpu")
TINY = against_loops.SMOKE[0]
CEILINGS = {"copy": 1e9, "matmul bfloat16": 1e12}


@pytest.fixture(scope="module")
def model():
    return random_model(SHAPES["tiny"], CPU, torch.float32, seed=0)


@pytest.fixture(scope="module")
def prompts(model):
    return random_prompts(model, TINY.batch, TINY.prompt_length, seed=1)


def prediction(confidence: list[float], step: int = 0) -> Prediction:
    """Of one row; the rest of the probability is on a second token, -1 stands for a position that cannot be committed."""
    p = torch.tensor([confidence])
    candidate = p >= 0
    probability = torch.stack([p.abs(), 1 - p.abs()], dim=-1)
    return Prediction(probability, p.masked_fill(~candidate, -torch.inf), step)


def test_the_rules_of_the_plain_loops():
    fixed = plain_loops.fixed_schedule(steps_per_block=3, block_length=4)
    assert fixed(prediction([0.1, 0.9, 0.3, 0.2]))[0].tolist() == [False, True, True, False]
    assert fixed(prediction([0.1, -1, -1, 0.2], step=1))[0].tolist() == [False, False, False, True]
    threshold = plain_loops.confidence_threshold(0.9)
    assert threshold(prediction([0.95, 0.9, 0.89, 0.99]))[0].tolist() == [True, True, False, True]
    assert threshold(prediction([0.1, -1, 0.3, 0.2]))[0].tolist() == [False, False, True, False]
    p = [0.99, 0.9, 0.6, -1]
    entropy = [-(x * torch.tensor(x).log() + (1 - x) * torch.tensor(1 - x).log()).item() for x in p[:3]]
    for gamma, count in ((0.0, 1), (entropy[0] + 1e-3, 2), (entropy[0] + entropy[1] - 1e-3, 2), (10.0, 4)):
        chosen = plain_loops.entropy_bounded(gamma)(prediction(p))[0, :3]  # the caller leaves out what is no candidate
        assert chosen.sum() == min(count, 3)
        assert chosen[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_plain_loops_decode_our_tokens_and_a_random_model_lets_a_threshold_commit_several_a_step(batch, model):
    case = replace(TINY, batch=batch, gen_length=16, block_length=8, steps=8)
    assert against_loops.verify(case, CPU) == {}
    loop = PlainLoop(plain_loops.confidence_threshold(0.9))
    one = loop(model, random_prompts(model, batch, 7, seed=1), 16, 8)
    assert not (one.tokens == model.mask_id).any()
    assert 2 < one.nfe.float().mean() < 12
    assert one.forwards >= one.nfe.max()


def test_who_decodes_other_tokens_is_not_timed(monkeypatch, model, prompts):
    wrong = plain_loops.fixed_schedule(1, TINY.block_length)  # a whole block in one step
    right = plain_loops.fixed_schedule(2, TINY.block_length)
    contest = against_loops.Contest(
        diffpo.FixedSchedule(4), {"right": PlainLoop(right), "wrong": PlainLoop(wrong)}, {"right": 8}
    )
    monkeypatch.setattr(against_loops, "interleaved_seconds", lambda *_: pytest.fail("timed"))
    rows = {row.contestant: row for row in against_loops.hold(contest, TINY, model, prompts, 0.0)}
    assert rows["wrong"].status.startswith("DIFFERS: ")
    assert rows["wrong"].status.endswith("NFE of 3 of 3 rows")
    assert rows["right"].status == rows["diffpo"].status == "not timed: others of this rule decode other tokens"
    assert all(row.seconds is None and against_loops.failed(row) for row in rows.values())


def test_targets_follow_from_the_times(model, prompts):
    contest = against_loops.contests(TINY)[0]
    rows = {row.contestant: row for row in against_loops.hold(contest, TINY, model, prompts, 0.0)}
    ours = rows["diffpo"]
    assert ours.faster_than == {name: rows[name].seconds / ours.seconds for name in contest.loops}
    assert [target["met"] for target in ours.targets] == [ours.faster_than["reference loop"] >= 8]
    for row in rows.values():
        assert row.rounds == 3
        assert row.tokens_per_second == pytest.approx(TINY.batch * TINY.gen_length / row.seconds)
        assert all(seconds > 0 for seconds in row.parts.values())
    assert not model.lm_head._forward_hooks


def test_a_random_model_never_proposes_the_mask_and_keeps_its_dtype():
    model = random_model(SHAPES["tiny"], CPU, torch.bfloat16, seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert (model.lm_head.weight[model.mask_id] == 0).all()
    again = random_model(SHAPES["tiny"], CPU, torch.bfloat16, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_nothing_is_begun_that_the_deadline_does_not_allow(model):
    case = Case(1, 80, 8, 10, 1, "tiny")
    rows = list(full_size.run(case, model, CEILINGS, Deadline(time.monotonic())))
    assert [row.variant for row in rows] == ["reference loop", *(variant.name for variant in full_size.VARIANTS)]
    assert all(row.status.startswith("left out: ") for row in rows)
    assert not any(map(full_size.failed, rows))
    exact = full_size.expected_seconds(case, "no cache", model, CEILINGS)
    assert exact > full_size.expected_seconds(case, "dual cache", model, CEILINGS)
    assert full_size.expected_seconds(replace(case, length=8000), "no cache", model, CEILINGS) > exact


def test_a_variant_that_raises_is_reported_and_stops_nobody(monkeypatch, model):
    def raising(*_):
        raise torch.OutOfMemoryError("no more\nof it")

    monkeypatch.setattr(full_size, "_reference", raising)
    rows = list(full_size.run(Case(1, 80, 8, 10, 1, "tiny"), model, CEILINGS, Deadline(time.monotonic() + 60)))
    assert rows[0].status == "FAILED: OutOfMemoryError: no more"
    assert not full_size.failed(rows[0]), "the reference loop's lack of memory is its own"
    exact = next(row for row in rows if row.variant == "no cache")
    assert exact.status == "ok"
    assert exact.faster_than_reference is None
    monkeypatch.setattr(full_size, "_measure", raising)
    rows = full_size.run(Case(1, 80, 8, 10, 1, "tiny"), model, CEILINGS, Deadline(time.monotonic() + 60))
    assert any(map(full_size.failed, rows))


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_reference_loop_is_warmed_up_where_ours_is(monkeypatch, model, repeats):
    """In one call each; and neither counts the warm-up."""
    calls, clocked = [], []
    monkeypatch.setattr(full_size.PlainLoop, "__call__", lambda self, *_: calls.append("reference"))
    monkeypatch.setattr(full_size, "generate", lambda *_, **__: calls.append("ours"))
    monkeypatch.setattr(full_size, "_wall", lambda call, _: (clocked.append(len(calls)), call(), float(len(calls)))[2])
    for name in ("transformer_seconds", "device_seconds"):
        monkeypatch.setattr(full_size, name, lambda *_: 1.0)
    case = Case(1, 80, 8, 10, repeats, "tiny")
    full_size._reference(case, model, Row("", "reference loop"))
    full_size._measure(case, Variant("no cache"), CEILINGS, model, Row("", "no cache"))
    warm = int(repeats > 1)
    assert calls == ["reference"] * (warm + 1) + ["ours"] * (warm + 2 * repeats)
    assert clocked == [warm, *range(2 * warm + 1, len(calls))]


def test_a_step_is_the_difference_of_two_calls(monkeypatch, model):
    seconds = iter([1.0 + 8 * 0.1, 1.0 + 10 * 0.1])  # a second that every call pays
    monkeypatch.setattr(full_size, "_wall", lambda call, _: (call(), next(seconds))[1])
    monkeypatch.setattr(full_size, "transformer_seconds", lambda *_: 0.096)
    monkeypatch.setattr(full_size, "device_seconds", lambda *_: 0.001)
    row = Row("", "no cache")
    full_size._measure(Case(1, 80, 8, 10, 1, "tiny"), Variant("no cache"), CEILINGS, model, row)
    assert row.step_seconds == pytest.approx(0.1)
    assert row.tokens_per_second == pytest.approx(64 / 2.0)
    assert row.outside_transformer == pytest.approx(0.04)
    assert row.outside_transformer_and_head == pytest.approx(0.03)
    full_size._compare(row, Row("", "reference loop", tokens_per_second=4.0), Case(1, 80, 8, 10, 1, "tiny"))
    assert row.faster_than_reference == pytest.approx(8.0)
    assert [target["met"] for target in row.targets] == [True]


def test_divergence_finds_the_difference_between_rollout_and_exact_log_probs():
    model = diffpo.load("tiny-sudoku")
    prompts = torch.randint(0, model.mask_id, (20, 5), generator=torch.Generator().manual_seed(0))
    path = diffpo.generate(model, prompts, 8, 4, diffpo.EntropyBounded(0.5), temperature=1.0).trajectory
    value, error = cache_error.divergence(model, path)
    assert abs(value) < 1e-5
    assert error < 1e-5
    moved = replace(path, logprob=torch.where(path.committed, path.logprob + 0.25, 0.0))
    assert cache_error.divergence(model, moved)[0] == pytest.approx(0.25, abs=1e-4)


def test_a_run_that_is_stopped_leaves_the_rows_it_has(tmp_path):
    report = decoding.Report(decoding.Console(quiet=True), tmp_path / "new/out.json", {"seed": 0})
    report.add("full_size", [Row("a", "no cache", status="left out")])
    report.write(("full_size", [Row("b", "reference loop", status="FAILED")]))
    written = json.loads((tmp_path / "new/out.json").read_text())
    assert [row["case"] for row in written["full_size"]] == ["a", "b"]
    report.add("full_size", [])
    assert len(json.loads((tmp_path / "new/out.json").read_text())["full_size"]) == 1


def test_the_whole_program_on_tiny_models(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr(decoding.measure, "ceilings", lambda *_: CEILINGS)  # seconds of work on a CPU
    assert decoding.main(["--device", "cpu", "--smoke", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert {"against_loops", "cache_error", "full_size"} == written["method"].keys()
    assert all(row["status"] == "ok" and row["seconds"] > 0 for row in written["against_loops"])
    checks = [row for row in written["cache_error"] if row["cache"] == "none"]
    assert len(checks) == 2
    assert all(row["equal_tokens"] == 1 and abs(row["kl"]) < 1e-5 for row in checks)
    measured = {row["variant"]: row for row in written["full_size"] if row["status"] == "ok"}
    assert {"reference loop", "no cache"} <= measured.keys()
    assert measured["no cache"]["faster_than_reference"] > 0
    assert written["run"]["same_tokens_as_plain_loops"] is True
    assert "NFE" in capsys.readouterr().out


def test_cuda_without_a_gpu_is_an_error(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        decoding.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
