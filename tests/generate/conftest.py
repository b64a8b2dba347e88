"""Shared by the tests of the generate command."""

import pytest

import diffpo
from diffpo import generate_command

PROMPTS = ["7 3 11 -> 32", "5 5 5 -> 15", "2 9 4 -> 14", "3 8 2 -> 22"]


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)


@pytest.fixture
def stopping_stream(monkeypatch):
    """stopping_stream(rows, act): decoding stops after that many rows with act()."""

    def install(rows, act):
        real = diffpo.decoding.generation.stream

        def stream(*args, **options):
            for n, row in enumerate(real(*args, **options)):
                if n == rows:
                    act()
                yield row

        monkeypatch.setattr(generate_command, "stream", stream)

    return install
