"""The README's tables and paragraphs say what is in benchmarks/results/."""

import json
import re
from pathlib import Path

import pytest
import readme_numbers

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


def test_the_numbers_of_experiments_agree_with_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(readme_numbers.checked(text)) >= 6
    assert readme_numbers.differences(text) == []


TABLE = """Text.

<!-- table a=a.json b=b.json
| arm | accuracy | calls |
|---|---|---|
| joint | {a[arms][2mf-is][mean]:.1%} ({a[values][1]:.2f}) | {b[calls]:,} |
-->
| arm | accuracy | calls |
|---|---|---|
| joint | 45.4% (0.25) | 650,000 |

More text.
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps({"arms": {"2mf-is": {"mean": 0.4536}}, "values": [0.5, 0.25]}))
    (tmp_path / "b.json").write_text(json.dumps({"calls": 650000}))
    return tmp_path


def test_a_right_table_passes_and_a_changed_number_is_found(results: Path) -> None:
    assert readme_numbers.differences(TABLE, results) == []
    (results / "b.json").write_text(json.dumps({"calls": 650001}))
    (difference,) = readme_numbers.differences(TABLE, results)
    assert "650,000" in difference[0]
    assert "650,001" in difference[1]


@pytest.mark.parametrize(
    "lost", ["| joint | 45.4% (0.25) | 650,000 |\n", "|---|---|---|\n| joint | 45.4% (0.25) | 650,000 |\n"]
)
def test_a_missing_row_is_found_and_filled_in(results: Path, lost: str) -> None:
    broken = (
        lost.join(TABLE.split(lost)[:-1]) + TABLE.split(lost)[-1] if TABLE.count(lost) > 1 else TABLE.replace(lost, "")
    )
    assert readme_numbers.differences(broken, results)
    assert readme_numbers.filled(broken, results) == TABLE


def test_a_field_that_no_file_has_is_named(results: Path) -> None:
    with pytest.raises(ValueError, match=r"b\[cals\]"):
        readme_numbers.differences(TABLE.replace("b[calls]", "b[cals]"), results)


def test_a_malformed_comment_does_not_pass_silently(results: Path) -> None:
    with pytest.raises(ValueError, match="0 are well-formed"):
        readme_numbers.differences(TABLE.replace(" b=b.json", " b.json"), results)


def test_a_paragraph_is_checked_like_a_table(results: Path) -> None:
    text = "<!-- text b=b.json\n**It took\n{b[calls]:,}** calls.\n-->\n**It took\n650,000** calls.\n\nMore, unchecked: 7.\n"
    assert readme_numbers.differences(text, results) == []
    assert readme_numbers.differences(text.replace("650,000", "7"), results) == [("7** calls.", "650,000** calls.")]
    assert readme_numbers.filled(text.replace("\n650,000", "\n7"), results) == text


@pytest.mark.parametrize(
    ("right", "broken"),
    [
        (
            "| joint | {a[arms][2mf-is][mean]:.1%} ({a[values][1]:.2f}) | {b[calls]:,} |\n-->",
            "| joint | {b[calls]:,} | -->",
        ),
        ("<!-- table", "<!--table"),
        ("<!-- table", "  <!-- table"),
    ],
)
def test_nothing_is_written_where_a_comment_is_malformed(results: Path, right: str, broken: str) -> None:
    text = TABLE.replace(right, broken) + TABLE
    with pytest.raises(ValueError, match="1 are well-formed"):
        readme_numbers.filled(text, results)


def test_a_comment_or_heading_is_never_overwritten(results: Path) -> None:
    text = "<!-- text b=b.json\n{b[calls]}\n-->\n## Heading\n"
    assert readme_numbers.filled(text, results) == "<!-- text b=b.json\n{b[calls]}\n-->\n650000\n## Heading\n"
