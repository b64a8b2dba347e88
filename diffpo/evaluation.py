"""How good a model is on a task, and at which cost: the one evaluator of train, pretrain, evaluate and the benchmarks.

Problems are decoded in a stream. Finished rows are graded together, in chunks, so that checks that hang share one budget of time.
"""

import math
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from diffpo.completion_file import gamma_value
from diffpo.decoding.generation import Generation, stream
from diffpo.decoding.rules import ConfidenceThreshold, EntropyBounded, FixedSchedule, Rule
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Split, Task
from diffpo.tasks.grading import graded_together
from diffpo.tasks.prompts import prompt_ids
from diffpo.tasks.task import Lengths, NoSplitError, begun, completion_lengths

T = TypeVar("T")

GRADED_TOGETHER = 32  # rows at most: what a kill can lose
SWEEP_GAMMAS = (0.01, 0.1, 0.5, 1.0)
Item = dict[str, Any]  # of one problem, as JSON values; see `evaluated`
Row = tuple[int, Generation]


@dataclass(frozen=True)
class Evaluation:
    """The numbers of the problems that are done; an undecided answer counts as not right.

    accuracy: share of problems solved, with its 95% interval (Wilson); mean_reward: of the rewards there are, None without any; nfe and
    tokens: means per problem, tokens up to and including EOS; tokens_per_second: of decoding; gamma: mean threshold in nats, None for
    rules without one; kinds: `done`, `accuracy`, `nfe` and `gamma` by kind of problem, where there are several.
    """

    rule: str
    done: int
    right: int
    undecided: int
    accuracy: float
    accuracy_interval_95: tuple[float, float]
    mean_reward: float | None
    nfe: float
    tokens: float
    tokens_per_forward: float
    tokens_per_second: float
    decoding_seconds: float
    gamma: float | None
    kinds: dict[str, Item] = field(default_factory=dict)

    def asdict(self) -> dict:
        return asdict(self)


def evaluate(
    model: MaskedDiffusionLM,
    task: Task,
    problems: Sequence,
    rule: Rule,
    lengths: Lengths | None = None,
    batch_size: int = 256,
    seen: Callable[[Item], object] = lambda item: None,
) -> Evaluation:
    """Decode every problem greedily (temperature 0) with ``rule``, and grade it. lengths: default the task's own, see `completion_lengths`.
    seen: is called with each item of `evaluated` as it is done.

    ValueError for what does not fit together, TaskError if the task gives something else than a grade.
    """
    rule = rule.resolve(model)
    prompts = prompt_ids(model.tokenizer, task, problems)
    lengths = lengths or completion_lengths(task)
    done = []
    for item in evaluated(model, task, problems, prompts, lengths, rule, batch_size):
        done.append(item)
        seen(item)
    return of_items(task, problems, rule, done)


def of_items(task: Task, problems: Sequence, rule: Rule, done: Sequence[Item]) -> Evaluation:
    """The evaluation that these items of the problems make."""
    return replace(summarise(rule, done), kinds=by_kind(task, problems, rule, done))


def evaluated(
    model: MaskedDiffusionLM,
    task: Task,
    problems: Sequence,
    prompts: Sequence[Tensor],
    lengths: Lengths,
    rule: Rule,
    batch_size: int,
    next_row: Callable[[Iterator[Row]], Row] = next,
    **options: Any,
) -> Iterator[Item]:
    """What became of each problem, as rows finish: index, completion, correct, reward, nfe, tokens, prompt_tokens, gamma, seconds.

    prompts: ids int64 [P_i] of each problem, as `prompt_ids` gives them. At most ``batch_size`` rows, and 32, are graded together. tokens: up to and
    including the first EOS; gamma: nats, "inf" or None; seconds: of decoding, since the row before. next_row: takes the next row from
    the decoding, for a caller that must know when the network is at work; options: of ``stream``. Whatever error ends the decoding, an
    interrupt too, is raised after the items of the rows that had finished.
    """
    rows = stream(model, prompts, *lengths, rule, batch_size=batch_size, **options)
    for chunk in chunks(_timed(rows, next_row), min(batch_size, GRADED_TOGETHER)):
        indices = [index for (index, _), _ in chunk]
        asked = [problems[index] for index in indices]
        texts = [begun(task.prompt(problem)) + _text(row) for problem, ((_, row), _) in zip(asked, chunk, strict=True)]
        for ((index, row), seconds), grade in zip(chunk, graded_together(task, asked, texts), strict=True):
            yield {
                "index": index,
                "completion": _text(row),
                "correct": grade.correct,
                "reward": grade.reward,
                "nfe": row.trajectory.nfe.item(),
                "tokens": row.trajectory.length.item(),
                "prompt_tokens": len(prompts[index]),
                "gamma": gamma_value(row.trajectory),
                "seconds": seconds,
            }


def _text(row: Generation) -> str:
    assert row.text is not None  # a task's prompts take a tokenizer
    return row.text[0]


def chunks(source: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter. An error of the source is raised after the items that came before it."""
    error: BaseException | None = None
    ended = False
    while not ended:
        chunk: list[T] = []
        try:
            while len(chunk) < size:
                chunk.append(next(source))
        except StopIteration:
            ended = True
        except BaseException as raised:  # an interrupt too: what is decoded is not lost
            error, ended = raised, True
        if chunk:
            yield chunk
    if error is not None:
        raise error


def _timed(rows: Iterator[Row], next_row: Callable[[Iterator[Row]], Row]) -> Iterator[tuple[Row, float]]:
    """Each row, and the seconds it took: checking answers is no decoding."""
    while True:
        started = time.perf_counter()
        try:
            row = next_row(rows)
        except StopIteration:
            return
        yield row, time.perf_counter() - started


def summarise(rule: Rule, done: Sequence[Mapping[str, Any]]) -> Evaluation:
    """The numbers of at least one item."""
    count = len(done)
    right = sum(item["correct"] is True for item in done)
    rewards = [item["reward"] for item in done if item["reward"] is not None]
    gammas = [float(item["gamma"]) for item in done if item.get("gamma") is not None]
    tokens, nfe, seconds = (sum(item[name] for item in done) for name in ("tokens", "nfe", "seconds"))
    return Evaluation(
        rule=repr(rule),
        done=count,
        right=right,
        undecided=sum(item["correct"] is None for item in done),
        accuracy=right / count,
        accuracy_interval_95=wilson_interval(right, count),
        mean_reward=statistics.fmean(rewards) if rewards else None,
        nfe=nfe / count,
        tokens=tokens / count,
        tokens_per_forward=tokens / nfe,
        tokens_per_second=tokens / seconds,
        decoding_seconds=seconds,
        gamma=statistics.fmean(gammas) if gammas else None,
    )


def by_kind(task: Task, problems: Sequence, rule: Rule, done: Sequence[Item]) -> dict[str, Item]:
    """`Evaluation.kinds` of these items; empty if all their problems are of one kind."""
    items = defaultdict(list)
    for item in done:
        items[_kind(task, problems[item["index"]])].append(item)
    if len(items) < 2:
        return {}
    summaries = {kind: summarise(rule, of_kind) for kind, of_kind in sorted(items.items())}
    return {
        kind: {"done": e.done, "accuracy": e.accuracy, "nfe": e.nfe, "gamma": e.gamma} for kind, e in summaries.items()
    }


def _kind(task: Task, problem: Any) -> str:
    """The problem's kind as text; the task's name, and a warning, where the task raises: a report must not end an evaluation."""
    try:
        return str(task.kind(problem))
    except Exception as error:
        warnings.warn(f"task {task.name} raised {type(error).__name__} on the kind of a problem: {error}", stacklevel=2)
        return task.name


def wilson_interval(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share of ``count`` independent trials (1927), at 95% by default. Unlike p +- z s it stays within [0, 1]."""
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def one_at_a_time(lengths: Lengths) -> Rule:
    """LLaDA's schedule with one token a step, the most confident first."""
    return FixedSchedule(lengths.gen_length)


def parallel_rules(lengths: Lengths) -> list[Rule]:
    """The rules that need no training, over a coarse sweep of their thresholds; ``benchmarks/nfe_pareto.py`` has the fine one."""
    blocks = lengths.gen_length // lengths.block_length
    return [
        FixedSchedule(blocks * max(lengths.block_length // 2, 1)),
        *(EntropyBounded(gamma, order) for order in ("entropy", "confidence") for gamma in SWEEP_GAMMAS),
        ConfidenceThreshold(0.9),
    ]


def fixed_problems(task: Task, count: int, split: Split = "test") -> list:
    """The held-out problems of every report (seed 0): of the test split, or of validation where settings are chosen."""
    try:
        return task.problems(split, count, seed=0)
    except NoSplitError as error:
        raise ValueError(f"split: {error}") from error
    except ValueError as error:
        raise ValueError(f"heldout: {error}") from error
