"""The front page is short, its code runs, and no link of the documentation leads nowhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def test_the_front_page_is_short() -> None:
    assert len(COMMENT.sub("", README).split()) <= 1300
    assert sum(map(len, COMMENT.findall(README))) <= 200  # the markers of the two commands, no templates


def test_the_code_of_the_front_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    found: dict = {}
    exec(code, found)
    assert found["logp"].shape == (8, 12)
    assert found["grade"].correct


def test_the_code_about_decoding_runs() -> None:
    """The blocks that load a model themselves: a rollout's bytes and likelihood, and the queue."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/decoding.md").read_text(), flags=re.DOTALL)
    found: list[dict] = [{}, {}]
    for block, names in zip([block for block in blocks if "diffpo.load" in block], found, strict=True):
        exec(block, names)
    rollouts, queue = found
    torch.testing.assert_close(rollouts["exact"], rollouts["both"].logprob, rtol=1e-4, atol=1e-4)
    assert len(queue["engine"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_holds_a_placeholder(page: Path) -> None:
    assert placeholders(page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("## Versions\n\nVERSIONS_TABLE\n", ["VERSIONS_TABLE"]),
        ("| a | RESULT_1 |", ["RESULT_1"]),
        ("PLACEHOLDER", ["PLACEHOLDER"]),
        ("- TODO: say why, TBD", ["TODO", "TBD"]),
        ("TABLE\n", ["TABLE"]),
        ("set `OMP_NUM_THREADS=1`, with `A_B and\nC_D`", []),
        ("```sh\nOMP_NUM_THREADS=1 python x.py\n```\n", []),
        ("GPU, NFE, LLaDA and [SUPG_X](docs/A_B.md)", ["SUPG_X"]),
        ("The NFE of a GPU.\nGSM8K\n", []),
    ],
)
def test_placeholders_are_told_from_names(text: str, found: list[str]) -> None:
    assert placeholders(text) == found


def placeholders(text: str) -> list[str]:
    """Words in capitals that stand for something to be filled in. Code, where such names are real, does not count."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    marks = r"\b(?:[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|PLACEHOLDER|TODO|TBD|TBA|FIXME|XXX+)\b|^[A-Z]{4,}$"
    return re.findall(marks, prose, flags=re.M)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
