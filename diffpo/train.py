"""``python -m diffpo.train``: joint DiFFPO on tiny-countdown, or what a TOML file and flags say. Minutes on 2 CPU cores.

Evaluates the base model, trains, evaluates again; writes runs/<name>/ (see ``RunFolder``). Ctrl-C or SIGTERM finishes the
current update, saves and exits with code 0; ``--resume`` continues.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.prompts import PromptError
from diffpo.decoding.rules import Rule
from diffpo.device import choose_device
from diffpo.evaluation import Evaluation, fixed_problems, one_at_a_time, parallel_rules
from diffpo.likelihood.score import PartTooSmallError
from diffpo.models.checkpoints import open_checkpoint
from diffpo.report import REPORT, write_report
from diffpo.reports.page import report_page
from diffpo.reports.run_record import read_run
from diffpo.runs import command
from diffpo.runs.curves import draw_curves
from diffpo.runs.digests import model_inputs
from diffpo.runs.faults import output_may_fail
from diffpo.runs.json_lines import finite
from diffpo.runs.metrics import MetricsLog, read_metrics, summary_line
from diffpo.runs.phases import TrainingProgress, counted, duration
from diffpo.runs.progress import Console
from diffpo.runs.provenance import command_provenance
from diffpo.runs.run_folder import MayChange, RunFolder
from diffpo.runs.trackers import check_tracker, open_tracker
from diffpo.tasks import Task, get_task
from diffpo.tasks.grading import TaskError
from diffpo.tasks.task import NoSplitError
from diffpo.training.checkpointing import Saved, checkpoints, restore, save_state
from diffpo.training.config import TrainConfig, parse_train
from diffpo.training.distributed import ALONE, World, joined
from diffpo.training.evaluating import evaluate
from diffpo.training.export import export
from diffpo.training.guard import Guard, Loss, kinds_table, remedy
from diffpo.training.model_setup import adapted_layers, loaded
from diffpo.training.outcome import Outcome, distinct
from diffpo.training.plan import check_memory, planned
from diffpo.training.samples import Samples, read_samples
from diffpo.training.sharded_checkpoints import ShardedSaver
from diffpo.training.shared_folder import SharedFolder, newest_of_first
from diffpo.training.trainer import Trainer, TrainingDivergedError

# what a continued run may do otherwise; the content of the model is compared instead of its name
_FREE_ON_RESUME = (
    *("allow_config_change", "allow_large", "max_minutes", "save_every", "device", "model"),
    *("update.tokens_at_once", "update.activation_checkpointing", "distributed"),
    *("samples", "tracker", "export"),
)
_EVALUATED_TOGETHER = 256  # held-out problems at most
_OTHER_ALGORITHM = "the checkpoints are of another algorithm, which --allow-config-change cannot change; begin a new run from this one's model"


def main(arguments: list[str] | None = None) -> int:
    """The exit code, see ``diffpo.runs.faults``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with joined() as world:
        config = world.agreed(lambda: parse_train(arguments))
        return command.carry_out(lambda: world.agreed(lambda: prepare(config, arguments, world)))


def prepare(config: TrainConfig, arguments: list[str], world: World = ALONE) -> "Run | None":
    """Everything that can be wrong is found before the run's folder is made or changed. ValueError or OSError."""
    task = get_task(config.task)
    if config.dry_run:
        if world.first:
            _dry_run(config, task, world)
        return None
    check_tracker(config.tracker)
    asked = first_problems(task, config)  # before held-out problems, which may have to be fetched
    problems = fixed_problems(task, config.heldout, config.split)
    device = world.device(config.device)
    checkpoint = open_checkpoint(config.model)
    plan = planned(config, checkpoint, task, [*problems, *asked], device, world)
    check_memory(config, plan.estimate, device, checkpoint.model.dtype, world)
    print(plan.estimate.table())
    keep_freed_memory(plan.estimate.weights)
    model = loaded(config, checkpoint, device, world)
    trainer = Trainer(config, model, plan.task, world)
    trainer.rule.resolve(model).check(model, len(problems), *trainer.lengths)
    carried = model.source.files.others if model.source else ()

    def claim() -> RunFolder:
        inputs = model_inputs(checkpoint.folder, checkpoint.commit)
        if checkpoint.base is not None:
            inputs["base"] = model_inputs(checkpoint.base.folder, checkpoint.base.commit)["model"]
        return run_folder(config, inputs, carried, world.job)

    folder = SharedFolder(Path(config.runs) / config.run_name, claim, world)
    saved = None
    with folder.released_on_error():
        if folder.resumes:
            saved = newest_of_first(folder, model, world)
            if saved is not None and saved.state["update"] > config.updates:
                raise ValueError(
                    f"resume: {saved.path} has {saved.state['update']} updates, updates is {config.updates}: give at least as many"
                )
            if world.first:
                read_metrics(folder.path).close()
                read_samples(folder.path).close()
        folder.begin()
    together = min(plan.at_once or _EVALUATED_TOGETHER, _EVALUATED_TOGETHER)
    return Run(config, folder, trainer, problems, saved, together, arguments)


def _dry_run(config: TrainConfig, task: Task, world: World) -> None:
    """The configuration on standard output and, where the model is on this machine, the estimate of memory on standard error."""
    print(config.model_copy(update={"name": config.run_name}).model_dump_json(indent=2), flush=True)
    device = choose_device("auto") if config.device == "auto" else torch.device(config.device)  # which may be elsewhere
    try:
        checkpoint = open_checkpoint(config.model, cached_only=True)
    except (OSError, ValueError) as error:
        print(f"no estimate of memory: {error}", file=sys.stderr)
        return
    adapted_layers(config, checkpoint.model)  # a mistake in the run, too
    try:
        plan = planned(config, checkpoint, task, first_problems(task, config), device, world)
    except (OSError, ValueError) as error:
        print(f"no estimate of memory: {error}", file=sys.stderr)
        return
    print(plan.estimate.table(), file=sys.stderr)
    try:
        check_memory(config, plan.estimate, device, checkpoint.model.dtype, world)
    except ValueError as error:
        print(f"too large for this machine: {error}", file=sys.stderr)


def run_folder(config: TrainConfig, inputs: dict[str, str], carried: Collection[str] = (), job: str = "") -> RunFolder:
    """The run's folder, claimed. A training may go on under another configuration, but not with another algorithm."""
    may_change = MayChange(
        free=_FREE_ON_RESUME,
        never={"algorithm.name": _OTHER_ALGORITHM, "algorithm.train": _OTHER_ALGORITHM},
        others=config.allow_config_change,
        renamed=config.rollout.renamed,
        advice=" (--allow-config-change resumes all the same)",
    )
    settings = json.loads(config.model_dump_json()) | {"name": config.run_name}
    return RunFolder(Path(config.runs) / config.run_name, "train", settings, inputs, carried,
                     resume=config.resume, overwrite=config.overwrite, may_change=may_change, job=job)  # fmt: skip


def first_problems(task: Task, config: TrainConfig) -> list:
    """As many problems as an update asks for. ValueError if there are none to train on, or not so many."""
    try:
        return task.problems("train", config.algorithm.prompts_per_update, config.seed)
    except NoSplitError as error:
        raise ValueError(f"task: {error}; train on countdown, sudoku or medley, which make their problems") from error
    except ValueError as error:
        raise ValueError(f"algorithm.prompts_per_update: {error}") from error


class Run(command.Run):
    """Evaluate, train, evaluate, report."""

    faults = (TrainingDivergedError, FloatingPointError, TaskError, PartTooSmallError, PromptError)

    def __init__(
        self,
        config: TrainConfig,
        folder: SharedFolder,
        trainer: Trainer,
        problems: list,
        saved: Saved | None,
        evaluated_together: int,
        arguments: list[str],
    ):
        super().__init__()
        self.config, self.folder, self.trainer, self.saved = config, folder, trainer, saved
        self.world = trainer.world
        self.saver = ShardedSaver(self.world) if trainer.sharded else None
        self.console = Console(highlight=False, soft_wrap=True)
        self.problems, self.evaluated_together, self.arguments = problems, evaluated_together, arguments
        lengths = trainer.lengths
        self.guard = Guard(trainer, evaluated_together)
        self.rules = distinct(
            [one_at_a_time(lengths), self.guard.careful, *(parallel_rules(lengths) if config.sweep else ())]
        )
        self.started = time.perf_counter()
        self.saved_update: int | None = None  # whose checkpoint is the newest

    def work(self) -> None:
        """Interrupted, it ends at the next rule or update."""
        try:
            self.world.agreed(self._work)
        except (*self.faults, BrokenPipeError) as error:
            # a diverged run may go on from a checkpoint before it; without one, skipped updates left the weights as they were.
            # Weights whose logits are not finite are kept in no case: nothing goes on from them
            unchanged = isinstance(error, TrainingDivergedError) and not checkpoints(self.folder.checkpoints)
            if unchanged or not isinstance(error, TrainingDivergedError | FloatingPointError):
                with contextlib.suppress(FloatingPointError, OSError):
                    self._save()
            raise

    def _work(self) -> None:
        base = self._base_evaluation()  # of the model as it came, so before a checkpoint's weights
        if self.guard.off:
            self._say_guard_is_off()
        finished = self.saved.state["update"] if self.saved else 0
        self.samples = Samples(self.trainer, self.folder.path, finished)
        self._draw_samples()
        if self.saved is not None:
            state = restore(self.saved, self.trainer.model, self.trainer.optimizer)
            self.trainer.restore(state)
            self.guard.restore(state.get("lost", {}))  # a checkpoint of 0.1 has none
            self.saved_update = self.trainer.update
        if self.folder.resumes:
            self.console.print(f"resuming after update {self.trainer.update}")
        log = self._open_log(finished) if self.world.first else None
        lines: list[dict] = []
        try:
            self._train(log, sum(e.decoding_seconds for e in base))
            self._draw_samples()
        finally:
            if log is not None:
                lines = log.close()
            self.samples.close()
        self._save()
        if not self._interrupted():
            self._report(base, lines)

    def _open_log(self, finished: int) -> MetricsLog:
        path = self.folder.path
        tracker = open_tracker(self.config.tracker, path, self.folder.settings, finished + 1, path.name)
        return MetricsLog(path, finished, tracker)

    def progress(self) -> str:
        return f"after update {self.trainer.update}"

    def kept(self) -> str:
        found = checkpoints(self.folder.checkpoints)
        where = f"the last good weights are in {found[0]}" if found else "there is no checkpoint"
        return f"continue with --resume; {where}"

    def close(self) -> None:
        self.folder.release()

    def _base_evaluation(self) -> list[Evaluation]:
        """The untrained model under every rule; kept in base.json with what the guard saw, so that a resumed run does not repeat it."""
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # what is not readable is made again
            kept = json.loads(self.world.from_first(self._kept_base))
            evaluations = [Evaluation(**fields) for fields in kept["heldout"]]
            self.guard.base = Evaluation(**kept["watched"]) if kept["watched"] else None
            self.guard.see_base()  # if it has not
            return evaluations
        self.console.print(f"base model {self.config.model} on {len(self.problems)} held-out problems")
        evaluations = self._evaluate(self.rules)
        if not self._interrupted():
            self.guard.see_base()
            watched = self.guard.base and finite(self.guard.base.asdict())
            kept = {"heldout": [finite(e.asdict()) for e in evaluations], "watched": watched}
            self.folder.write("base.json", json.dumps(kept, indent=1))
        return evaluations

    def _kept_base(self) -> str:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return (self.folder.path / "base.json").read_text()
        return ""

    def _interrupted(self) -> bool:
        """Whether a signal has come, to whichever process."""
        interrupted = self.world.any(self.interruption.requested)
        if interrupted:
            self.interruption.requested = True
        return interrupted

    def _evaluate(self, rules: Sequence[Rule]) -> list[Evaluation]:
        evaluations = []
        trainer = self.trainer
        with counted(self.console, "evaluation", len(rules) * len(self.problems)) as count:
            for rule in rules:
                if self._interrupted():
                    break
                point = evaluate(
                    trainer.model, trainer.task, self.problems, rule, trainer.lengths, self.evaluated_together,
                    self.world, count,
                )  # fmt: skip
                evaluations.append(point)
                self.console.print(f"  {rule!r:<45} accuracy {point.accuracy:6.1%}  NFE {point.nfe:5.2f}")
        return evaluations

    def _train(self, log: MetricsLog | None, evaluation_seconds: float) -> None:
        trainer, config = self.trainer, self.config
        limit = 60 * (config.max_minutes or math.inf)
        deadline = time.perf_counter() + limit
        periods = {"guard": config.guard.every, "samples": config.samples.every, "save": config.save_every}
        with TrainingProgress(
            self.console, config.updates, trainer.update, periods, limit, evaluation_seconds
        ) as progress:
            trainer.on_phase = progress.show
            while trainer.update < config.updates and not self._interrupted():
                if self.world.any(time.perf_counter() >= deadline):
                    break
                with progress.doing("update"):
                    metrics = trainer.step()
                if self.guard.due(trainer.update):
                    with progress.doing("guard"):
                        metrics |= self._watched()
                if self.samples.due(trainer.update):
                    with progress.doing("samples"):
                        self._draw_samples()
                if log is not None:
                    log.write(metrics | progress.seconds())
                progress.advance()
                if trainer.update == 1 or trainer.update % 5 == 0 or progress.silent:
                    line = summary_line(metrics, config.updates)
                    progress.print(f"{line}  {duration(progress.left())} left")
                # not in a row of skipped updates: resuming from before it is another chance
                if trainer.update % config.save_every == 0 and not trainer.skipped_in_a_row:
                    try:
                        with progress.doing("save"):
                            self._save(wait=False)
                    except OSError as error:  # the older checkpoint stays, the next save is tried
                        progress.print(f"checkpoint not saved, training goes on: {error}")

    def _watched(self) -> dict[str, float]:
        """Accuracy by kind of problem; what has been lost is said at once."""
        self._warn(f"after update {self.trainer.update}", self.guard.check())
        if self.guard.off:
            self._say_guard_is_off()
        return self.guard.metrics()

    def _warn(self, when: str, losses: Iterable[Loss]) -> None:
        for loss in losses:
            self.console.print(f"WARNING {when}, {loss}. Try {remedy(self.config, loss)} (docs/guard.md)", markup=False)

    def _say_guard_is_off(self) -> None:
        self.console.print(f"no kind of problem is watched while training: {self.guard.off}", markup=False)

    def _draw_samples(self) -> None:
        if not self._interrupted() and (fault := self.samples.draw()):
            self.console.print(f"no samples are written any more: {fault}", markup=False)

    def _save(self, wait: bool = True) -> None:
        """A checkpoint of this update, if there is none yet; wait: until it is written, where that is done in the background.

        OSError when it, or the one before it, cannot be written, NotFiniteError when it must not.
        """
        trainer, folder = self.trainer, self.folder.checkpoints
        if self.saved_update != trainer.update:
            self.saved_update = None
            state = trainer.state() | {"lost": self.guard.state(), "base": self.folder.inputs["model"]}
            if self.saver is not None:
                self.saver.save(folder, trainer.model, trainer.optimizer, state)
            else:
                trainer.save(lambda: save_state(folder, trainer.model, trainer.optimizer, state))
            self.saved_update = trainer.update
        if self.saver is not None and wait:
            self.saver.finish()

    def _report(self, base: list[Evaluation], lines: list[dict]) -> None:
        """The before/after table, the trained model, summary.json, curves.png and report.html."""
        config, path = self.config, self.folder.path
        self.trainer.save(lambda: export(config, self.trainer.model, path / "model"))
        self.console.print(f"trained model on {len(self.problems)} held-out problems")
        evaluations = self._evaluate(distinct([self.trainer.evaluation_rule, *self.rules]))
        if self.interruption.requested or not self.world.first:
            return
        draw_curves(
            lines,
            path / "curves.png",
            f"{config.run_name}: {config.algorithm.name}, {' + '.join(config.algorithm.train)}",
        )
        outcome = Outcome(self.guard, self.rules[0], base, evaluations)
        summary = outcome.summary() | {
            "heldout": len(self.problems),
            "updates": self.trainer.update,
            "seconds": round(time.perf_counter() - self.started, 1),
            "seed": config.seed,
            "denoiser_calls": sum(self.trainer.denoiser_calls.values()),
            "provenance": command_provenance("train", self.arguments, self.folder.inputs),
        }
        self.folder.write("summary.json", json.dumps(finite(summary), indent=2) + "\n")
        write_report(path / REPORT, report_page([read_run(path)]))
        title = f"{config.task}, {len(self.problems)} held-out problems"
        self.console.print(outcome.table(title, config.trains_threshold))
        if outcome.trained.kinds:
            self.console.print(kinds_table(outcome.kinds, self.guard.lost))
        self.console.print(f"model, metrics, summary.json and {REPORT}, which shows them, are in {path}")
        self._warn("at the end", self.guard.lost.values())


if __name__ == "__main__":
    with output_may_fail():
        raise SystemExit(main())
