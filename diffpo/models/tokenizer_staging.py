"""Loading a tokenizer that somebody else made: from a copy of its files, after a trial in a process that may die."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffpo.models.folder_files import find, parse_json, read_bytes, read_json

_TABLE_BYTES = 32 * 2**20  # tokenizer.json of LLaDA takes 8 MB
_TEMPLATE_BYTES = 2**20
_TABLES = ("tokenizer.json", "vocab.json", "merges.txt")
# values of tokenizer_config.json that transformers takes for files to open or arguments of the class
_PATHS = {
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "tokenizer_object",
    "fast_tokenizer_files",
    "gguf_file",
    "init_inputs",
}
_BOM = b"\xef\xbb\xbf"
_TRIAL = Path(__file__).with_name("tokenizer_trial.py")


def tokenizer_content(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The tokenizer's files in a folder, by name. ValueError for one that ``find`` refuses, that is too large or no JSON object."""
    return {name: _read(folder / name) for name in names if find(folder, name) is not None}


@contextmanager
def staged(content: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder with these files, tried: ValueError for a tokenizer that cannot be loaded within the limits.

    transformers reads that folder instead of the original, so that it opens nothing else.
    """
    with tempfile.TemporaryDirectory(prefix="diffpo-tokenizer-") as name:
        folder = Path(name)
        for file, text in content.items():
            (folder / file).write_bytes(
                _without_paths(text) if file == "tokenizer_config.json" else text.removeprefix(_BOM)
            )
        _try(folder, sum(len(text) for file, text in content.items() if file in _TABLES))
        yield folder


def _read(path: Path) -> bytes:
    if path.name in _TABLES:
        return read_bytes(path, _TABLE_BYTES)
    if path.suffix == ".json":
        read_json(path)
        return path.read_bytes()
    return read_bytes(path, _TEMPLATE_BYTES)


def _without_paths(text: bytes) -> bytes:
    fields = parse_json(text, "tokenizer_config.json")
    return json.dumps({key: value for key, value in fields.items() if key not in _PATHS}).encode()


def _try(folder: Path, size: int) -> None:
    """Load it in a child, which gets 128 MB and a second of processor time, and more for large tables."""
    megabytes, seconds = 128 + 20 * size // 2**20, 1 + size // 2**21
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAYON_NUM_THREADS": "1",
        "RAYON_RS_NUM_THREADS": "1",
    }
    try:
        result = subprocess.run(
            [sys.executable, "-P", str(_TRIAL), str(folder), str(megabytes), str(seconds)],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60 * seconds,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"loading it did not end within {60 * seconds} s") from None
    said = result.stdout.decode(errors="replace").strip()
    if result.returncode < 0:
        raise ValueError(
            f"loading it ended a trial process (signal {-result.returncode}), which had {seconds} s of processor time and "
            f"{megabytes} MB of memory"
        )
    if result.returncode or said != "ok":
        last = (result.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise ValueError(said or last[:500])
