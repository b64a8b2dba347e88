"""Every recipe in configs/ parses, runs its dry run, says only what differs from the defaults, and says why."""

import tomllib
from pathlib import Path

import pytest

import diffpo.train
from diffpo.config import TrainConfig, parse

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
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, capsys):
    config = parse(TrainConfig, [str(path)], diffpo.train.algorithm_defaults)
    assert config.name == path.stem
    defaults = parse(TrainConfig, ["--algorithm.name", config.algorithm.name], diffpo.train.algorithm_defaults)
    default = dict(leaves(defaults.model_dump()))
    for key, value in leaves(tomllib.loads(path.read_text())):
        assert key == "algorithm.name" or value != default[key], f"{key} is the default"
    for line in path.read_text().splitlines():
        assert "=" not in line or "#" in line, f"no comment: {line}"
    assert diffpo.train.main([str(path), "--dry-run"]) == 0
    assert f'"name": "{path.stem}"' in capsys.readouterr().out
