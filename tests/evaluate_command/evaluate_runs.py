"""What the tests of ``python -m diffpo.evaluate`` share beside their fixtures."""

import json

import pytest

GSM8K_ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(5)]


def items_in(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def summary_in(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def timeless(items: list[dict]) -> list[dict]:
    return [{name: value for name, value in item.items() if name != "seconds"} for item in items]


def failing(run, capsys, *flags) -> str:
    """The one line of a run that ended with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error
