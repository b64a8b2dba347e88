"""Configuration: frozen pydantic models, a TOML file and the command line. Later sources win: defaults, TOML, flags.

An unknown key, a wrong type or an impossible value ends the program with exit code 2 before anything is loaded or created.
"""

import argparse
import difflib
import math
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("must be a number, got NaN")
    return value


Nats = Annotated[float, Field(ge=0), AfterValidator(_not_nan)]
Device = Literal["cpu", "cuda", "auto"]
Positive = Annotated[float, Field(gt=0), AfterValidator(_not_nan)]


class Config(BaseModel):
    """Base of all configurations: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class ModelSize(Config):
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int = Field(384, gt=0)
    num_hidden_layers: int = Field(4, gt=0)
    num_attention_heads: int = Field(4, gt=0)


class PretrainConfig(Config):
    """Train a tiny masked diffusion LM from scratch."""

    task: str = "countdown"
    """countdown, countdown4 or sudoku"""
    start: str = ""
    """a shipped model or a folder to go on from, which then decides the size; none = from scratch. Give another --seed than it was made
    with: the seed decides the examples"""
    device: Device = "cpu"
    output: str = "runs/pretrained"
    """folder for the checkpoint; must be new or empty"""
    steps: int = Field(2250, gt=0)
    batch_size: int = Field(256, gt=0)
    lr: Positive = 1.5e-3
    warmup_steps: int = Field(100, gt=0)
    final_lr_fraction: float = Field(1.0, ge=0, le=1)
    """the learning rate falls linearly to this share of --lr at the last step; 1 = it stays"""
    weight_decay: float = Field(0.01, ge=0)
    seed: int = Field(0, ge=0)
    heldout: int = Field(1000, gt=0)
    """held-out problems of the final evaluation"""
    model: ModelSize = ModelSize()


T = TypeVar("T", bound=Config)


def parse(kind: type[T], arguments: list[str] | None = None) -> T:
    """The configuration of a command: defaults, then an optional TOML file (the first argument), then flags."""
    return parse_flags(kind, *toml_and_flags(arguments))


def toml_and_flags(arguments: list[str] | None) -> tuple[dict[str, Any], list[str]]:
    """What the TOML file among the arguments says, and the flags behind it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        return read_toml(Path(arguments[0])), arguments[1:]
    return {}, arguments


def parse_flags(kind: type[T], values: dict[str, Any], flags: list[str]) -> T:
    """The configuration with ``values`` for defaults and the flags on top."""
    try:
        command = f"python -m diffpo.{kind.__name__.removesuffix('Config').lower()}"
        return tyro.cli(kind, prog=command, args=flags, default=kind(**values), description=kind.__doc__)
    except ValidationError as error:
        fail(explain(error, kind))


def table(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        fail(f"{name}: must be a table, got {found!r}")
    return found


def flag(arguments: list[str], name: str) -> str | None:
    """The value of one flag, without reading the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value")
    return parser.parse_known_args(arguments)[0].value


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        fail(f"config file {path}: {error.strerror}")
    except tomllib.TOMLDecodeError as error:
        fail(f"config file {path} is not valid TOML: {error}")


def explain(error: ValidationError, kind: type[Config]) -> str:
    """One line per fault: the field, what was wrong, and for an unknown field the nearest valid names."""
    lines = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"])
        message = f"{field}: {fault['msg']}, got {fault['input']!r}" if field else fault["msg"]
        if fault["type"] == "extra_forbidden":
            owner = kind
            for part in fault["loc"][:-1]:
                owner = owner.model_fields[part].annotation
            message = f"unknown key {field!r}; nearest: {', '.join(nearest(str(fault['loc'][-1]), owner.model_fields))}"
        lines.append(message)
    return "\n".join(lines)


def nearest(name: str, valid) -> list[str]:
    """The valid names closest to ``name``, best first."""
    return difflib.get_close_matches(name, list(valid), n=3, cutoff=0.0)


def fail(message: str) -> NoReturn:
    """Report a user's mistake and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
