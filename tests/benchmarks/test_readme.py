"""The README's table of kernels says what is in benchmarks/results/kernels_cpu.json."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def table_rows() -> list[tuple[str, str]]:
    """(operator, case) and the whole line of each measured row."""
    return re.findall(r"^(\| `(?:row_statistics|entropy_bounded_commit_|linear_logprob|surrogate_loss)` \| [^|]+ \| [\d.]+ m?u?s .*)$",
                      (ROOT / "README.md").read_text(), flags=re.M)  # fmt: skip


def expected_row(line: str, rows: list[dict]) -> str:
    operator, case = (cell.strip().strip("`") for cell in line.strip("|").split("|")[:2])
    (native,) = (r for r in rows if (r["operator"], r["case"], r["contestant"]) == (operator, case, "native"))
    seconds, ratios = native["seconds"], native["ratios"]
    took = f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
    eager = ratios.get("eager", ratios["reference"])
    return f"| `{operator}` | {case} | {took} | {eager:.1f}x | {ratios['torch.compile']:.1f}x | {native['extra_bytes'] / 2**20:.0f} MiB |"


def test_the_table_of_kernels_agrees_with_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks/results/kernels_cpu.json").read_text())["rows"]
    lines = table_rows()
    assert len(lines) >= 8
    for line in lines:
        assert line == expected_row(line, rows)
