"""The kernel benchmark: its checks find wrong results, its verdicts follow from its numbers, and the whole script on tiny inputs."""

import functools
import json
import math
from types import SimpleNamespace

import kernels
import pytest
import torch
from kernel_cases import (
    cases,
    entropy_bounded_commit,
    linear_logprob,
    measure,
    row_statistics,
    skinny_linear,
    surrogate_loss,
)
from kernel_cases.case import (
    Case,
    Contestant,
    Result,
    Workload,
    at_most_times,
    errors_of,
    faster_than,
    share_at_least,
    too_large,
)

from diffpo_kernels import backends
from diffpo_kernels import row_statistics as operator

CPU = torch.device("cpu")
CEILINGS = {"copy": 1e9, "matmul float32": 1e10, "matmul bfloat16": 1e10}
TINY = {
    "row_statistics, greedy": functools.partial(row_statistics.build, 5, 700, torch.bfloat16, 0.0),
    "row_statistics, drawn": functools.partial(row_statistics.build, 5, 700, torch.float32, 0.7),
    "entropy_bounded_commit_": functools.partial(entropy_bounded_commit.build, 6, 40, 8, False),
    "entropy_bounded_commit_, all records": functools.partial(entropy_bounded_commit.build, 6, 40, 2, True),
    "linear_logprob, forward": functools.partial(linear_logprob.build, 7, 90, 8, torch.float32, linear_logprob.FORWARD),
    "linear_logprob": functools.partial(linear_logprob.build, 7, 90, 8, torch.bfloat16, linear_logprob.BACKWARD),
    "linear_logprob, entropy": functools.partial(linear_logprob.build, 7, 90, 8, torch.float32, linear_logprob.ENTROPY),
    "surrogate_loss": functools.partial(surrogate_loss.build, 4, 9),
    "skinny_linear": functools.partial(skinny_linear.build, 5, 90, 8, torch.float32),
}


def run(build, targets=(), seconds=0.001) -> dict[str, Result]:
    case = Case("tiny", build, targets)
    results = kernels.run_case(case, measure.Clock(CPU), CEILINGS, seconds, kernels.CompileBudget(0.0))
    return {result.contestant: result for result in results}


@pytest.mark.parametrize("build", TINY.values(), ids=TINY)
def test_everyone_runs_and_every_backend_passes(build):
    results = run(build)
    usable = {name for name in backends.BACKENDS if name in results and results[name].errors is not None}
    assert "reference" in usable
    for name, result in results.items():
        assert not kernels.failed(result), result.status
        assert (result.seconds is not None) == (result.status == "ok"), name
        assert result.status.startswith(("ok", "missing: ", "left out: ")), result.status
    assert results["torch.compile"].status.startswith("left out")
    assert all(results[name].extra_bytes >= 0 for name in usable)


def test_errors_of_row_statistics_find_each_wrong_output():
    random = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(4, 50, generator=random)
    log_p_NV, uniform_N = logits_NV.double().log_softmax(1), torch.rand(4, generator=random)
    for temperature, u_N in ((0.0, None), (0.7, uniform_N)):
        good = operator(logits_NV, temperature, u_N, backend="reference")
        allowed = row_statistics.errors(good, log_p_NV, logits_NV, temperature, u_N)
        assert too_large(allowed, allowed) == []
        wrong = {name: getattr(good, name) * 1.001 for name in ("logprob", "entropy", "top1", "top2", "lse")}
        wrong |= {"token": (good.token + 1) % 50, "valid": ~good.valid}
        for name, value in wrong.items():
            found = row_statistics.errors(good._replace(**{name: value}), log_p_NV, logits_NV, temperature, u_N)
            assert too_large(found, allowed), name


def test_errors_of_linear_logprob_find_gradients_for_an_upstream_of_ones():
    inputs = linear_logprob.draw(7, 90, 8, torch.float32, CPU)
    for mode in (linear_logprob.BACKWARD, linear_logprob.ENTROPY):
        truth = linear_logprob.Truth(inputs, mode)
        allowed = truth.errors(linear_logprob.ours(inputs, mode, "reference"))
        assert max(allowed.values()) < 1e-5
        ones = torch.ones(7)
        other = linear_logprob.Inputs(inputs.hidden, inputs.head, inputs.target, ones, ones)
        wrong = too_large(truth.errors(linear_logprob.ours(other, mode, "reference")), allowed)
        gradients = ["gradient of hidden", "max gradient of hidden", "gradient of head", "max gradient of head"]
        assert [line.partition(":")[0] for line in wrong] == gradients


def test_truth_of_linear_logprob_is_the_same_over_several_blocks_of_the_vocabulary():
    mode = linear_logprob.ENTROPY
    inputs = linear_logprob.draw(3, 20000, 4, torch.float64, CPU)  # more than two blocks
    truth = linear_logprob.Truth(inputs, mode)
    assert max(truth.errors(linear_logprob.ours(inputs, mode, "reference")).values()) < 1e-12


def test_a_wrong_backend_is_reported_and_not_timed_and_stops_nobody():
    calls = []

    def raising():
        raise RuntimeError("no such kernel\nand a trace")

    contestants = [
        Contestant("reference", lambda: calls.append("reference"), lambda: {"loss": 1e-3}),
        Contestant("native", lambda: calls.append("native"), lambda: {"loss": 2e-3}),
        Contestant("triton", lambda: calls.append("triton"), lambda: {"loss": math.nan}),
        Contestant("cuda", lambda: calls.append("cuda"), raising),
        Contestant("rival", raising),
        Contestant("eager", lambda: calls.append("eager")),
    ]
    results = run(lambda device: Workload(contestants, {"liger": "absent"}, lambda: {"loss": 1e-3}, bytes=8))
    assert set(calls) == {"reference", "eager"}
    assert results["native"].status == "WRONG, not timed: loss: 0.002, allowed 0.00111"
    assert results["triton"].status.startswith("WRONG, not timed: loss: nan")
    assert results["cuda"].status == results["rival"].status == "FAILED: RuntimeError: no such kernel"
    assert results["liger"].status == "missing: absent"
    assert [name for name, result in results.items() if kernels.failed(result)] == ["native", "triton", "cuda"]


def test_a_baseline_that_takes_too_long_is_called_once(monkeypatch):
    monkeypatch.setitem(kernels._PATIENCE, "cpu", 0.0)
    calls = []
    contestants = [
        Contestant("reference", lambda: None, lambda: {"loss": 0.0}),
        Contestant("slow", lambda: calls.append("slow")),
    ]
    results = run(lambda device: Workload(contestants, {}, lambda: {"loss": 0.0}, bytes=8))
    assert calls == ["slow"]
    assert results["slow"].status.startswith("left out: the first call took")


def test_one_bad_element_in_a_million_is_found():
    torch_errors = errors_of("gradient of head", torch.full((10**6,), 1e-3))
    difference = torch.full((10**6,), 1e-3)
    assert too_large(errors_of("gradient of head", difference), torch_errors) == []
    difference[7] = 0.1
    assert too_large(errors_of("gradient of head", difference), torch_errors) == [
        "max gradient of head: 0.1, allowed 0.0081"
    ]


def test_wrong_entries_have_no_room():
    assert too_large({"wrong tokens": 1}, {"wrong tokens": 1})
    assert not too_large({"wrong tokens": 0, "loss": 1.0e-5}, {"wrong tokens": 0, "loss": 0.0})


def test_rates_ratios_and_targets_follow_from_the_times():
    def result(name: str, seconds: float | None, backend: bool = True) -> Result:
        return Result(name, backend, seconds=seconds)

    results = [result("native", 0.5), result("reference", 4.0), result("eager", 2.0, False), result("absent", None)]
    targets = (faster_than("eager", 4), faster_than("eager", 5), faster_than("absent", 2), at_most_times("eager", 0.3))
    case = Case("", lambda device: None, (*targets, share_at_least(0.5)))
    workload = Workload([], {}, dict, bytes=10**8, flops=2 * 10**9)
    kernels.judge(case, workload, results, CEILINGS)
    native, reference, *_, absent = results
    assert (native.bound, native.share, native.flops_per_second) == ("matmul float32", pytest.approx(0.4), 4e9)
    assert native.ratios == {"reference": 8.0, "eager": 4.0}
    assert native.wall_ratios == {}
    assert [target["met"] for target in native.targets] == [True, False, None, True, False]
    assert reference.targets == absent.targets == []


def test_extra_memory_leaves_out_inputs_and_results():
    mebibyte = torch.ones(2**18)
    for call, expected in (
        (lambda: mebibyte + 1, 0),
        (lambda: (mebibyte + 1) * 2, 2**20),
        (lambda: torch.cat([mebibyte + 1, mebibyte * 2]), 2**21),
    ):
        assert measure.extra_bytes(call, CPU) == pytest.approx(expected, abs=64)  # the numbers are tensors too


def test_peak_of_temporaries():
    kept, first, second = (1, 100), (2, 10), (3, 5)
    freed = [(2, -10), (3, -5)]
    assert measure.peak_of_temporaries([kept, first, second, *freed]) == 15
    assert measure.peak_of_temporaries([first, freed[0], second, freed[1], kept]) == 10
    assert measure.peak_of_temporaries([first, freed[0], (2, 10), (9, -7)]) == 10, (
        "an address used again, and one from before"
    )
    assert measure.peak_of_temporaries([]) == 0


def test_slow_calls_get_fewer_rounds():
    class Fixed:
        def seconds(self, call):
            return call()

    times = measure.interleaved_seconds({"slow": lambda: 9.0, "fast": lambda: 0.01}, Fixed(), budget=1.0)
    assert len(times["slow"]) == 3
    assert len(times["fast"]) in (100, 101)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_quick_case_per_operator_and_distinct_names(device):
    for name in backends.OPERATORS:
        every = cases(name, device)
        assert len({case.name for case in every}) == len(every)
        assert sum(case.quick for case in every) == 1


def test_the_script_writes_results_and_returns_its_verdict(monkeypatch, tmp_path, capsys):
    builds = {"row_statistics": TINY["row_statistics, greedy"], "surrogate_loss": lambda device: 1 / 0}
    monkeypatch.setattr(kernels, "cases", lambda operator, device: [Case("tiny", builds[operator], quick=True)])
    monkeypatch.setattr(measure, "ceilings", lambda clock, quick: CEILINGS)
    out = tmp_path / "new" / "o.json"
    arguments = ["--device", "cpu", "--quick", "--no-compile", "--seconds", "0.001", "--out", str(out), "--operators"]
    assert kernels.main([*arguments, "row_statistics"]) == 0
    first = json.loads(out.read_text())
    (origin,) = first["runs"]
    assert origin.keys() >= {
        "command",
        "seeds",
        "hardware",
        "versions",
        "git_commit",
        "load_average",
        "ceilings",
    }
    timed = {row["contestant"]: row for row in first["rows"] if row["seconds"]}
    assert timed.keys() >= {"reference", "eager"}
    assert timed["reference"]["ratios"].keys() == {"eager"}
    assert "row_statistics tiny" in capsys.readouterr().out

    assert kernels.main([*arguments, "surrogate_loss", "--append"]) == 1
    both = json.loads(out.read_text())
    assert both["rows"][:-1] == first["rows"]
    assert both["rows"][-1]["status"] == "FAILED: ZeroDivisionError: division by zero"
    assert [row["run"] for row in both["rows"]] == [0] * len(first["rows"]) + [1]
    assert both["runs"][0] == origin
    assert both["runs"][1].keys() == origin.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_a_mistake():
    with pytest.raises(SystemExit) as stopped:
        kernels.main(["--device", "cuda"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("host", "spins", "host_bound"),
    # cycles the host needs to enqueue the call; the spins that are tried in three calls
    [(1e5, [5e5] * 3, False), (6e6, [5e5, 2e6] + [8e6] * 3, False), (math.inf, [5e5, 2e6, 8e6, 3.2e7] + [0] * 3, True)],
)
def test_the_gpu_clock_spins_until_the_host_is_done(monkeypatch, host, spins, host_bound):
    tried = []

    class Event:
        def __init__(self, enable_timing): ...
        def record(self): ...
        def synchronize(self): ...

        def query(self) -> bool:
            return tried[-1] <= host

        def elapsed_time(self, end) -> float:
            return 2.0

    clock = measure.Clock(CPU)
    clock.device, clock._buffer, clock._sink = SimpleNamespace(type="cuda"), torch.zeros(1), torch.zeros(())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", tried.append)
    call = functools.partial(int)
    assert [clock.seconds(call) for _ in range(3)] == [2e-3] * 3
    assert tried == spins
    assert (call in clock.host_bound) == host_bound
