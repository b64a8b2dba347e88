"""``python benchmarks/kernels.py [--device cpu|cuda] [--quick] [--operators ...] [--no-compile] [--out file.json]``

Every backend of every operator: first its errors against float64 on the benchmark's own inputs (a backend whose root mean square error
is more than 1.1 times plain torch's, 2 times for gradients, plus 1e-5, or whose largest is more than 8 times torch's largest plus 1e-4,
is reported and not timed), then median time, share of the ceiling measured in the same run, ratio to every baseline that is installed,
peak extra memory, and whether the issue's target is met. The results go to benchmarks/results/kernels_<device>.json; with --quick, one
size per operator, only to --out. A row's "run" is the index of its command, machine and ceilings in "runs". Exit code 1 if a backend
fails. The package must be installed, or the repository on PYTHONPATH.
"""

import argparse
import gc
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read by torch: the profiler that counts bytes prints lines of its own

import torch
from kernel_cases import cases, measure
from kernel_cases.case import SEED, Call, Case, Contestant, Result, Workload, too_large
from kernel_cases.measure import Clock
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from diffpo.runs.provenance import cpu_name, provenance
from diffpo_kernels import backends

RESULTS = Path(__file__).parent / "results"
_METHOD = f"{measure.__doc__}\nErrors that are allowed. {too_large.__doc__}"
RIVALS = ("liger-kernel", "cut-cross-entropy")
# Seconds; a baseline whose first call takes longer is not repeated. On a GPU a first call compiles kernels.
_PATIENCE = {"cpu": 5.0, "cuda": math.inf}


class CompileBudget:
    """Seconds that torch.compile may spend in all; once they are spent, what is not yet compiled is left out."""

    def __init__(self, allowed: float):
        self.allowed, self.spent = allowed, 0.0

    def refusal(self) -> str | None:
        if self.spent < self.allowed:
            return None
        return f"left out: the {self.allowed:g} s for torch.compile are spent (--compile-budget)"


def run_case(
    case: Case, clock: Clock, ceilings: dict[str, float], seconds: float, budget: CompileBudget
) -> list[Result]:
    """Check, time and judge everyone; a contestant's failure does not stop the others."""
    workload = case.build(clock.device)
    torch_errors = workload.torch_errors()
    patience = _PATIENCE[clock.device.type]
    results = {c.name: check(c, torch_errors, budget, patience) for c in workload.contestants}
    running = {c.name: c.call for c in workload.contestants if results[c.name].status == "ok"}
    times = measure.interleaved_seconds(running, clock, seconds)
    for name, call in running.items():
        result = results[name]
        result.seconds, result.quartiles = measure.median_and_quartiles(times[name])
        result.rounds = len(times[name])
        result.extra_bytes = measure.extra_bytes(call, clock.device)
        if clock.device.type == "cuda":
            result.peak_bytes = measure.peak_bytes(call, clock.device)
            result.wall_seconds = measure.wall_seconds(call, clock.device)
            result.host_bound = call in clock.host_bound
        if case.graph:
            measure_in_a_graph(call, result, clock.device)
    judge(case, workload, list(results.values()), ceilings)
    absent = [Result(name, False, status=f"missing: {reason}") for name, reason in workload.missing.items()]
    return [*results.values(), *absent]


def check(contestant: Contestant, torch_errors: dict[str, float], budget: CompileBudget, patience: float) -> Result:
    """A first call: of a backend, its errors are compared; of torch.compile, it takes the time to compile."""
    result = Result(contestant.name, backend=contestant.errors is not None)
    try:
        if contestant.errors is not None:
            result.errors = contestant.errors()
            bad = too_large(result.errors, torch_errors)
            result.status = f"WRONG, not timed: {'; '.join(bad)}" if bad else "ok"
        elif contestant.compiles:
            result.status = budget.refusal() or "ok"
            if result.status == "ok":
                budget.spent += _seconds(contestant.call)
        elif (seconds := _seconds(contestant.call)) > patience:
            result.status = f"left out: the first call took {seconds:.0f} s"
    except Exception as error:  # whatever a backend or a foreign library raises is its result
        result.status = f"FAILED: {_one_line(error)}"
    return result


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_in_a_graph(call: Call, result: Result, device: torch.device) -> None:
    try:
        result.graph_seconds = measure.graph_seconds(call, device)
    except Exception as error:
        result.status = f"ok, but not in a CUDA graph: {_one_line(error)}"


def judge(case: Case, workload: Workload, results: Sequence[Result], ceilings: dict[str, float]) -> None:
    """Fill in what follows from the times: rates, shares, ratios, targets."""
    matmul = f"matmul {str(workload.dtype).removeprefix('torch.')}"
    floors = {"copy": workload.bytes / ceilings["copy"]}
    if workload.flops:
        floors[matmul] = workload.flops / ceilings[matmul]
    bound = max(floors, key=floors.__getitem__)
    timed = {result.contestant: result for result in results if result.seconds}
    baselines = [result for result in timed.values() if not result.backend or result.contestant == "reference"]
    for result in timed.values():
        result.bytes_per_second = workload.bytes / result.seconds
        result.flops_per_second = workload.flops / result.seconds if workload.flops else None
        result.bound, result.ceiling = bound, ceilings[bound]
        result.share = floors[bound] / result.seconds
        others = [other for other in baselines if other is not result]
        result.ratios = {other.contestant: other.seconds / result.seconds for other in others}
        if result.wall_seconds:
            result.wall_ratios = {other.contestant: other.wall_seconds / result.wall_seconds for other in others}
        if result.backend and result.contestant != "reference":
            result.targets = [target.judge(result, timed) for target in case.targets]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def failed(result: Result) -> bool:
    """A backend that raised or was wrong; a baseline's failure is its own."""
    return result.backend and result.status.startswith(("WRONG", "FAILED"))


def print_case(operator: str, case: Case, results: Sequence[Result], console: Console) -> None:
    table = Table(title=f"{operator} {case.name}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in ("", "median", "of ceiling", "extra memory", "faster than"):
        table.add_column(name, justify="left" if name in ("", "faster than") else "right")
    for result in results:
        if result.seconds is None:
            continue
        graph = f" (graph {_time(result.graph_seconds)})" if result.graph_seconds else ""
        host = f", wall {_time(result.wall_seconds)}" if result.wall_seconds else ""
        host += ", host-bound" if result.host_bound else ""
        share = f"{result.share:.1%} {result.bound}"
        memory = f"{result.extra_bytes / 2**20:,.1f} MiB"
        ratios = [f"{name} {ratio:.3g}x" for name, ratio in result.ratios.items()] if result.backend else []
        table.add_row(result.contestant, _time(result.seconds) + graph + host, share, memory, ", ".join(ratios))
    console.print(table)
    for result in results:
        if result.status != "ok":
            console.print(
                f"  {result.contestant}: {result.status}", style="red" if failed(result) else None, markup=False
            )
        for target in result.targets:
            verdict = {True: "met", False: "NOT MET", None: "not measured"}[target["met"]]
            measured = "" if target["measured"] is None else f" ({target['measured']:.3g})"
            console.print(f"  {result.contestant}: {target['target']}: {verdict}{measured}", markup=False)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} us"


def origin(device: torch.device, freed_memory_kept: bool) -> dict:
    """Provenance, and what decides the speed of kernels beside it."""
    record = provenance({"inputs": SEED})
    for package in RIVALS:
        try:
            record["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            record["versions"][package] = None
    record["versions"]["cuda"] = torch.version.cuda
    return record | {"device": device.type, "freed_memory_kept": freed_memory_kept}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one size per operator")
    parser.add_argument("--operators", nargs="+", choices=backends.OPERATORS, default=backends.OPERATORS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-budget", type=float, metavar="SECONDS", help="for torch.compile in all (120; 30 quick)"
    )
    parser.add_argument(
        "--seconds", type=float, help="of timing per contestant and case (default 3; 0.5 on a GPU or with --quick)"
    )
    parser.add_argument(
        "--keep-freed-memory", action="store_true",
        help="let the C allocator keep freed memory, as diffpo's programs on a CPU do: eager torch gains most",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--append", action="store_true", help="keep the rows and runs that the file has already")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.seconds is None:
        options.seconds = 0.5 if options.quick or options.device == "cuda" else 3.0
    if options.compile_budget is None:
        options.compile_budget = 30.0 if options.quick else 120.0
    if options.out is None and not options.quick:
        options.out = RESULTS / f"kernels_{options.device}.json"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.keep_freed_memory:
        from diffpo.cpu_memory import keep_freed_memory  # needs more packages than the kernels do

        keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch")
    console, device = Console(highlight=False, width=None if sys.stdout.isatty() else 150), torch.device(options.device)
    clock, budget = Clock(device), CompileBudget(0.0 if options.no_compile else options.compile_budget)
    record = origin(device, options.keep_freed_memory)
    load, ceilings = [os.getloadavg()], measure.ceilings(clock, options.quick)
    rates = [
        f"{name} {rate / (1e9 if name == 'copy' else 1e12):.3g} {_UNIT.get(name, 'TFLOP/s')}"
        for name, rate in ceilings.items()
    ]
    console.print(f"{_hardware(device)}; measured ceilings: {', '.join(rates)}")
    runs, rows, failures = [], [], 0
    if options.append and options.out is not None and options.out.exists():
        earlier = json.loads(options.out.read_text())
        runs, rows = earlier["runs"], earlier["rows"]
    runs.append(record)
    for operator, case in chosen_cases(options):
        try:
            results = run_case(case, clock, ceilings, options.seconds, budget)
        except Exception as error:  # such as a lack of memory for the inputs
            results = [Result("all", backend=True, status=f"FAILED: {_one_line(error)}")]
        print_case(operator, case, results, console)
        labels = {"run": len(runs) - 1, "operator": operator, "case": case.name}
        rows += [labels | asdict(result) for result in results]
        failures += sum(map(failed, results))
        forget(device)
        if options.out is not None:  # after every case, so that a run that is stopped leaves what it has
            options.out.parent.mkdir(parents=True, exist_ok=True)
            record |= {"load_average": [*load, os.getloadavg()], "ceilings": ceilings}
            document = {"method": _METHOD, "runs": runs, "rows": rows}
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"load average before {_load(load[0])}, after {_load(os.getloadavg())}; {failures} failed")
    return 1 if failures else 0


_UNIT = {"copy": "GB/s"}


def chosen_cases(options: argparse.Namespace) -> list[tuple[str, Case]]:
    """Those with a target first, so that budgets and time limits are spent on them."""
    every = [(operator, case) for operator in options.operators for case in cases(operator, options.device)]
    return sorted((pair for pair in every if pair[1].quick or not options.quick), key=lambda pair: not pair[1].targets)


def forget(device: torch.device) -> None:
    """Free what a case leaves behind: its tensors, and graphs compiled for its shapes."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def _load(average: tuple[float, float, float]) -> str:
    return " ".join(f"{value:.2f}" for value in average)


if __name__ == "__main__":
    sys.exit(main())
