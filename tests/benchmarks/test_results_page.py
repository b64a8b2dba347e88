"""docs/results.md and the README say what is in benchmarks/results."""

from pathlib import Path

import pytest
import results_page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def values() -> dict:
    return results_page.sources()


def test_the_page_is_the_template_filled_in(values: dict) -> None:
    template = (ROOT / "docs/results.template.md").read_text()
    page = (ROOT / "docs/results.md").read_text()
    assert results_page.first_difference(page, results_page.filled(template, values)) is None


def test_the_readme_holds_its_quotes(values: dict) -> None:
    assert results_page.missing_quotes((ROOT / "README.md").read_text(), values) == []


def test_a_changed_number_is_found(values: dict) -> None:
    readme = (ROOT / "README.md").read_text()
    changed = readme.replace(f"{values['first_run']['trained']['accuracy']:.1%}", "99.9%")
    assert changed != readme
    assert len(results_page.missing_quotes(changed, values)) == 1
    page = results_page.filled("| base | {untrained[best][accuracy]:.1%} |", values)
    assert "99.9%" in results_page.first_difference(page.replace("36.6%", "99.9%"), page)


@pytest.mark.parametrize("field", ["{untrained[bset]}", "{nobody}", "{loop[99][nfe]}", "{race[text]:.1%}", "{unclosed"])
def test_a_field_that_the_results_do_not_have_names_its_line(values: dict, field: str) -> None:
    with pytest.raises(ValueError, match=r"line 2 of the template"):
        results_page.filled(f"a line\n{field}\n", values)


def test_check_writes_nothing_and_says_what_differs(monkeypatch, tmp_path, capsys) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("benchmarks", "README.md", "docs/results.template.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    stale = (ROOT / "docs/results.md").read_text().replace("36.6%", "36.7%")
    (tmp_path / "docs/results.md").write_text(stale)
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    assert results_page.main(["--check"]) == 1
    assert "36.7%" in capsys.readouterr().out
    assert (tmp_path / "docs/results.md").read_text() == stale
    assert results_page.main([]) == 0
    assert (tmp_path / "docs/results.md").read_text() == (ROOT / "docs/results.md").read_text()
