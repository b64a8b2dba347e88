"""What ``python -m diffpo.generate`` does: read prompts, decode them, write each row as soon as it is finished."""

import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

import torch

from diffpo.completion_file import CompletionFile, StandardOutput, check_target, completion_record
from diffpo.config import Field, field_validator, model_validator, parse
from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import Generation, check_lengths, stream
from diffpo.decoding.prompts import PromptError
from diffpo.decoding_config import DecodingConfig
from diffpo.device import choose_device
from diffpo.models.checkpoints import load, resolve, write_atomically
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.prompt_file import Format, Prompt, as_chats, numbered_prompts, prompt_text
from diffpo.runs import command
from diffpo.runs.command import carry_out
from diffpo.runs.digests import model_inputs
from diffpo.runs.progress import Console, progress_bar
from diffpo.runs.provenance import command_provenance
from diffpo.trace import trace_page

_DEFAULT_BLOCK = 32
_REPORT_SECONDS = 10.0  # between progress lines where no live display is possible


class GenerateConfig(DecodingConfig):
    """Complete prompts: python -m diffpo.generate ["a prompt" ...] [--input FILE] [config.toml] [--flags]."""

    prompt: tuple[str, ...] = ()
    """prompts on the command line; also without the flag"""
    input: str | None = None
    """a file of prompts, - for standard input: text (one prompt per line) or JSONL (objects with prompt, a string or messages, or with
    messages; a last message of the assistant is continued)"""
    input_format: Format | None = None
    """default: jsonl for a file named so (.jsonl, .ndjson, .json) or with lines that look like JSON objects, otherwise text"""
    chat: bool = False
    """prompts are user messages, put into the tokenizer's chat template"""
    system: str | None = None
    """system message of every chat that has none"""
    model: str = "tiny-countdown-diffpo"
    """a shipped model, a folder or a hub id"""
    revision: str | None = None
    """of a hub id: branch, tag or commit"""
    device: str = "auto"
    """auto: a GPU where there is one"""
    gen_length: int = Field(128, gt=0)
    """tokens to decode per prompt"""
    block_length: int | None = Field(None, gt=0)
    """tokens; must divide gen_length; default 32, or gen_length if that is shorter"""
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    """0 takes the most probable token"""
    seed: int = Field(0, ge=0)
    cfg_scale: float = Field(0.0, ge=0, allow_inf_nan=False)
    """classifier-free guidance; 0 = off"""
    stop: tuple[str, ...] = ()
    """strings; a completion ends before the first of them. They may hold special tokens, e.g. "<|eot_id|>" """
    output: Path | None = None
    """JSONL file, one object per prompt, written row by row; default, and -, standard output"""
    resume: bool = False
    """continue output: prompts it already holds are skipped. Model, rule, seed and the other settings must be the same"""
    overwrite: bool = False
    """replace output and trace if they exist"""
    statistics: bool = False
    """also write each token's log-prob and entropy (nats); trace does so too"""
    trace: Path | None = None
    """HTML page that draws the denoising, self-contained"""

    @field_validator("output")
    @classmethod
    def _dash_is_standard_output(cls, path: Path | None) -> Path | None:
        return None if path == Path("-") else path

    @field_validator("trace")
    @classmethod
    def _a_page_is_a_file(cls, path: Path | None) -> Path | None:
        if path == Path("-"):
            raise ValueError("a page is no standard output: give a file")
        return path

    @model_validator(mode="after")
    def _consistent(self) -> "GenerateConfig":
        if self.prompt and self.input is not None:
            raise ValueError("prompt and input exclude each other")
        if any(not prompt.strip() for prompt in self.prompt):
            raise ValueError("prompt: must not be blank")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if self.resume and self.output is None:
            raise ValueError("resume: needs the output file to continue, --output FILE")
        return self

    @property
    def tokens_per_block(self) -> int:
        return self.block_length or min(_DEFAULT_BLOCK, self.gen_length)


def main(arguments: list[str] | None = None) -> int:
    """The exit code, see ``diffpo.runs.faults``: every finished row is kept in the output file, however the command ends."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = parse(GenerateConfig, _prompts_as_flag(arguments))
    return carry_out(lambda: prepare(config, arguments))


def prepare(config: GenerateConfig, arguments: list[str]) -> "Run":
    """ValueError or OSError for everything that does not fit together, before the first row and before a file is changed."""
    check_lengths(config.gen_length, config.tokens_per_block)  # before a large model is read
    _check_files_differ(config)
    places, prompts = _read(config)
    if config.trace is not None:
        check_target("trace", config.trace)
        if config.trace.exists() and not (config.overwrite or config.resume):
            raise ValueError(f"trace {config.trace} exists: --overwrite replaces it")
    output = CompletionFile(config.output, config.overwrite, config.resume) if config.output else StandardOutput()
    try:
        return Run(config, places, prompts, output, arguments)
    except BaseException:
        output.close()
        raise


def _prompts_as_flag(arguments: list[str]) -> list[str]:
    """``["x.toml", "a prompt", "--flag", "value", "another"]`` -> ``["x.toml", "--prompt", "a prompt", "another", "--flag", "value"]``.

    Prompts behind --prompt and prompts without it are one list, in their order.
    """
    toml = arguments[:1] if arguments and arguments[0].endswith(".toml") else []
    prompts, flags = [], []
    values: float = 0  # that belong to the flag before
    for word in arguments[len(toml) :]:
        if values == 1:  # whatever it looks like: "-" and "-1" are values
            flags.append(word)
            values = 0
        elif word == "--prompt":
            values = 0  # what follows are prompts as they are anywhere
        elif word.startswith("--prompt="):
            prompts.append(word.removeprefix("--prompt="))
            values = 0
        elif word.startswith("-"):
            flags.append(word)
            values = _values_of(word)
        elif values:
            flags.append(word)
        else:
            prompts.append(word)
    return [*toml, *(["--prompt", *prompts] if prompts else []), *flags]


def _values_of(flag: str) -> float:
    """How many words behind a flag belong to it: of a list all, up to the next flag."""
    name = flag.removeprefix("--").replace("-", "_")
    name = GenerateConfig.renamed.get(name, name)
    if name not in GenerateConfig.model_fields:  # --no-chat, --gamma=1, or a mistake
        return 0
    kind = GenerateConfig.model_fields[name].annotation
    return 0 if kind is bool else math.inf if get_origin(kind) is tuple else 1


def _check_files_differ(config: GenerateConfig) -> None:
    """ValueError where what is written would replace the prompts or the other output."""
    files = {"input": None if config.input == "-" else config.input, "output": config.output, "trace": config.trace}
    given = {name: os.path.realpath(path) for name, path in files.items() if path is not None}
    for (name, path), (other, second) in itertools.combinations(given.items(), 2):
        if path == second or (os.path.exists(path) and os.path.exists(second) and os.path.samefile(path, second)):
            raise ValueError(f"{name} and {other} are the same file {path}: give {other} another name")


def _read(config: GenerateConfig) -> tuple[list[str], list[Prompt]]:
    """The words that name each prompt in a message, and the prompts."""
    if config.prompt:
        numbered: list[tuple[str, Prompt]] = [
            (f"prompt {number}", prompt) for number, prompt in enumerate(config.prompt, 1)
        ]
    elif config.input is None and sys.stdin.isatty():
        raise ValueError("no prompt: give one on the command line, --input FILE, or on standard input")
    else:
        numbered = numbered_prompts(config.input or "-", config.input_format)
    places, prompts = zip(*numbered, strict=True)
    return list(places), as_chats(list(prompts), config.chat, config.system)


def load_model(config: GenerateConfig) -> MaskedDiffusionLM:
    """ValueError for a device torch does not know or a model whose tokenizer cannot encode the prompts."""
    device = choose_device(config.device)
    model = load(config.model, device, config.dtype, config.revision)
    if model.tokenizer is None:
        raise ValueError(f"model {config.model} has no tokenizer: put tokenizer.json into its folder")
    return model


def made_with(config: GenerateConfig, model: MaskedDiffusionLM) -> dict[str, object]:
    """What decides a completion beside its prompt, as JSON values; model and tokenizer by their content, not their name."""
    return model_inputs(*resolve(config.model, model.source.revision if model.source else None)) | {
        "rule": repr(config.commit_rule(model, config.gen_length).resolve(model)),
        "gen_length": config.gen_length,
        "block_length": config.tokens_per_block,
        "temperature": config.temperature,
        "seed": config.seed,
        "cfg_scale": config.cfg_scale,
        "stop": list(config.stop),
        "cache": config.cache,
        "cache_refresh": config.cache_refresh,
        "statistics": config.statistics,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
    }


class Run(command.Run):
    """Decode what is missing, write row by row, report, draw."""

    faults = (FloatingPointError,)

    def __init__(
        self,
        config: GenerateConfig,
        places: list[str],
        prompts: list[Prompt],
        output: CompletionFile | StandardOutput,
        arguments: list[str],
    ):
        """ValueError or OSError unless the model can decode the prompts, and the file to resume was made as this run would make it."""
        super().__init__()
        self.config, self.places, self.prompts, self.output = config, places, prompts, output
        self.missing = self._missing()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.readable = len(prompts) == 1 and config.output is None and sys.stdout.isatty()
        self.records: list[dict] = []
        self.model: MaskedDiffusionLM | None = None
        self.rows: Iterator[tuple[int, Generation]] = iter(())
        if self.missing or config.trace or output.earlier:
            self.model = load_model(config)
            if isinstance(output, CompletionFile):  # the settings hold what was read
                output.begin(made_with(config, self.model), command_provenance("generate", arguments, {}))
            if self.missing:
                self.rows = iter(self._rows(self.model))

    def _missing(self) -> list[int]:
        """Indices without a row yet. ValueError when the file to resume was made from other prompts or another length."""
        for row in self.output.earlier:
            index = row["index"]
            if not (0 <= index < len(self.prompts)) or row["prompt"] != self.prompts[index]:
                raise ValueError(
                    f"resume: {self.config.output} holds index {index} with a prompt that the input does not"
                )
            if len(row["tokens"]) != self.config.gen_length:
                raise ValueError(
                    f"resume: {self.config.output} holds completions of {len(row['tokens'])} tokens, gen_length is "
                    f"{self.config.gen_length}: give the same one"
                )
        done = {row["index"] for row in self.output.earlier}
        return [index for index in range(len(self.prompts)) if index not in done]

    def work(self) -> None:
        started = time.perf_counter()
        rows_on_terminal = self.config.output is None and sys.stdout.isatty() and not self.readable
        statistics = self.config.statistics or self.config.trace is not None
        with Reporter(self.console, len(self.missing), live=not rows_on_terminal) as reporter:
            for place, completion in iter(self._next, None):
                index = self.missing[place]
                record = completion_record(index, self.prompts[index], completion, statistics)
                if self.readable:
                    reporter.stop()
                    _print_readable(record)
                else:
                    self.output.write(record)
                self.records.append(record)
                reporter.row(record, time.perf_counter() - started)

    def _next(self) -> tuple[int, Generation] | None:
        try:
            return self.interruption.next_of(self.rows)
        except StopIteration:
            return None

    def progress(self) -> str:
        return f"after {len(self.records)} of {len(self.missing)} prompts"

    def kept(self) -> str:
        return "" if self.config.output is None else f"they are in {self.config.output}, --resume continues"

    def close(self) -> None:
        self.output.close()

    def _rows(self, model: MaskedDiffusionLM) -> Iterator[tuple[int, Generation]]:
        """Place among the missing prompts and completion of each row as it finishes."""
        config = self.config
        if config.chat and (model.tokenizer is None or model.tokenizer.chat_template is None):
            raise ValueError(f"chat: the tokenizer of {config.model} has no chat template: leave --chat out")
        keep_freed_memory()
        try:
            return stream(
                model,
                [self.prompts[index] for index in self.missing],
                gen_length=config.gen_length,
                block_length=config.tokens_per_block,
                rule=config.commit_rule(model, config.gen_length),
                temperature=config.temperature,
                seed=config.seed,
                cfg_scale=config.cfg_scale,
                stop=config.stop,
                row_ids=torch.tensor(self.missing),  # a resumed run draws what the whole one would have drawn
                **config.stream_options(),
            )
        except PromptError as error:
            raise ValueError(f"{self.places[self.missing[error.index]]}: {error.reason}") from error

    def report(self) -> None:
        """The trace, if one was asked for, of every row there is."""
        records = sorted([*self.output.earlier, *self.records], key=lambda record: record["index"])
        if self.config.trace is None or self.model is None or not records:
            return
        facts = {
            "model": self.config.model,
            "rule": repr(self.config.commit_rule(self.model, self.config.gen_length)),
            "temperature": f"{self.config.temperature:g}",
        }
        page = trace_page(records, self.model.tokenizer, facts)
        write_atomically(self.config.trace, lambda path: Path(path).write_text(page, encoding="utf-8"))
        self.console.print(f"trace of {len(records)} prompts: {self.config.trace}", markup=False)


def _print_readable(record: dict) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(prompt_text(record["prompt"]), style="dim", markup=False)
    console.print(record["text"], markup=False)
    console.print(
        f"{record['length']} tokens, {record['nfe']} NFE, {record['tokens_per_forward']:.2f} tokens per forward, "
        f"{record['seconds']:.2f} s, {record['tokens_per_second']:,.0f} tokens/s",
        style="dim",
    )


class Reporter:
    """Progress on standard error: a live display on a terminal, elsewhere a line now and then and one at the end."""

    def __init__(self, console: Console, total: int, live: bool):
        self.console, self.total = console, total
        self.rows = self.tokens = self.nfe = 0
        self._lines = not console.is_terminal
        self._last_line = 0.0
        # standard output carries the rows, so it must stay as it is
        self._progress = progress_bar(
            console, transient=True, redirect_stdout=False, redirect_stderr=False, disable=self._lines or not live
        )
        self._task = self._progress.add_task("decoding", total=total)

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if self.rows and kind is None and (self._lines or self.total > 1):
            self.console.print(self._line, markup=False)

    def stop(self) -> None:
        self._progress.stop()

    def row(self, record: dict, seconds: float) -> None:
        self.rows, self.tokens, self.nfe = self.rows + 1, self.tokens + record["length"], self.nfe + record["nfe"]
        rates = f"{self.tokens / self.nfe:.2f} tokens per forward, {self.tokens / seconds:,.0f} tokens/s"
        self._line = f"{self.rows}/{self.total} prompts, {self.nfe / self.rows:.1f} NFE, {rates}"
        self._progress.update(self._task, advance=1, description=rates)
        if self._lines and seconds - self._last_line > _REPORT_SECONDS and self.rows < self.total:
            self._last_line = seconds
            self.console.print(self._line, markup=False)
