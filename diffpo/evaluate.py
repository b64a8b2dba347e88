"""``python -m diffpo.evaluate``: accuracy, NFE and speed of a model on gsm8k, math500, countdown, sudoku or medley.

In format chat it decodes as d1 does: no examples, one user turn of format instruction and question, the assistant's turn begun with
<reasoning>, temperature 0, blocks of 32. A model that has learned a threshold is decoded by it, any other with a fixed schedule of gen_length / 2
steps, as d1 does. The instruction is ours unless --instruction gives a paper's, verdicts
and rewards are mathematical ones unless --protocol d1 asks for those of d1's own scripts. Writes runs/<name>/: items.jsonl, a line per problem as soon as it is
graded, at most 32 together, and summary.json. Ctrl-C or SIGTERM stops with exit code 0 and everything done saved; ``--resume`` continues.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from diffpo.config import Count, Device, FolderName, Rows, RunName, model_validator, parse
from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import check_lengths
from diffpo.decoding.rules import Rule
from diffpo.decoding_config import DecodingConfig, RuleConfig, RuleName
from diffpo.dependencies import require
from diffpo.device import choose_device
from diffpo.evaluation import by_kind, evaluated, summarise
from diffpo.models.checkpoints import load, resolve
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.runs import command
from diffpo.runs.digests import model_inputs
from diffpo.runs.faults import output_may_fail
from diffpo.runs.item_log import ItemLog
from diffpo.runs.json_lines import finite
from diffpo.runs.progress import Console, progress_bar
from diffpo.runs.provenance import command_provenance, portable
from diffpo.runs.run_folder import MayChange, RunFolder
from diffpo.tasks import CompactTask, Protocol, PublishedTask, Task, get_task
from diffpo.tasks.grading import TaskError
from diffpo.tasks.prompts import check_context, check_no_mask, prompt_ids, read_instruction, suited
from diffpo.tasks.task import Lengths, completion_lengths, is_compact

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
    """countdown, gsm8k, math500 or sudoku"""
    data: str = ""
    """jsonl, csv or parquet file of the published format, - for JSONL from standard input; without one, gsm8k and math500 are read from the hub, countdown and
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
    rule: RuleName = "auto"
    """as in DecodingConfig. auto: the threshold that the model has learned; eb where gamma is given; for a model without a threshold fixed,
    as in published protocols"""
    steps: Count | None = None
    """of fixed, which it also chooses; default gen_length / 2"""
    batch_size: Rows = 32
    """problems decoded together; it does not change the results"""
    device: Device = "auto"
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

    @model_validator(mode="before")
    @classmethod
    def _steps_are_of_a_schedule(cls, given: Any) -> Any:
        chosen = isinstance(given, dict) and given.get("steps") is not None and given.get("rule", "auto") == "auto"
        return given | {"rule": "fixed"} if chosen else given


def main(arguments: list[str] | None = None) -> int:
    """The exit code, see ``diffpo.runs.faults``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = parse(EvaluateConfig, arguments)
    return command.carry_out(lambda: _run(config, arguments))


def _run(config: EvaluateConfig, arguments: list[str]) -> "Run | None":
    task = get_task(config.task, **of_published(config))
    if config.dry_run:
        print(config.model_dump_json(indent=2))
        return None
    require(*task.packages)
    keep_freed_memory()
    return Run(prepare(config, task), arguments)


def of_published(config: EvaluateConfig) -> dict[str, str]:
    """The options that only tasks with published data have, as far as they are asked for."""
    usual = EvaluateConfig.model_fields
    return {
        name: getattr(config, name)
        for name in ("protocol", "data")
        if getattr(config, name) != usual[name].get_default()
    }


@dataclass(frozen=True)
class Prepared:
    """Everything that is decided before the first network evaluation. config: with every default filled in; prompts: token ids
    int64 [P_i] of each problem; inputs: digests of the model, its tokenizer, the data and the prompts."""

    config: EvaluateConfig
    task: Task
    problems: list
    prompts: list[Tensor]
    lengths: Lengths
    model: MaskedDiffusionLM
    rule: Rule
    inputs: dict[str, str]


def prepare(config: EvaluateConfig, task: Task) -> Prepared:
    """Read the instruction, the data, then the model. ValueError or OSError for anything that does not fit together."""
    if config.instruction:
        if not isinstance(task, PublishedTask):
            raise ValueError(f"instruction: task {task.name} is not asked as a chat: leave it out")
        task.instruction = read_instruction(config.instruction)
    problems, data_revision = read_problems(config, task)
    folder, commit = resolve(config.model, config.revision)
    device = choose_device(config.device)
    model = load(folder, device, config.dtype)
    task = suited(task, model, config.format)
    check_format(config, task)
    lengths = completion_lengths(task, config.gen_length, config.block_length)
    config = filled_in(config, task, model, lengths, device.type)
    prompts = prompt_ids(model.tokenizer, task, problems)
    check_lengths(*lengths)
    check_context(prompts, lengths.gen_length, model)
    check_no_mask(prompts, model.mask_id)
    rule = config.commit_rule(model, lengths.gen_length).resolve(model)
    rule.check(model, len(prompts), *lengths)
    inputs = model_inputs(folder, commit) | {
        "data": data_revision,
        "instruction": text_digest(getattr(task, "instruction", "")),
        "prompts": prompts_digest(prompts),
    }
    return Prepared(config, task, problems, prompts, lengths, model, rule, inputs)


def prompts_digest(prompts: list[Tensor]) -> str:
    """ "sha256:..." over all token ids: whatever they came from, a resumed run must ask the same."""
    return text_digest("\n".join(" ".join(map(str, ids.tolist())) for ids in prompts))


def text_digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def check_format(config: EvaluateConfig, task: Task) -> None:
    """ValueError for a setting of chats where the task is asked in compact words."""
    for field, ours in (("protocol", "strict"), ("instruction", "")):
        if is_compact(task) and getattr(config, field) != ours:
            raise ValueError(
                f"{field}: {getattr(config, field)} is for chats, and the format is compact: use --format chat"
            )


def read_problems(config: EvaluateConfig, task: Task) -> tuple[list, str]:
    """The problems to evaluate, and the revision of the data they are from."""
    if not config.data and isinstance(task, CompactTask):
        try:
            return task.problems("test", config.limit or GENERATED_PROBLEMS, seed=0), "generated: test split, seed 0"
        except ValueError as error:
            raise ValueError(f"limit: {error}") from error
    assert isinstance(task, PublishedTask)  # every other task of ours is compact, and has no data
    problems, revision = task.published
    return problems[: config.limit], revision


def filled_in(
    config: EvaluateConfig, task: Task, model: MaskedDiffusionLM, lengths: Lengths, device: str
) -> EvaluateConfig:
    """The configuration with the defaults that depend on model and task."""
    rule, steps = protocol_rule(config, model, lengths.gen_length)
    update = {
        "format": "compact" if is_compact(task) else "chat",
        **lengths._asdict(),
        "rule": rule,
        "steps": steps,
        "device": device,
    }
    return config.model_copy(update=update)


def protocol_rule(config: RuleConfig, model: MaskedDiffusionLM, gen_length: int) -> tuple[RuleName, int | None]:
    """Rule and steps with the defaults filled in: where there is nothing else to go by, the fixed schedule of gen_length / 2 steps, with
    which scores are published."""
    rule = config.chosen(model.threshold is not None, otherwise="fixed")
    return rule, (config.steps or max(gen_length // 2, 1)) if rule == "fixed" else None


class Run(command.Run):
    """Decode what is not done yet, a line per problem, then the summary."""

    faults = (FloatingPointError, TaskError)

    def __init__(self, evaluation: Prepared, arguments: list[str]):
        """ValueError or OSError if the folder cannot be this run's."""
        super().__init__()
        self.evaluation, self.arguments = evaluation, arguments
        self.console = Console(highlight=False, soft_wrap=True)
        config = evaluation.config
        self.folder = RunFolder(
            Path(config.runs) / config.name, "evaluate", json.loads(config.model_dump_json()), evaluation.inputs,
            resume=config.resume, overwrite=config.overwrite, may_change=MayChange(_FREE_ON_RESUME, renamed=EvaluateConfig.renamed),
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
        """Decodes the problems that are not in the log, and writes each into it as it is graded."""
        evaluation, config = self.evaluation, self.evaluation.config
        todo = [index for index in range(len(evaluation.problems)) if index not in self.log.items]
        if not todo:
            return
        problems, prompts = ([given[index] for index in todo] for given in (evaluation.problems, evaluation.prompts))
        found = evaluated(evaluation.model, evaluation.task, problems, prompts, evaluation.lengths, evaluation.rule,
                          next_row=self.interruption.next_of, **config.stream_options())  # fmt: skip
        for item in found:
            problem = problems[item["index"]]
            fields = asdict(problem) if is_dataclass(problem) and not isinstance(problem, type) else problem
            named = {"index": todo[item["index"]], "problem": fields}
            self.log.write(named | item | named)
            yield item

    def report(self) -> None:
        """The summary of all that is done."""
        if not self.log.items:
            return
        summary = settings_and_numbers(self.evaluation, list(self.log.items.values()))
        summary["provenance"] = command_provenance("evaluate", self.arguments, self.evaluation.inputs)
        self.folder.write("summary.json", json.dumps(finite(summary), indent=2) + "\n")
        self.console.print(summary_table(summary))
        self.console.print(f"items.jsonl and summary.json are in {self.folder.path}")


def settings_and_numbers(evaluation: Prepared, items: list[dict]) -> dict:
    """The numbers of the problems done so far, and the settings that they belong to."""
    config = evaluation.config
    settings = json.loads(config.model_dump_json(exclude={"name", "runs", "resume", "overwrite", "dry_run"}))
    return {
        "config": settings | {name: portable(getattr(config, name)) for name in ("model", "data", "instruction")},
        "problems": len(evaluation.problems),
        **summarise(evaluation.rule, items).asdict(),
        "kinds": by_kind(evaluation.task, evaluation.problems, evaluation.rule, items),
    }


_RULES = {"learned": "the threshold that the model has learned", "fixed": "a fixed schedule, as in published protocols"}


def summary_table(summary: dict) -> Table:
    config, (low, high) = summary["config"], summary["accuracy_interval_95"]
    table = Table(
        title=f"{config['model']} on {config['task']}: {summary['done']} of {summary['problems']} problems",
        show_header=False,
    )
    table.add_row("commit rule", f"{summary['rule']}, {_RULES.get(config['rule'], 'as asked for')}")
    table.add_row("lengths", f"{config['gen_length']} tokens in blocks of {config['block_length']}")
    table.add_row("accuracy", f"{summary['accuracy']:.1%}  (95% interval {low:.1%} to {high:.1%})")
    for kind, of in summary["kinds"].items():
        table.add_row(f"  {escape(kind)}", f"{of['accuracy']:.1%} of {of['done']}, {of['nfe']:.2f} NFE")
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
    with output_may_fail():
        raise SystemExit(main())
