"""The benchmark of an update: both sides have one gradient, memory is that of a fresh process, and the whole program at tiny sizes."""

import json
import os
from dataclasses import replace

import likelihood
import pytest
import torch
from likelihood_cases import peak_memory, plain_update
from likelihood_cases.updates import Case, model_of, rollouts, with_behaviour

TINY = replace(likelihood.ONE_GROUP, **likelihood.SMOKE)


@pytest.fixture
def case():
    model = model_of(TINY)
    return Case(TINY, with_behaviour(TINY, model, rollouts(TINY, model)), model)


@pytest.fixture
def in_this_process(monkeypatch):
    """A start of an interpreter for each measurement is what takes time. Here nothing new may be needed: then it is a byte."""
    monkeypatch.setattr(peak_memory, "in_fresh_process", lambda function, *arguments: function(*arguments) or 1)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("samples", [8, 3, 1])
def test_the_plain_update_has_our_gradient(case, later, samples):
    assert likelihood.gap(case, case.ours(later), case.plain(later, samples)) < 1e-5
    loss, found, gradient = case.gradient(case.ours(later))
    assert loss.abs() > 1e-3
    assert max(value.abs().max() for value in gradient.values()) > 1e-3
    assert (found["clip_fraction"] > 0) == later, "the weights moved in between"


def test_a_difference_is_found(case, monkeypatch):
    monkeypatch.setattr(plain_update, "WEIGHT_CAP", 1.5)
    assert likelihood.gap(case, case.ours(), case.plain()) > likelihood.TOLERANCE


def test_a_later_update_leaves_the_weights_alone(case):
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    case.ours(later=True)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def allocate(megabytes: int) -> tuple[int, int]:
    return os.getpid(), peak_memory.of_call(lambda: torch.ones(megabytes << 18).sum())


def test_the_peak_is_that_of_a_fresh_process():
    """Whatever this one has used before."""
    torch.ones(256 << 18)
    process, peak = peak_memory.in_fresh_process(allocate, 64)
    assert process != os.getpid()
    assert 60 << 20 < peak < 80 << 20


def test_the_whole_program_at_tiny_sizes(in_this_process, tmp_path, capsys):
    out = tmp_path / "likelihood.json"
    assert likelihood.main(["--smoke", "--rounds", "2", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [row["variant"] for row in document["update"]] == [*likelihood.VARIANTS] * 2
    assert all(len(row["times"]) == 2 and row["peak_bytes"] > 0 for row in document["update"])
    assert [row["rollouts"] for row in document["rollouts"]] == [8, 16]
    assert [row["latents"] for row in document["exact"]] == ["one part", "every step"]
    assert len(document["targets"]) == 4
    assert document["run"]["versions"]["torch"]
    assert "twice as fast" in capsys.readouterr().out


def test_targets_follow_from_the_numbers():
    rows = [
        {"update": update, "variant": name, "times_ours": times, "peak_bytes": peak}
        for update in ("first", "later")
        for name, times, peak in ((likelihood.OURS, 1.0, 40), (likelihood.BASELINE, 3.0, 100))
    ]
    sections = {
        "update": rows,
        "rollouts": [{"peak_bytes": peak} for peak in (100, 130)],
        "exact": [{"peak_bytes": peak} for peak in (100, 110)],
    }
    assert [target["met"] for target in likelihood.judge(sections)] == [True, True, False, True]
    rows[1]["times_ours"] = 1.9
    assert not likelihood.judge(sections)[0]["met"]
