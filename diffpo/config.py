"""Configuration: frozen pydantic models, a TOML file and the command line. Later sources win: defaults, TOML, flags.

An unknown key, a wrong type or an impossible value ends the program with exit code 2 before anything is loaded or created.
"""

import difflib
import io
import itertools
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

from diffpo.dependencies import require
from diffpo.runs.faults import fail
from diffpo.text_input import decode

require("pydantic", "tyro")

# The other configurations take Field and model_validator from here, after the check.
import tyro  # noqa: E402
from pydantic import (  # noqa: E402, F401
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo  # noqa: E402

# NaN fails every comparison, so that a bound refuses it
Nats = Annotated[float, Field(ge=0)]  # infinite: no bound
Limit = Annotated[float, Field(gt=0)]  # infinite: no limit
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e30)]  # the optimizer multiplies it in fp32
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
Rows = Annotated[int, Field(gt=0, le=2**16)]  # of a batch
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Device = Literal["cpu", "cuda", "auto"]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]  # bytes of a file name
FolderName = Annotated[str, Field(pattern=r"^[^\x00]*$")]

_TOML_BYTES = 2**20
# Tables within tables within tables: tomllib takes minutes over such a key, and nothing here is deeper than two.
_DEEP_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")
_MOST_FAULTS = 5  # in one message
_UNRECOGNIZED = "Unrecognized options: "  # as tyro says it
_ONE_CHOICE = re.compile(
    r"Error parsing (\S+): Could not parse arguments \[(.*)\] into tuple type typing\.Tuple\[typing\.Literal\[(.*)\]\]"
)  # how tyro refuses a word of a list with one choice


class Config(BaseModel):
    """Base of all configurations: immutable, unknown keys are errors, true and false are no numbers, integers have 64 bits.

    Of what files and commands of earlier versions may say: renamed: old name -> field, which works; replaced: old name -> what to give
    instead, for the error. help_flags: what --help needs in front of it to show this configuration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", use_attribute_docstrings=True)
    renamed: ClassVar[dict[str, str]] = {}
    replaced: ClassVar[dict[str, str]] = {}
    help_flags: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _by_their_names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for old, name in cls.renamed.items():
            if old in given and name in given:
                raise ValueError(f"{old} is now called {name}: give one of them")
        return {cls.renamed.get(name, name): value for name, value in given.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _no_disguised_number(cls, value: Any, info: ValidationInfo) -> Any:
        name, items = info.field_name, value if isinstance(value, list | tuple) else [value]
        holds_flag = any(isinstance(item, bool) for item in items)
        if holds_flag and name is not None and cls.model_fields[name].annotation is not bool:
            raise ValueError("true and false are no values of this field")
        if any(isinstance(item, int) and not -(2**63) <= item < 2**63 for item in items):
            raise ValueError("an integer of at most 64 bits is needed")
        return value


class ModelSize(Config):
    hidden_size: int = Field(128, gt=0, le=2**14)
    intermediate_size: int = Field(384, gt=0, le=2**16)
    num_hidden_layers: int = Field(4, gt=0, le=2**8)
    num_attention_heads: int = Field(4, gt=0, le=2**10)


class PretrainConfig(Config):
    """Train a tiny masked diffusion LM from scratch."""

    task: str = "countdown"
    """countdown, sudoku or medley"""
    start: str = ""
    """a shipped model or a folder to go on from, which then decides the size; none = from scratch. Give another --seed than it was made
    with: the seed decides the examples"""
    device: Device = "auto"
    """auto: a GPU where there is one"""
    output: FolderName = "runs/pretrained"
    """folder for the checkpoint; must be new or empty"""
    steps: Count = 2250
    batch_size: Rows = 256
    lr: Rate = 1.5e-3
    warmup_steps: Count = 100
    final_lr_fraction: Fraction = 1.0
    """the learning rate falls linearly to this share of --lr at the last step; 1 = it stays"""
    weight_decay: NonNegative = 0.01
    bf16: bool = False
    """multiply matrices in bfloat16 (the weights stay fp32)"""
    compile: bool = False
    """compile the layers (torch.compile)"""
    seed: Seed = 0
    heldout: Count = 1000
    """held-out problems of the final evaluation"""
    model: ModelSize = ModelSize()

    @model_validator(mode="after")
    def _model_fits(self) -> "PretrainConfig":
        size = self.model
        of_layer = 4 * size.hidden_size**2 + 3 * size.hidden_size * size.intermediate_size
        if size.num_hidden_layers * of_layer > 2**31:
            raise ValueError(
                f"model: {size.num_hidden_layers} layers of {of_layer} parameters are more than 2^31: choose a smaller size"
            )
        return self


T = TypeVar("T", bound=Config)


def parse(kind: type[T], arguments: list[str] | None = None) -> T:
    """The configuration of a command: defaults, then an optional TOML file (the first argument), then flags.

    Each value of the file is checked alone; what the settings say together is checked once, after the flags.
    """
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
        defaults: Config = kind(**values)
    except ValidationError as error:
        if any(fault["loc"] for fault in error.errors()):
            fail(explain(error, kind))
        defaults = _unchecked(kind, values)  # the settings do not fit together: flags may still change one
    try:
        return kind(**_with_flags(kind, flags, defaults))
    except ValidationError as error:
        fail(explain(error, kind))


def _with_flags(kind: type[Config], arguments: list[str], defaults: Config) -> dict[str, Any]:
    """All values, those of flags as their types say and otherwise unchecked. A mistake ends the program in one line."""
    command = f"python -m diffpo.{kind.__name__.removesuffix('Config').lower()}"
    tables = dict(_tables(kind))
    renamed = {f"{prefix}{old}": f"{prefix}{name}" for prefix, t in tables.items() for old, name in t.renamed.items()}
    replaced = {
        _plain(f"{prefix}{old}"): instead for prefix, t in tables.items() for old, instead in t.replaced.items()
    }
    named = [argument.partition("=") for argument in arguments]
    for flag, _, _ in named:
        if _plain(flag) in replaced:
            fail(f"unknown flag {flag}: {replaced[_plain(flag)]}")
    arguments = [renamed.get(flag, flag) + equals + value for flag, equals, value in named]
    _refuse_lists_given_twice(kind, arguments)
    with redirect_stderr(io.StringIO()) as drawn:
        try:
            values: Any = tyro.cli(  # dicts, by _values
                kind, prog=command, args=arguments, default=defaults, description=kind.__doc__, registry=_VALUES
            )
            return values
        except SystemExit as stopped:
            if not stopped.code:  # --help
                raise
    message = _one_line(drawn.getvalue())
    if message.startswith(_UNRECOGNIZED):
        message = _unknown(kind, arguments, message.removeprefix(_UNRECOGNIZED)) or message
    fail(f"{message}; see {command} {kind.help_flags}--help")


def _refuse_lists_given_twice(kind: type[Config], arguments: list[str]) -> None:
    """The second would replace the first, without a word."""
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for flag, annotation in _flags(kind):
        is_list = any(get_origin(part) is tuple for part in (annotation, *get_args(annotation)))
        if is_list and given.count(flag) > 1:
            fail(f"{flag} is given twice: put all its values behind one")


def _unknown(kind: type[Config], arguments: list[str], words: str) -> str:
    """What is said of the first flag that there is not, or of a config file that is not the first word; empty where it is neither."""
    known = [flag for flag, _ in _flags(kind)]
    for flag in (argument.partition("=")[0] for argument in arguments):
        if re.match("--[a-z]", flag) and _plain(flag) not in known:
            return f"unknown flag {flag}; nearest: {', '.join(nearest(flag, known))}"
    file = words.partition(",")[0].partition(";")[0]
    return f"the config file comes first: give {file} in front of the flags" if file.endswith(".toml") else ""


def _plain(flag: str) -> str:
    """With hyphens, and without the "no-" of a switch that is turned off."""
    return re.sub(r"^--(.*\.)?no-", r"--\1", flag.replace("_", "-"))


def _flags(kind: type[Config]) -> Iterator[tuple[str, Any]]:
    """The flag of each value and its type."""
    for prefix, owner in _tables(kind):
        for name, field in owner.model_fields.items():
            if not _is_config(field.annotation):
                yield f"{prefix}{name}".replace("_", "-"), field.annotation


def _one_line(drawn: str) -> str:
    """What tyro says in a box of several lines, which has rules of dashes and a title inside where the output is not UTF-8."""
    lines = [line.strip("│ \t") for line in drawn.splitlines() if line[:1] not in "╭╰"]
    if len(lines) > 1 and set(lines[1]) == {"-"}:
        del lines[0]
    text = " ".join(line for line in lines if not set(line) <= set("─-"))
    message, _, similar = text.partition("For full helptext")[0].partition("Perhaps you meant:")
    message = re.split(" Got errors: | Argument helptext:", message)[0].strip()
    nearest = re.findall(r"--[a-z][-a-z0-9_.]*", similar)
    message = re.sub(_ONE_CHOICE, r"invalid choice \2 for argument '\1'. Expected one of (\3)", message.rstrip("."))
    return f"{message}{'; nearest: ' + ', '.join(dict.fromkeys(nearest)) if nearest else ''}"


def _tables(kind: type[Config], prefix: str = "--") -> Iterator[tuple[str, type[Config]]]:
    """What the flags of each table begin with, and its configuration."""
    yield prefix, kind
    for name, field in kind.model_fields.items():
        if _is_config(field.annotation):
            yield from _tables(field.annotation, f"{prefix}{name}.")


_VALUES = ConstructorRegistry()


@_VALUES.struct_rule
def _values(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro returns configurations as dicts, so that they are checked once, with the messages of ``explain``."""
    kind = info.type
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        return None
    types = get_type_hints(kind, include_extras=True)
    fields = (
        StructFieldSpec(name, types[name], getattr(info.default, name), field.description)
        for name, field in kind.model_fields.items()
    )
    return StructConstructorSpec(instantiate=dict, fields=tuple(fields))


def _unchecked(kind: type[Config], values: dict[str, Any]) -> Config:
    values = {kind.renamed.get(name, name): value for name, value in values.items()}
    fields: dict[str, Any] = {
        name: _unchecked(field.annotation, values.get(name, {})) if _is_config(field.annotation) else values[name]
        for name, field in kind.model_fields.items()
        if name in values or _is_config(field.annotation)
    }
    return kind.model_construct(**fields)


def _is_config(annotation: object) -> TypeGuard[type[Config]]:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def table(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        fail(f"{name}: must be a table, got {_shown(found)}")
    return found


def flag(arguments: list[str], name: str) -> str | None:
    """The last value of one flag, without reading the others."""
    found = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == name:
            found = following
        elif argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
    return found


def read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_TOML_BYTES + 1)
    except OSError as error:
        fail(f"config file {path}: {error.strerror}")
    if len(content) > _TOML_BYTES:
        fail(f"config file {path} is longer than {_TOML_BYTES} bytes")
    try:
        text = decode(content, f"config file {path}")
    except ValueError as error:
        fail(str(error))
    if _DEEP_KEY.search(text):
        fail(f"config file {path}: a key of more than 32 parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        fail(f"config file {path} is not valid TOML: it is nested too deeply")
    except ValueError as error:  # TOMLDecodeError, or Python's limit on the digits of an integer
        fail(f"config file {path} is not valid TOML: {error}")


def explain(error: ValidationError, kind: type[Config]) -> str:
    """Each fault: the field, what was wrong, and for an unknown field the nearest valid names."""
    found = []
    faults = [fault for fault in error.errors() if not _follows(fault, error)]
    for fault in faults[:_MOST_FAULTS]:
        field = ".".join(str(part) for part in fault["loc"])
        reason = "must be a table" if fault["type"] == "model_type" else fault["msg"].removeprefix("Value error, ")
        # a table whose settings do not fit together says which, and its other values would only hide it
        shown = "" if isinstance(fault["input"], dict) else f", got {_shown(fault['input'])}"
        message = f"{field}: {reason}{shown}" if field else reason
        if fault["type"] == "extra_forbidden":
            owner = kind
            for part in fault["loc"][:-1]:
                annotation = owner.model_fields[str(part)].annotation
                owner = annotation if _is_config(annotation) else owner
            name = str(fault["loc"][-1])
            near = f"; nearest: {', '.join(nearest(name, owner.model_fields))}"
            message = f"unknown key {field!r}" + (f": {owner.replaced[name]}" if name in owner.replaced else near)
        found.append(message)
    more = [f"and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
    return "; ".join([*found, *more])


def _follows(fault: Any, error: ValidationError) -> bool:
    """Whether a list is only too short because one of its items was at fault."""
    place = fault["loc"]
    return fault["type"] == "too_short" and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in error.errors()
    )


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python does not print an integer of thousands of digits
        return (
            f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "a value that cannot be printed"
        )
    return text if len(text) <= 80 else f"{text[:80]}..."


def nearest(name: str, valid: Iterable[str]) -> list[str]:
    """The valid names closest to ``name``, best first."""
    return difflib.get_close_matches(name, list(valid), n=3, cutoff=0.0)
