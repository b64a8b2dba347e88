"""What a user's mypy sees of ``import diffpo``, whose names are loaded when they are first asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffpo

pytest.importorskip("mypy")

SCRIPT = """\
import diffpo
import torch

reveal_type(diffpo.generate)
reveal_type(diffpo.load)
model = diffpo.load("tiny-countdown")
reveal_type(model)
texts, chats = ["x"], [[{"role": "user", "content": "x"}]]
reveal_type(diffpo.generate(model, texts, 12, rule=diffpo.PromptThreshold()))
diffpo.generate(model, chats, 12, stop="a", cache="dual", batch_size=2)
diffpo.generate(model=model, prompts=torch.zeros(1, 2), gen_length=12)
reveal_type([row for _, row in diffpo.stream(model, texts, 12)])
diffpo.generate(model, texts, 12, ruled=1)  # wrong
diffpo.generate(model, texts, "12")  # wrong
diffpo.generate(model, texts, 12, rule=0.1)  # wrong
diffpo.Engine(model, 8, 10, 10, cash="dual")  # wrong
diffpo.nothing  # wrong
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("types")
    (folder / "user.py").write_text(SCRIPT)
    # with our settings, and so with the cache of an earlier check: reading torch takes a minute
    command = [sys.executable, "-m", "mypy", str(folder / "user.py")]
    done = subprocess.run(command, cwd=Path(diffpo.__file__).parents[1], capture_output=True, text=True, timeout=600)
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_names_have_their_types(said):
    revealed = [line.split("Revealed type is ")[1].strip('"') for line in said if "Revealed type" in line]
    generate, load, model, generation, rows = revealed
    assert "gen_length: int" in generate
    assert "rule: diffpo.decoding.rules.Rule | None" in generate
    assert load.endswith("-> diffpo.models.transformer.MaskedDiffusionLM")
    assert model == "diffpo.models.transformer.MaskedDiffusionLM"
    assert generation == "diffpo.decoding.generation.Generation"
    assert rows.endswith("list[diffpo.decoding.generation.Generation]")
    assert not [line for line in revealed if line == "Any"]


@pytest.mark.slow
def test_wrong_calls_alone_are_errors(said):
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert {int(match[1]) for line in said if (match := re.match(r".*user\.py:(\d+): error", line))} == wrong
