"""``python -m diffpo.evaluate``: accuracy, NFE and speed of a model on gsm8k, math500, countdown or sudoku.

In format chat it decodes as d1 does: no examples, one user turn of format instruction and question, the assistant's turn begun with
<reasoning>, temperature 0, blocks of 32, steps = gen_length / 2. The instruction is ours unless --instruction gives a paper's, verdicts
and rewards are mathematical ones unless --protocol d1 asks for those of d1's own scripts. Writes runs/<name>/: items.jsonl, a line per problem as soon as it is
done, and summary.json. Ctrl-C or SIGTERM stops with exit code 0 and everything done saved; ``--resume`` continues.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffpo.completion_file import gamma_value
from diffpo.config import Count, FolderName, Rows, RunName, parse
from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import Generation, check_lengths, stream
from diffpo.decoding.rules import Rule
from diffpo.decoding_config import DecodingConfig, RuleName
from diffpo.dependencies import require
from diffpo.device import choose_device
from diffpo.models.checkpoints import load, resolve
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.runs import command
from diffpo.runs.digests import model_inputs
from diffpo.runs.item_log import ItemLog
from diffpo.runs.json_lines import finite
from diffpo.runs.progress import progress_bar
from diffpo.runs.provenance import module_command, portable, provenance
from diffpo.runs.run_folder import MayChange, RunFolder
from diffpo.tasks import ChatTask, Protocol, Task, get_chat_task
from diffpo.tasks.data import hub_problems, local_problems
from diffpo.tasks.grading import TaskError, graded
from diffpo.tasks.prompts import chat_prompts, check_no_mask, compact_prompts, read_instruction
from diffpo.training.evaluation import check_vocabulary

CHAT_GEN_LENGTH, CHAT_BLOCK_LENGTH = 256, 32
GENERATED_PROBLEMS = 1000
# what a continued run may do otherwise; the content of model and data is compared instead of their names
_FREE_ON_RESUME = ("batch_size", "device", "model", "revision", "data", "instruction")


class EvaluateConfig(DecodingConfig):
    """Measure a model on a task: accuracy, network evaluations and speed of greedy decoding (temperature 0)."""

    model: str = "tiny-countdown"
    """shipped model, folder or hub id"""
    revision: str | None = None
    """of a hub id: branch, tag or commit"""
    task: str = "countdown"
    """countdown, countdown4, gsm8k, math500 or sudoku"""
    data: str = ""
    """jsonl, csv or parquet file of the published format; without one, gsm8k and math500 are read from the hub, countdown and
    sudoku generate their test split"""
    limit: Count | None = None
    """the first problems only; of a generated test split, 1000 by default"""
    format: Literal["auto", "chat", "compact"] = "auto"
    """chat: one user turn, the answer begun with <reasoning>; compact: the words of a tiny model; auto: chat if the
    model's tokenizer has a chat template"""
    protocol: Protocol = "strict"
    """how answers are judged in format chat. strict: right is what is mathematically right; d1: verdicts and rewards as d1's own scripts
    give them (arXiv 2504.12216), of sudoku the reward is the share of right cells that d1 reports as accuracy"""
    instruction: FolderName = ""
    """UTF-8 file with the text that replaces the task's format instruction in front of the question, for a paper's exact prompt"""
    gen_length: Count | None = None
    """tokens of a completion; default 256 in chat, the task's own in compact"""
    block_length: Count | None = None
    """tokens decoded before the next ones are begun; default 32 in chat, the task's own in compact"""
    rule: RuleName = "fixed"
    """as in DecodingConfig; fixed is the protocol's"""
    steps: Count | None = None
    """of fixed; default gen_length / 2"""
    batch_size: Rows = 32
    """problems decoded together; it does not change the results"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one"""
    name: RunName = "evaluation"
    """of the run; its folder is <runs>/<name>"""
    runs: FolderName = "runs"
    resume: bool = False
    """continue the run in its folder: problems that are done are not decoded again"""
    overwrite: bool = False
    """delete what an earlier run wrote into the folder first; refused if it holds anything else"""
    dry_run: bool = False
    """print the resolved configuration and stop"""


def main(arguments: list[str] | None = None) -> int:
    """The exit code, see ``diffpo.runs.faults``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = parse(EvaluateConfig, arguments)
    return command.carry_out(lambda: _run(config, arguments))


def _run(config: EvaluateConfig, arguments: list[str]) -> "Run | None":
    task = get_chat_task(config.task, config.protocol)
    if config.dry_run:
        print(config.model_dump_json(indent=2))
        return None
    require(*task.packages)
    keep_freed_memory()
    return Run(prepare(config, task), arguments)


@dataclass(frozen=True)
class Evaluation:
    """Everything that is decided before the first network evaluation. config: with every default filled in; prompts: token ids
    int64 [P_i] of each problem; inputs: digests of the model, its tokenizer, the data and the prompts."""

    config: EvaluateConfig
    task: ChatTask
    problems: list
    prompts: list[Tensor]
    model: MaskedDiffusionLM
    rule: Rule
    inputs: dict[str, str]


def prepare(config: EvaluateConfig, task: ChatTask) -> Evaluation:
    """Read the instruction, the data, then the model. ValueError or OSError for anything that does not fit together."""
    if config.instruction:
        task.instruction = read_instruction(config.instruction)
    problems, data_revision = read_problems(config, task)
    folder, commit = resolve(config.model, config.revision)
    device = choose_device(config.device)
    model = load(folder, device, config.dtype)
    config = filled_in(config, task, model, device.type)
    prompts = encoded(config, task, problems, model)
    check_lengths(config.gen_length, config.block_length)
    check_context(prompts, config.gen_length, model)
    check_no_mask(prompts, model.mask_id)
    rule = config.commit_rule(model, config.gen_length).resolve(model)
    rule.check(model, len(prompts), config.gen_length, config.block_length)
    inputs = model_inputs(folder, commit) | {
        "data": data_revision,
        "instruction": text_digest(task.instruction),
        "prompts": prompts_digest(prompts),
    }
    return Evaluation(config, task, problems, prompts, model, rule, inputs)


def prompts_digest(prompts: list[Tensor]) -> str:
    """ "sha256:..." over all token ids: whatever they came from, a resumed run must ask the same."""
    return text_digest("\n".join(" ".join(map(str, ids.tolist())) for ids in prompts))


def text_digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def encoded(config: EvaluateConfig, task: ChatTask, problems: list, model: MaskedDiffusionLM) -> list[Tensor]:
    """The prompt of every problem in the chosen format."""
    if config.format == "chat":
        return chat_prompts(model.tokenizer, task, problems)
    for field, ours in (("protocol", "strict"), ("instruction", "")):
        if getattr(config, field) != ours:
            raise ValueError(
                f"{field}: {getattr(config, field)} is for chats, and the format is compact: use --format chat"
            )
    if isinstance(task, Task):
        check_vocabulary(model, task)
    return compact_prompts(model.tokenizer, task, problems)


def read_problems(config: EvaluateConfig, task: ChatTask) -> tuple[list, str]:
    """The problems to evaluate, and the revision of the data they are from."""
    if not config.data and isinstance(task, Task):
        try:
            return task.problems("test", config.limit or GENERATED_PROBLEMS, seed=0), "generated: test split, seed 0"
        except ValueError as error:
            raise ValueError(f"limit: {error}") from error
    problems, revision = local_problems(task, config.data) if config.data else hub_problems(task)
    return problems[: config.limit], revision


def filled_in(config: EvaluateConfig, task: ChatTask, model: MaskedDiffusionLM, device: str) -> EvaluateConfig:
    """The configuration with the defaults that depend on model and task."""
    has_template = model.tokenizer is not None and model.tokenizer.chat_template is not None
    natural = "chat" if has_template or not isinstance(task, Task) else "compact"
    chosen = natural if config.format == "auto" else config.format
    own = (task.gen_length, task.block_length) if chosen == "compact" and isinstance(task, Task) else None
    gen_length, block_length = own or (CHAT_GEN_LENGTH, CHAT_BLOCK_LENGTH)
    gen_length = config.gen_length or gen_length
    block_length = config.block_length or min(block_length, gen_length)
    steps = config.steps or max(gen_length // 2, 1) if config.rule == "fixed" else None
    update = {
        "format": chosen,
        "gen_length": gen_length,
        "block_length": block_length,
        "steps": steps,
        "device": device,
    }
    return config.model_copy(update=update)


def check_context(prompts: list[Tensor], gen_length: int, model: MaskedDiffusionLM) -> None:
    """ValueError if a prompt and its completion are longer than the model's context."""
    context = model.config.max_position_embeddings
    too_long = [i for i, prompt in enumerate(prompts) if len(prompt) + gen_length > context]
    if too_long:
        raise ValueError(
            f"{len(too_long)} prompts are too long, first: problem {too_long[0]} has {len(prompts[too_long[0]])} tokens, with "
            f"gen_length {gen_length} more than the model's context of {context}: choose a smaller --gen-length"
        )


class Run(command.Run):
    """Decode what is not done yet, a line per problem, then the summary."""

    faults = (FloatingPointError, TaskError)

    def __init__(self, evaluation: Evaluation, arguments: list[str]):
        """ValueError or OSError if the folder cannot be this run's."""
        super().__init__()
        self.evaluation, self.arguments = evaluation, arguments
        self.console = Console(highlight=False, soft_wrap=True)
        config = evaluation.config
        self.folder = RunFolder(
            Path(config.runs) / config.name, "evaluate", json.loads(config.model_dump_json()), evaluation.inputs,
            resume=config.resume, overwrite=config.overwrite, may_change=MayChange(_FREE_ON_RESUME),
        )  # fmt: skip
        items = self.folder.path / "items.jsonl"
        with self.folder.released_on_error():
            if self.folder.resumes:
                ItemLog(items).check(len(evaluation.problems))
            self.folder.begin()
            self.log = ItemLog(items)

    def work(self) -> None:
        with progress_bar(self.console) as progress:
            bar = progress.add_task("", total=len(self.evaluation.problems))
            for _ in self._items():
                solved, done = sum(item["correct"] is True for item in self.log.items.values()), len(self.log.items)
                description = f"{self.evaluation.config.task}: {solved / done:.1%} right"
                progress.update(bar, completed=done, description=description)

    def progress(self) -> str:
        return f"after {len(self.log.items)} of {len(self.evaluation.problems)} problems"

    def kept(self) -> str:
        return "continue with --resume"

    def close(self) -> None:
        self.log.close()
        self.folder.release()

    def _items(self) -> Iterator[dict]:
        """Decodes the problems that are not in the log, and writes each into it as it is done."""
        evaluation, config = self.evaluation, self.evaluation.config
        todo = [index for index in range(len(evaluation.problems)) if index not in self.log.items]
        if not todo:
            return
        prompts = [evaluation.prompts[index] for index in todo]
        rows = stream(evaluation.model, prompts, config.gen_length, config.block_length, evaluation.rule,
                      **config.stream_options())  # fmt: skip
        while (row := self._next(rows)) is not None:
            (position, generation), seconds = row
            item = scored(evaluation, todo[position], generation, seconds)
            self.log.write(item)
            yield item

    def _next(self, rows: Iterator[tuple[int, Generation]]) -> tuple[tuple[int, Generation], float] | None:
        """The next finished row and the seconds it took: checking answers is no decoding."""
        started = time.perf_counter()
        with self.interruption.at_once():
            row = next(rows, None)
        return None if row is None else (row, time.perf_counter() - started)

    def report(self) -> None:
        """The summary of all that is done."""
        if not self.log.items:
            return
        summary = summarise(self.evaluation, list(self.log.items.values()))
        summary["provenance"] = {
            **provenance(command=module_command("diffpo.evaluate", self.arguments)),
            **{f"{name}_revision": digest for name, digest in self.evaluation.inputs.items()},
        }
        self.folder.write("summary.json", json.dumps(finite(summary), indent=2) + "\n")
        self.console.print(summary_table(summary))
        self.console.print(f"items.jsonl and summary.json are in {self.folder.path}")


def scored(evaluation: Evaluation, index: int, generation: Generation, seconds: float) -> dict:
    """The line of one problem. tokens: up to and including the first EOS; seconds: of decoding, since the row before."""
    task, problem, trajectory = evaluation.task, evaluation.problems[index], generation.trajectory
    completion = generation.text[0]
    grade = graded(task, problem, task.prefill + completion if evaluation.config.format == "chat" else completion)
    return {
        "index": index,
        "problem": dataclasses.asdict(problem),
        "completion": completion,
        "correct": grade.correct,
        "reward": grade.reward,
        "nfe": trajectory.nfe.item(),
        "tokens": trajectory.length.item(),
        "prompt_tokens": len(evaluation.prompts[index]),
        "gamma": gamma_value(trajectory),
        "seconds": seconds,
    }


def summarise(evaluation: Evaluation, items: list[dict]) -> dict:
    """The numbers of the problems done so far; an undecided answer counts as not right. NFE and tokens are means per problem."""
    config, count = evaluation.config, len(items)
    right = sum(item["correct"] is True for item in items)
    rewards = [item["reward"] for item in items if item["reward"] is not None]
    tokens, nfe, seconds = (sum(item[name] for item in items) for name in ("tokens", "nfe", "seconds"))
    settings = json.loads(config.model_dump_json(exclude={"name", "runs", "resume", "overwrite", "dry_run"}))
    return {
        "config": settings | {name: portable(getattr(config, name)) for name in ("model", "data", "instruction")},
        "rule": repr(evaluation.rule),
        "problems": len(evaluation.problems),
        "done": count,
        "right": right,
        "undecided": sum(item["correct"] is None for item in items),
        "accuracy": right / count,
        "accuracy_interval_95": wilson_interval(right, count),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "nfe": nfe / count,
        "tokens": tokens / count,
        "tokens_per_forward": tokens / nfe,
        "tokens_per_second": tokens / seconds,
        "decoding_seconds": seconds,
    }


def wilson_interval(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share of ``count`` independent trials (Wilson 1927), at 95% by default."""
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def summary_table(summary: dict) -> Table:
    config, (low, high) = summary["config"], summary["accuracy_interval_95"]
    table = Table(
        title=f"{config['model']} on {config['task']}: {summary['done']} of {summary['problems']} problems",
        show_header=False,
    )
    table.add_row("decoding", f"{summary['rule']}, {config['gen_length']} tokens in blocks of {config['block_length']}")
    table.add_row("accuracy", f"{summary['accuracy']:.1%}  (95% interval {low:.1%} to {high:.1%})")
    if summary["undecided"]:
        table.add_row("undecided", f"{summary['undecided']} answers that could not be decided, counted as not right")
    if summary["mean_reward"] is not None:
        table.add_row("mean reward", f"{summary['mean_reward']:.3f}")
    table.add_row("NFE", f"{summary['nfe']:.2f}")
    table.add_row("tokens", f"{summary['tokens']:.1f}")
    table.add_row("tokens per forward", f"{summary['tokens_per_forward']:.2f}")
    table.add_row("tokens/s", f"{summary['tokens_per_second']:.1f}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
