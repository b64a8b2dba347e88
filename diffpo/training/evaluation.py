"""Accuracy against network evaluations on held-out problems."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from diffpo.decoding.generation import generate
from diffpo.decoding.rules import ConfidenceThreshold, EntropyBounded, FixedSchedule, Rule
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Split, Task
from diffpo.tasks.grading import graded_together

SWEEP_GAMMAS = (0.01, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Evaluation:
    """accuracy: share of problems solved; nfe: mean network evaluations; tokens_per_second: generated tokens up to and
    including EOS per second of decoding; gamma: mean threshold in nats, None for rules without one."""

    rule: str
    accuracy: float
    nfe: float
    tokens_per_second: float
    gamma: float | None

    def asdict(self) -> dict:
        return asdict(self)


def evaluate(model: MaskedDiffusionLM, task: Task, problems: Sequence, rule: Rule, batch_size: int = 256) -> Evaluation:
    """Decode every problem greedily (temperature 0) with ``rule`` and score it."""
    rule, started = rule.resolve(model), time.perf_counter()
    out = generate(
        model, [task.prompt(p) for p in problems], task.gen_length, task.block_length, rule, batch_size=batch_size
    )
    seconds = time.perf_counter() - started
    correct = sum(grade.correct is True for grade in graded_together(task, problems, out.text))
    gamma = out.trajectory.gamma.mean().item()
    return Evaluation(
        rule=repr(rule),
        accuracy=correct / len(problems),
        nfe=out.nfe.float().mean().item(),
        tokens_per_second=out.trajectory.length.sum().item() / seconds,
        gamma=None if gamma != gamma else gamma,
    )


def one_at_a_time(task: Task) -> Rule:
    """LLaDA's schedule with one token a step, the most confident first."""
    return FixedSchedule(task.gen_length)


def parallel_rules(task: Task) -> list[Rule]:
    """The rules that need no training, over a coarse sweep of their thresholds; ``benchmarks/nfe_pareto.py`` has the fine one."""
    return [
        FixedSchedule(task.gen_length // 2),
        *(EntropyBounded(gamma, proxy) for proxy in ("entropy", "confidence") for gamma in SWEEP_GAMMAS),
        ConfidenceThreshold(0.9),
    ]


def check_vocabulary(model: MaskedDiffusionLM, task: Task) -> None:
    """ValueError unless the model's tokenizer knows every word of the task's compact format."""
    known = model.tokenizer.get_vocab() if model.tokenizer is not None else {}
    missing = [word for word in task.vocabulary if word not in known]
    if missing:
        raise ValueError(f"the model's tokenizer does not know words of task {task.name}: {' '.join(missing[:8])}")


def fixed_problems(task: Task, count: int, split: Split = "test") -> list:
    """The held-out problems of every report (seed 0): of the test split, or of validation where settings are chosen."""
    try:
        return task.problems(split, count, seed=0)
    except ValueError as error:
        raise ValueError(f"heldout: {error}") from error
