"""Problems in the published format of their dataset: a local file, or the hub."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .task import ChatTask

FORMATS = (".jsonl", ".csv", ".parquet")


def local_problems(task: ChatTask, path: str | Path) -> tuple[list, str]:
    """The problems of a jsonl, csv or parquet file, in its order, and the file's revision ("sha256:...").

    FileNotFoundError without the file, ValueError for another format or rows that are not the task's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}")
    return _problems(task, read_rows(path), path.name), f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def hub_problems(task: ChatTask) -> tuple[list, str]:
    """The published test split, from the hub's cache or the network, and its revision ("owner/name@commit").

    FileNotFoundError if it cannot be fetched, ValueError if the task is published nowhere or pyarrow is needed and missing.
    """
    if task.hub_file is None:
        raise ValueError(f"task {task.name} has no dataset on the hub: give a file of the published format with --data")
    dataset, file = task.hub_file
    if file.endswith(".parquet"):
        _parquet_module()  # before anything is fetched
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(dataset, file, repo_type="dataset"))
    except Exception as error:
        raise FileNotFoundError(
            f"data: {dataset} could not be fetched from the hub ({type(error).__name__}); give a local copy with --data: {error}"
        ) from error
    commit = path.parts[path.parts.index("snapshots") + 1] if "snapshots" in path.parts else "unknown"
    return _problems(task, read_rows(path), dataset), f"{dataset}@{commit}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file by its ending: .jsonl, .csv (every value a string) or .parquet. ValueError if it is not what it says."""
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".parquet":
            return _read_parquet(path)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: {path} is not valid {path.suffix[1:]}: {error}") from error
    raise ValueError(f"data: {path} must be one of {', '.join(FORMATS)}")


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    parquet = _parquet_module()
    import pyarrow

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: {path} is not valid parquet: {error}") from error


def _parquet_module():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading parquet files needs pyarrow: pip install 'diffpo[data]'") from error
    return pyarrow.parquet


def _problems(task: ChatTask, rows: Sequence[dict[str, Any]], source: str) -> list:
    problems = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"data: row {number} of {source} must be an object with columns, got {type(row).__name__}")
        missing = [column for column in task.columns if row.get(column) is None]
        if missing:
            raise ValueError(
                f"data: row {number} of {source} has no {', '.join(missing)}: task {task.name} needs the columns "
                f"{', '.join(task.columns)}, found {', '.join(map(str, row))}"
            )
        try:
            problems.append(task.problem_from_row(row))
        except ValueError as error:
            raise ValueError(f"data: row {number} of {source}: {error}") from error
    if not problems:
        raise ValueError(f"data: {source} holds no rows")
    return problems
