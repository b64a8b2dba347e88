"""Configuration: frozen pydantic models, a TOML file and the command line. Later sources win: defaults, TOML, flags.

An unknown key, a wrong type or an impossible value ends the program with exit code 2 before anything is loaded or created.
"""

import argparse
import difflib
import math
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from diffpo.dependencies import require
from diffpo.text_input import decode

require("pydantic", "tyro")

# The other configurations take Field and model_validator from here, after the check.
import tyro  # noqa: E402
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator  # noqa: E402, F401


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


class AlgorithmConfig(Config):
    """One RL algorithm. The defaults are DiFFPO's, tuned on the tiny models (benchmarks/notes/experiments.md); another
    ``name`` brings its own (see diffpo/objectives)."""

    name: str = "diffpo"
    """diffpo or d1"""
    mode: Literal["joint", "model", "sampler"] = "joint"
    """train the model and the threshold, the model alone at a fixed threshold, or the threshold alone"""
    m: int = Field(2, ge=0)
    """network evaluations of the m-times mean-field surrogate; 0 = every step, the exact likelihood"""
    importance_correction: bool = True
    """weigh each token by min(weight_cap, surrogate / true likelihood)"""
    weight_cap: Positive = 2.0
    clip: Positive = 0.2
    kl_coefficient: Nats = 0.01
    """weight of the k3 KL to the starting model"""
    normalisation: Literal["sequence", "token"] = "sequence"
    advantage: Literal["mean", "std", "leave_one_out"] = "mean"
    """reward less the group's mean, also divided by its standard deviation, or less the mean of the others"""
    group_size: int = Field(8, ge=2)
    prompts_per_update: int = Field(64, gt=0)
    inner_updates: int = Field(2, gt=0)
    """optimizer steps per batch of rollouts"""
    fresh_views: bool = False
    """draw the boundaries and the prompt mask anew for each inner update, as d1 does; without it once per batch, so that old and reference
    scores are computed once: a quarter fewer denoiser calls an update"""
    prompt_mask_probability: float = Field(0.0, ge=0, le=1)


class RolloutConfig(Config):
    """How training rollouts are decoded and rewarded."""

    temperature: Positive = 1.0
    gamma: Nats = 0.1
    """entropy bound (nats) of rollouts in mode "model" """
    proxy: Literal["entropy", "confidence", "margin"] = "confidence"
    threshold_gammas: tuple[Nats, ...] = Field((2.0, 3.0, 4.0, 6.0), min_length=1)
    """bins (nats) of the learned threshold. The smallest decides how parallel the rollouts are, and so how parallel the model learns to
    decode: a smaller bound is at first always worth more accuracy than it costs speed. Two nats suit answers of a dozen tokens; where rollouts
    at two nats solve nothing, begin lower (benchmarks/notes/experiments.md)"""
    speed_exponent: Nats = 1.0
    """a right answer is worth its task reward * ((L + 1 - NFE) / L) ** speed_exponent, a wrong one at most L ** -speed_exponent; 0 = the task reward alone"""


class OptimizerConfig(Config):
    """AdamW with linear warm-up, then linear decay to ``final_lr_fraction``."""

    lr: Positive = 2e-4
    threshold_lr: Positive = 2e-3
    weight_decay: float = Field(0.0, ge=0)
    warmup_updates: int = Field(10, ge=0)
    final_lr_fraction: float = Field(0.1, ge=0, le=1)
    max_grad_norm: Positive = 1.0


class TrainConfig(Config):
    """Reinforcement learning of a masked diffusion LM: python -m diffpo.train [config.toml] [--flags]."""

    model: str = "tiny-countdown"
    """a shipped model, a folder or a hub id"""
    task: str = "countdown"
    """countdown, countdown4 or sudoku"""
    device: Device = "cpu"
    """auto: a GPU where there is one"""
    name: str = Field("diffpo-countdown", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """of the run; its folder is <runs>/<name>"""
    runs: str = "runs"
    updates: int = Field(800, gt=0)
    """batches of rollouts"""
    max_minutes: Positive | None = None
    """stop training early, with everything saved, after this many minutes"""
    seed: int = Field(0, ge=0)
    heldout: int = Field(1000, gt=0)
    """held-out problems of the evaluations before and after"""
    split: Literal["test", "validation"] = "test"
    """where they come from: validation while settings are being chosen, so that the test split stays unseen"""
    sweep: bool = True
    """evaluate a sweep of untrained rules too, before and after; without it only one token at a time and the rule that was trained"""
    compile: bool = False
    """torch.compile the network's layers: 20 s to start on a CPU with a C++ compiler, then a quarter less time for each update of a tiny model"""
    save_every: int = Field(25, gt=0)
    """updates between checkpoints"""
    resume: bool = False
    """continue the run in its folder from the newest checkpoint"""
    overwrite: bool = False
    """delete the run's folder first"""
    allow_config_change: bool = False
    """resume although the configuration differs from the one the run began with"""
    dry_run: bool = False
    """print the resolved configuration and stop"""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


T = TypeVar("T", bound=Config)


def parse(
    kind: type[T],
    arguments: list[str] | None = None,
    algorithm_defaults: Callable[[str], dict[str, Any]] | None = None,
) -> T:
    """The configuration of a command: defaults, then an optional TOML file (the first argument), then flags.

    ``algorithm_defaults``: from an algorithm's name the settings it brings along, by table, below the TOML file and the flags.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    values: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        values = read_toml(Path(arguments.pop(0)))
    if algorithm_defaults is not None:
        name = _flag(arguments, "--algorithm.name") or _table(values, "algorithm").get("name", "diffpo")
        for table, settings in algorithm_defaults(str(name)).items():
            values[table] = settings | _table(values, table)
        values["algorithm"] = _table(values, "algorithm") | {"name": name}
    try:
        command = f"python -m diffpo.{kind.__name__.removesuffix('Config').lower()}"
        return tyro.cli(kind, prog=command, args=arguments, default=kind(**values), description=kind.__doc__)
    except ValidationError as error:
        fail(explain(error, kind))


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        fail(f"{name}: must be a table, got {found!r}")
    return found


def _flag(arguments: list[str], name: str) -> str | None:
    """The value of one flag, without reading the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value")
    return parser.parse_known_args(arguments)[0].value


def read_toml(path: Path) -> dict[str, Any]:
    try:
        text = decode(path.read_bytes(), f"config file {path}")
    except OSError as error:
        fail(f"config file {path}: {error.strerror}")
    except ValueError as error:
        fail(str(error))
    try:
        return tomllib.loads(text)
    except RecursionError:
        fail(f"config file {path} is not valid TOML: it is nested too deeply")
    except ValueError as error:  # TOMLDecodeError, or Python's limit on the digits of an integer
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
