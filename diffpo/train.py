"""``python -m diffpo.train``: joint DiFFPO on tiny-countdown, or what a TOML file and flags say. Minutes on 2 CPU cores.

Evaluates the base model, trains, evaluates again; writes runs/<name>/ (see ``RunFolder``). Ctrl-C or SIGTERM finishes the
current update, saves and exits with code 0; ``--resume`` continues.
"""

import contextlib
import json
import math
import platform
import signal
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError

from diffpo.config import fail
from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.generation import check_lengths
from diffpo.device import choose_device
from diffpo.evaluation import Evaluation, evaluate, fixed_problems, one_at_a_time, parallel_rules
from diffpo.models.checkpoints import load, resolve
from diffpo.provenance import model_inputs
from diffpo.tasks import Task, get_task
from diffpo.tasks.grading import TaskError
from diffpo.tasks.prompts import check_context, prompt_ids, suited
from diffpo.tasks.task import NoSplitError
from diffpo.training.checkpointing import Saved, checkpoints, newest, restore, save_state
from diffpo.training.config import TrainConfig, parse_train
from diffpo.training.json_lines import finite
from diffpo.training.logging import MetricsLog, draw_curves, read_metrics, summary_line
from diffpo.training.run_folder import DISK_FAULTS, RunFolder, stopped
from diffpo.training.trainer import Trainer, TrainingDivergedError

PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done or interrupted with everything saved; 1 diverged, a task without a grade, or a full disk, with
    everything that was written whole; 2 (SystemExit) a user's mistake."""
    config = parse_train(arguments)
    try:
        task = get_task(config.task)
        if config.dry_run:
            print(config.model_dump_json(indent=2))
            return 0
        run = prepare(config, task)
    except OSError as error:
        if error.errno in DISK_FAULTS:
            return stopped(f"before the start: {error}")
        fail(str(error))
    except ValueError as error:
        fail(str(error))
    try:
        return run.execute()
    finally:
        run.folder.release()


def prepare(config: TrainConfig, task: Task) -> "Run":
    """Everything that can be wrong is found before the run's folder is made or changed. ValueError or OSError."""
    check_prompts(task, config)  # before held-out problems, which may have to be fetched
    problems = fixed_problems(task, config.heldout, config.split)
    device = choose_device(config.device)
    source, commit = resolve(config.model)
    model = load(source, device)
    task = suited(task, model)
    keep_freed_memory()
    trainer = Trainer(config, model, task)
    check_lengths(*trainer.lengths)
    check_context(prompt_ids(model.tokenizer, task, problems), trainer.lengths.gen_length, model)
    trainer.rule.resolve(model).check(model, len(problems), *trainer.lengths)
    folder = RunFolder("train", config, model_inputs(source, commit), carried=model.source.files.others)
    saved = None
    with folder.released_on_error():
        if folder.resumes:
            saved = newest(folder.checkpoints, model)
            read_metrics(folder.path).close()
        folder.begin()
    return Run(config, folder, trainer, problems, saved)


def check_prompts(task: Task, config: TrainConfig) -> None:
    """ValueError if there are no problems to train on, or an update asks for more than there are."""
    try:
        task.problems("train", config.algorithm.prompts_per_update, config.seed)
    except NoSplitError as error:
        raise ValueError(f"task: {error}; train on countdown or sudoku, which make their problems") from error
    except ValueError as error:
        raise ValueError(f"algorithm.prompts_per_update: {error}") from error


class Run:
    """One command: evaluate, train, evaluate, report."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, trainer: Trainer, problems: list, saved: Saved | None = None
    ):
        self.config, self.folder, self.trainer, self.saved = config, folder, trainer, saved
        self.console = Console(highlight=False, soft_wrap=True)
        self.problems = problems
        lengths = trainer.lengths
        self.rules = [one_at_a_time(lengths), *(parallel_rules(lengths) if config.sweep else ())]
        self.started = time.perf_counter()
        self.interrupted = False
        self.saved_update: int | None = None  # whose checkpoint is the newest

    def execute(self) -> int:
        """The exit code. SIGINT and SIGTERM end the run at the next rule or update, with everything saved."""
        handlers = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._execute()
        except (TrainingDivergedError, FloatingPointError) as error:
            return self._diverged(error)
        except TaskError as error:
            with contextlib.suppress(FloatingPointError, OSError):
                self._save()
            return self._stopped(error)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk by its own type
            return self._stopped(error)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _execute(self) -> int:
        base = self._base_evaluation()  # of the model as it came, so before a checkpoint's weights
        if self.saved is not None:
            self.trainer.restore(restore(self.saved, self.trainer.model, self.trainer.optimizer))
            self.saved_update = self.trainer.update
        if self.folder.resumes:
            self.console.print(f"resuming after update {self.trainer.update}")
        log = MetricsLog(self.folder.path, self.trainer.update)
        try:
            self._train(log)
        finally:
            lines = log.close()
        self._save()
        if not self.interrupted:
            self._report(base, lines)
        if self.interrupted:
            self.console.print(f"interrupted after update {self.trainer.update}; continue with --resume")
        return 0

    def _stopped(self, error: Exception) -> int:
        return stopped(f"after update {self.trainer.update}: {error}; {self._newest()}; continue with --resume")

    def _diverged(self, error: Exception) -> int:
        if not checkpoints(self.folder.checkpoints):
            # skipped updates left the weights as they were, unless those are what is not finite
            with contextlib.suppress(FloatingPointError, OSError):
                self._save()
        self.console.print(f"stopped: {error}; {self._newest()}")
        return 1

    def _newest(self) -> str:
        found = checkpoints(self.folder.checkpoints)
        return f"the last good weights are in {found[0]}" if found else "there is no checkpoint"

    def _base_evaluation(self) -> list[Evaluation]:
        """The untrained model under every rule; kept in base.json, so that a resumed run does not repeat it."""
        path = self.folder.path / "base.json"
        with contextlib.suppress(
            FileNotFoundError, ValueError, TypeError, RecursionError
        ):  # what is not readable is made again
            return [Evaluation(**fields) for fields in json.loads(path.read_text())]
        self.console.print(f"base model {self.config.model} on {len(self.problems)} held-out problems")
        evaluations = self._evaluate(self.rules)
        if not self.interrupted:
            self.folder.write("base.json", json.dumps([finite(e.asdict()) for e in evaluations], indent=1))
        return evaluations

    def _evaluate(self, rules) -> list[Evaluation]:
        evaluations = []
        for rule in rules:
            if self.interrupted:
                break
            trainer = self.trainer
            evaluations.append(evaluate(trainer.model, trainer.task, self.problems, rule, trainer.lengths))
            point = evaluations[-1]
            self.console.print(f"  {rule!r:<45} accuracy {point.accuracy:6.1%}  NFE {point.nfe:5.2f}")
        return evaluations

    def _train(self, log: MetricsLog) -> None:
        trainer, config = self.trainer, self.config
        deadline = time.perf_counter() + 60 * (config.max_minutes or math.inf)
        with Progress(*PROGRESS_COLUMNS, console=self.console) as progress:
            bar = progress.add_task("training", total=config.updates, completed=trainer.update)
            while trainer.update < config.updates and not self.interrupted and time.perf_counter() < deadline:
                metrics = trainer.step()
                log.write(metrics)
                progress.update(bar, completed=trainer.update)
                if trainer.update == 1 or trainer.update % 5 == 0:
                    self.console.print(summary_line(metrics, config.updates))
                # not in a row of skipped updates: resuming from before it is another chance
                if trainer.update % config.save_every == 0 and not trainer.skipped_in_a_row:
                    try:
                        self._save()
                    except OSError as error:  # the older checkpoint stays, the next save is tried
                        self.console.print(f"checkpoint not saved, training goes on: {error}")

    def _interrupt(self, number, frame) -> None:
        self.interrupted = True  # no more: printing here would re-enter a print that the signal interrupted

    def _save(self) -> None:
        """A checkpoint of this update, if there is none yet. OSError when it cannot be written, NotFiniteError when it must not."""
        if self.saved_update != self.trainer.update:
            save_state(self.folder.checkpoints, self.trainer.model, self.trainer.optimizer, self.trainer.state())
            self.saved_update = self.trainer.update

    def _report(self, base: list[Evaluation], lines: list[dict]) -> None:
        """The before/after table, curves.png, the trained model and summary.json."""
        config, path = self.config, self.folder.path
        self.trainer.model.save(path / "model")
        self.console.print(f"trained model on {len(self.problems)} held-out problems")
        evaluations = self._evaluate([self.trainer.evaluation_rule, *self.rules])
        if self.interrupted:
            return
        trained, *swept = evaluations
        draw_curves(
            lines, path / "curves.png", f"{config.name}: {config.algorithm.name}, {' + '.join(config.algorithm.train)}"
        )
        best = max(base, key=lambda e: (e.accuracy, -e.nfe))
        summary = {
            "base": {"one_at_a_time": _point(base[0]), "best": {"rule": best.rule, **_point(best)}},
            "trained": {**_point(trained), "gamma": trained.gamma},
            "heldout": len(self.problems),
            "seconds": round(time.perf_counter() - self.started, 1),
            "seed": config.seed,
            "environment": environment(),
            "denoiser_calls": sum(self.trainer.denoiser_calls.values()),
            "sweep": {"base": [e.asdict() for e in base], "trained": [e.asdict() for e in (trained, *swept)]},
        }
        self.folder.write("summary.json", json.dumps(finite(summary), indent=2) + "\n")
        self._print_table(base[0], best, swept[0], trained)
        self.console.print(f"model, metrics, curves.png and summary.json are in {path}")

    def _print_table(self, base_single: Evaluation, best: Evaluation, single: Evaluation, trained: Evaluation) -> None:
        table = Table(title=f"{self.config.task}, {len(self.problems)} held-out problems")
        for column in ("model", "decoding", "accuracy", "NFE", "gamma (nats)"):
            table.add_column(column)
        for model, name, e in (
            ("base", "one token at a time", base_single),
            ("base", f"its best rule, {best.rule}", best),
            ("trained", "one token at a time", single),
            ("trained", trained.rule, trained),
        ):
            table.add_row(model, name, f"{e.accuracy:.1%}", f"{e.nfe:.2f}", "" if e.gamma is None else f"{e.gamma:.3f}")
        self.console.print(table)


def environment() -> dict:
    """What the numbers of a run were measured on."""
    return {
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _point(e: Evaluation) -> dict:
    return {"accuracy": e.accuracy, "nfe": e.nfe}


if __name__ == "__main__":
    raise SystemExit(main())
