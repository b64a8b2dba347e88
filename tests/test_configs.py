"""Every recipe in configs/ parses, runs its dry run, says only what differs from the defaults, and says why."""

import tomllib
from pathlib import Path

import pytest

import diffpo.train
from diffpo.training.config import parse_train

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def leaves(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {
        "countdown-joint",
        "countdown-model",
        "countdown-sampler",
        "countdown-d1",
        "sudoku-joint",
        "medley",
    }


def check_values(path: Path, defaults) -> None:
    default = dict(leaves(defaults.model_dump()))
    for key, value in leaves(tomllib.loads(path.read_text())):
        assert key == "algorithm.name" or value != default[key], f"{key} is the default"
    for line in path.read_text().splitlines():
        assert "=" not in line or "#" in line, f"no comment: {line}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, capsys):
    config = parse_train([str(path)])
    assert config.name == path.stem
    defaults = parse_train(["--algorithm.name", config.algorithm.name])
    check_values(path, defaults)
    assert diffpo.train.main([str(path), "--dry-run"]) == 0
    assert f'"name": "{path.stem}"' in capsys.readouterr().out
