"""``python benchmarks/decoding.py [--device cpu|cuda] [--quick] [--smoke] [--seconds S] [--out file.json]``

On a CPU: our decoder against plain loops (LLaDA's reference loop, Fast-dLLM's threshold loop) on small models with LLaDA's vocabulary,
timed only where the same tokens come out in the same NFE, with the time by part of a step; and the error of the key/value caches on the
shipped models. About 20 minutes on two idle cores, --quick 3. On a GPU: tokens are compared on a small model first, then LLaDA-8B's shape
with random weights, with and without caches and CUDA graphs; --seconds (480, 13 with --quick), counted from the start of the program,
bounds the whole run, and what does not fit any more is left out. --smoke: all of it on tiny models, for tests of this program.

The results go to benchmarks/results/decoding_<device>.json (--quick and --smoke: only to --out), after every case, so that a run that is
stopped leaves what it has. Exit code 1 if tokens differ or one of our variants fails. The package must be installed, or the repository on
PYTHONPATH.
"""

import time

START = time.monotonic()  # importing torch counts against --seconds

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from dataclasses import asdict, dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read by torch: the profiler prints lines of its own

import torch  # noqa: E402
from decoding_cases import against_loops, cache_error, full_size  # noqa: E402
from decoding_cases.full_size import Deadline  # noqa: E402
from kernel_cases import measure  # noqa: E402
from rich.box import SIMPLE_HEAD  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402

from diffpo.cpu_memory import keep_freed_memory  # noqa: E402
from diffpo.models.checkpoints import write_atomically  # noqa: E402
from diffpo.runs.provenance import cpu_name, provenance  # noqa: E402

RESULTS = Path(__file__).parent / "results"
_METHOD = {"against_loops": against_loops.__doc__, "full_size": full_size.__doc__, "cache_error": cache_error.__doc__}


@dataclass
class Report:
    """Rows by section, printed and written as they come."""

    console: Console
    out: Path | None
    origin: dict[str, Any]
    sections: dict[str, list] = field(default_factory=dict)

    def add(self, section: str, rows: list) -> None:
        """Rows that are final."""
        self.sections.setdefault(section, []).extend(rows)
        if rows:
            _PRINT[section](rows, self.console)
        self.write()

    def write(self, unfinished: tuple[str, list] | None = None) -> None:
        """All there is, with the rows of a case that is still running."""
        if self.out is None:
            return
        sections = {name: [asdict(row) for row in rows] for name, rows in self.sections.items()}
        if unfinished is not None:
            section, rows = unfinished
            sections[section] = sections.get(section, []) + [asdict(row) for row in rows]
        method = {name: _METHOD[name] for name in sections}
        document = {"method": method, "run": self.origin | {"load_average_after": os.getloadavg()}} | sections
        self.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1) + "\n"
        write_atomically(self.out, lambda path: Path(path).write_text(text))


def against_plain_loops(options: argparse.Namespace, report: Report) -> bool:
    """Whether everyone decoded the same tokens."""
    cases = against_loops.SMOKE if options.smoke else against_loops.QUICK if options.quick else against_loops.FULL
    seconds, right = 0.0 if options.smoke or options.quick else 20.0, True

    def add(rows: list[against_loops.Row]) -> None:
        nonlocal right
        right = right and not any(map(against_loops.failed, rows))
        report.add("against_loops", rows)

    for case in cases:
        against_loops.run(case, seconds, add)
    return right


def errors_of_caches(options: argparse.Namespace, report: Report) -> bool:
    problems = 4 if options.smoke else 128 if options.quick else 512
    cache_error.run(problems, lambda rows: report.add("cache_error", rows))
    return not any(map(cache_error.failed, report.sections["cache_error"]))


def at_full_size(options: argparse.Namespace, report: Report) -> bool:
    """Tokens first, on a small model in float32; then the clock. Whether everything ran."""
    device, small = torch.device(options.device), against_loops.SMOKE if options.smoke else against_loops.QUICK
    found = {k: v for case in small for k, v in against_loops.verify(case, device).items()}
    report.origin["same_tokens_as_plain_loops"] = found or True
    if found:
        report.console.print(f"not timed: {found}", style="red", markup=False)
        report.write()
        return False
    cases = full_size.SMOKE if options.smoke else full_size.QUICK if options.quick else full_size.FULL
    ceilings = measure.ceilings(measure.Clock(device), options.quick or options.smoke)
    report.origin["ceilings"], deadline = ceilings, Deadline(START + options.seconds)
    model, right = full_size.build(cases, device), True
    for case in cases:
        rows: list[full_size.Row] = []
        for row in full_size.run(case, model, ceilings, deadline):
            rows.append(row)
            report.write(("full_size", rows))
        report.add("full_size", rows)
        right = right and not any(map(full_size.failed, rows))
    return right


def print_loops(rows: list[against_loops.Row], console: Console) -> None:
    parts = ("transformer", "head", "statistics and commit", "rest")
    table = _table(f"{rows[0].case}: {rows[0].rule}", "", "a decoding", "tokens/s", "NFE", *parts, "ours is faster by")
    for row in rows:
        if row.seconds is None:
            console.print(f"  {row.contestant}: {row.status}", style="red", markup=False)
            continue
        total = sum(row.parts.values())
        shares = [f"{row.parts[name] / total:.0%}" for name in parts]
        ratios = ", ".join(f"{ratio:.2f}x ({name})" for name, ratio in row.faster_than.items())
        table.add_row(row.contestant, _spread(row), f"{row.tokens_per_second:,.1f}", f"{row.nfe:.1f}", *shares, ratios)
    _show(table, rows, console, [row.contestant for row in rows])


def print_full_size(rows: list[full_size.Row], console: Console) -> None:
    columns = (
        "",
        "tokens/s",
        "a step",
        "outside transformer",
        "and head",
        "of weight floor",
        "peak memory",
        "of reference",
    )
    table = _table(rows[0].case, *columns)
    for row in rows:
        if row.seconds is None:
            console.print(
                f"  {row.variant}: {row.status}", style="red" if full_size.failed(row) else None, markup=False
            )
            continue
        outside = [_share(row.outside_transformer), _share(row.outside_transformer_and_head)]
        floor = "" if row.weight_floor is None else f"{row.weight_floor:.2f}x"
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:,.1f} GiB"
        ratio = "" if row.faster_than_reference is None else f"{row.faster_than_reference:.2f}x"
        rate, step = f"{row.tokens_per_second:,.0f}", f"{row.step_seconds * 1e3:,.2f} ms"
        table.add_row(row.variant, rate, step, *outside, floor, memory, ratio)
    _show(table, rows, console, [row.variant for row in rows])


def print_cache_error(rows: list[cache_error.Row], console: Console) -> None:
    columns = ("cache", "refresh", "equal tokens", "accuracy", "exact", "KL (nats per token)", "")
    table = _table(f"{rows[0].model}, {rows[0].problems} problems", *columns)
    for row in rows:
        refresh = "a block" if row.refresh is None else f"{row.refresh} steps"
        if row.status != "ok":
            table.add_row(row.cache, refresh, "", "", "", "", escape(row.status))
            continue
        accuracies = f"{row.accuracy:.1%}", f"{row.exact_accuracy:.1%}"
        table.add_row(
            row.cache, refresh, f"{row.equal_tokens:.2%}", *accuracies, f"{row.kl:.2e} ± {row.standard_error:.1e}", ""
        )
    console.print(table)


_PRINT = {"against_loops": print_loops, "full_size": print_full_size, "cache_error": print_cache_error}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name)
    return table


def _show(table: Table, rows: list, console: Console, names: list[str]) -> None:
    """The table, then the verdicts on the targets."""
    if table.row_count:
        console.print(table)
    for name, row in zip(names, rows, strict=True):
        for target in row.targets:
            verdict = {True: "met", False: "NOT MET", None: "not measured"}[target["met"]]
            measured = "" if target["measured"] is None else f" ({target['measured']:.3g})"
            console.print(f"  {name}: {target['target']}: {verdict}{measured}", markup=False)


def _spread(row: against_loops.Row) -> str:
    low, high = row.quartiles
    return f"{row.seconds:.3f} s ({low:.3f} to {high:.3f})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--smoke", action="store_true", help="tiny models, every section")
    parser.add_argument("--seconds", type=float, help="for the whole run on a GPU (480; 13 with --quick)")
    parser.add_argument(
        "--keep-freed-memory", action="store_true",
        help="let the C allocator keep freed memory, as diffpo's programs on a CPU do: loops with large logits gain most",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.seconds is None:
        options.seconds = 13.0 if options.quick else 480.0
    if options.out is None and not (options.quick or options.smoke):
        options.out = RESULTS / f"decoding_{options.device}.json"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.keep_freed_memory:
        keep_freed_memory()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    console.print(f"{hardware}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.2f}")
    seeds = {"weights": against_loops.MODEL_SEED, "prompts": against_loops.PROMPT_SEED, "problems": 0}
    origin = provenance(seeds) | {
        "device": options.device,
        "freed_memory_kept": options.keep_freed_memory,
        "load_average_before": os.getloadavg(),
    }
    report = Report(console, options.out, origin)
    on_cpu, on_gpu = (against_plain_loops, errors_of_caches), (at_full_size,)
    sections = on_cpu + on_gpu if options.smoke else on_gpu if options.device == "cuda" else on_cpu
    right = [section(options, report) for section in sections]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
