"""``python -m diffpo.pretrain --task countdown``: train a tiny masked diffusion LM from scratch, in minutes on a CPU.

The loss is the negative evidence lower bound of masked diffusion (LLaDA, arXiv 2502.09992, eq. 3): draw t ~ U(0,1) for each
sequence, mask each completion token with probability p = t, and weigh the cross-entropy of the masked tokens by 1/p.

The learning rate stays constant after the warm-up: the shipped models are meant to be undertrained, so that reinforcement
learning has something to do, and ``--steps k`` is exactly the state of a longer run after k steps. ``--start`` goes on from a
model that exists, ``--final-lr-fraction`` lets the rate fall.

The output is a model folder, which other commands take as it is, with the run's metrics.jsonl, summary.json and README.md beside. It is
no ``RunFolder``: there is nothing to resume, and the config.json of a model is not that of a run.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffpo.config import ModelSize, PretrainConfig, parse
from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.rules import EntropyBounded
from diffpo.device import choose_device
from diffpo.evaluation import Evaluation, evaluate, fixed_problems, one_at_a_time
from diffpo.keyed_random import derive, uniform
from diffpo.models.checkpoints import load, resolve
from diffpo.models.file_replacement import write_atomically
from diffpo.models.transformer import MaskedDiffusionLM, ModelConfig
from diffpo.models.word_tokenizer import word_tokenizer
from diffpo.runs import command
from diffpo.runs.digests import model_inputs
from diffpo.runs.faults import output_may_fail
from diffpo.runs.json_lines import JsonLines, finite, own_file
from diffpo.runs.progress import Console, progress_bar
from diffpo.runs.provenance import command_provenance, portable
from diffpo.tasks import CompactTask, get_task
from diffpo.tasks.prompts import check_vocabulary
from diffpo.tasks.task import completion_lengths
from diffpo.training.checkpointing import check_finite

_SMALLEST_MASK_RATE = 1e-3  # keeps the 1/p weight finite, as LLaDA's reference does
_LOGGED_EVERY = 50  # steps
_LOG = "metrics.jsonl"


def elbo_loss(model: MaskedDiffusionLM, prompt_ids_BP: Tensor, completion_BL: Tensor, *key: int) -> Tensor:
    """Mean negative ELBO in nats per completion token; ``key`` seeds the masks. Prompts are padded on the left."""
    B, L = completion_BL.shape
    row_B1, position_L = (torch.arange(n, device=completion_BL.device) for n in (B, L))
    row_B1 = row_B1[:, None]
    # one t in each of B equal strata (MDLM, arXiv 2406.07524): each is still uniform, but the batch covers (0, 1) evenly
    t_B1 = (uniform(*key, 0) + row_B1) / B
    rate_B1 = t_B1 * (1 - _SMALLEST_MASK_RATE) + _SMALLEST_MASK_RATE
    masked_BL = uniform(*key, 1, row_B1, position_L) < rate_B1
    latent_BL = torch.where(masked_BL, model.mask_id, completion_BL)

    def read(hidden_BSD: Tensor) -> Tensor:
        return model.logprobs(hidden_BSD[:, -L:][masked_BL], completion_BL[masked_BL], banned_ids=[model.mask_id])

    pad = model.config.pad_token_id
    padding_B = None if pad is None else torch.eq(prompt_ids_BP, pad).sum(dim=1)
    if padding_B is not None and not padding_B.any():
        padding_B = None  # then the fastest attention kernel applies
    logprob_N = model(torch.cat([prompt_ids_BP, latent_BL], dim=1), padding=padding_B, read=read)
    weight_N = (1 / rate_B1).expand(B, L)[masked_BL]
    return -(weight_N * logprob_N).sum() / (B * L)


def build_model(task: CompactTask, size: ModelSize) -> MaskedDiffusionLM:
    """A freshly initialised model with a word tokenizer over the task's vocabulary."""
    tokenizer = word_tokenizer(task.vocabulary)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **size.model_dump(),
    )
    return MaskedDiffusionLM(config, tokenizer)


def encode_examples(model: MaskedDiffusionLM, task: CompactTask, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompt ids [count, P], padded on the left, and completion ids [count, gen_length], filled up with EOS, of fresh training examples.

    ValueError for an example that is longer.
    """
    prompts, completions = zip(*task.examples(count, seed), strict=True)
    tokenizer = model.tokenizer
    assert tokenizer is not None  # it knows the task's words
    prompt_ids = tokenizer(list(prompts), padding=True, return_tensors="pt")["input_ids"]
    L, eos = task.gen_length, tokenizer.eos_token_id
    completion_ids = tokenizer(list(completions))["input_ids"]
    if (longest := max(map(len, completion_ids))) > L:
        raise ValueError(
            f"gen_length: task {task.name} has {L} tokens for a completion, one of its examples takes {longest}"
        )
    return prompt_ids, torch.tensor([ids + [eos] * (L - len(ids)) for ids in completion_ids])


def pretrain(
    model: MaskedDiffusionLM,
    task: CompactTask,
    config: PretrainConfig,
    goes_on: Callable[[int], bool] = lambda steps: True,
    log: Callable[[dict], object] = lambda line: None,
) -> float:
    """Train on generated examples, in place; returns the mean loss (nats/token) of the last 50 steps.

    goes_on: asked after each step, with the number of those that are done, whether there is to be another. log: takes, every 50 steps and
    after the last, {"step", "loss": mean of the last 50, nats/token, "lr", "seconds": since the start}.

    FloatingPointError when the loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    chunk = 50  # steps per call of the generator
    started = time.perf_counter()
    losses = []
    if config.compile:
        for layer in model.layers:
            layer.compile(dynamic=True)
    with progress_bar(Console()) as progress:
        bar = progress.add_task(f"pretraining on {task.name}", total=config.steps)
        for step in range(config.steps):
            if step % chunk == 0:
                examples = encode_examples(model, task, chunk * config.batch_size, derive(config.seed, step))
                prompts, completions = (ids.to(model.device) for ids in examples)
            rows = slice((step % chunk) * config.batch_size, (step % chunk + 1) * config.batch_size)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16):
                loss = elbo_loss(model, prompts[rows], completions[rows], config.seed, step)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: lower --lr")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, description=f"loss {losses[-1]:.3f} nats/token")
            last = not goes_on(step + 1) or step + 1 == config.steps
            mean, seconds = sum(losses[-50:]) / len(losses[-50:]), time.perf_counter() - started
            if last or (step + 1) % _LOGGED_EVERY == 0:
                log({"step": step + 1, "loss": mean, "lr": config.lr * lr_factor(step, config), "seconds": seconds})
            if step % 100 == 99:
                progress.console.print(f"step {step + 1}: loss {mean:.3f}, {seconds:.0f} s")
            if last:
                break
    model.eval()
    return mean


def lr_factor(step: int, config: PretrainConfig) -> float:
    """Share of --lr at a step counted from 0: linear warm-up, times a linear fall to ``final_lr_fraction``, which
    the step after the last would have."""
    fall = 1 - (1 - config.final_lr_fraction) * step / config.steps
    return min((step + 1) / config.warmup_steps, 1.0) * fall


def evaluations(model: MaskedDiffusionLM, task: CompactTask, heldout: int) -> list[Evaluation]:
    """How well it decodes held-out problems: one token at a time, and by entropy bounds."""
    bounds = (EntropyBounded(gamma) for gamma in (0.01, 0.1, 0.5, 1.0, math.inf))
    problems = fixed_problems(task, heldout)
    return [evaluate(model, task, problems, rule) for rule in (one_at_a_time(completion_lengths(task)), *bounds)]


def model_card(
    model: MaskedDiffusionLM,
    task: CompactTask,
    config: PretrainConfig,
    loss: float,
    seconds: float,
    found: list[Evaluation],
) -> str:
    """A README in Markdown: what the model is, how it was made, and how well it decodes held-out problems."""
    parameters = sum(p.numel() for p in model.parameters())
    on_gpu = model.device.type == "cuda"
    where = torch.cuda.get_device_name(model.device) if on_gpu else f"{torch.get_num_threads()} CPU threads"
    return "\n".join(
        [
            f"# A masked diffusion LM of {parameters / 1e6:.2f} M parameters, pretrained on {task.name}",
            "",
            f"Made by `python -m diffpo.pretrain` with {config.model_dump_json(exclude={'output'})}.",
            "",
            f"- Data: {config.steps * config.batch_size:,} examples generated by `diffpo.tasks.{type(task).__name__}`, train split only.",
            f"- Loss at the end: {loss:.3f} nats per completion token (negative ELBO, mean of the last 50 steps).",
            f"- Time: {seconds:.0f} s on {where}, torch {torch.__version__}.",
            "- Licence: Apache-2.0, as the project.",
            "",
            f"Held-out problems solved ({config.heldout} of the test split, greedy):",
            "",
            "| rule | accuracy | NFE |",
            "|---|---|---|",
            *(f"| {row.rule} | {row.accuracy:.1%} | {row.nfe:.2f} |" for row in found),
            "",
        ]
    )


def compact_task(name: str) -> CompactTask:
    """ValueError for a task whose problems have no compact words, from which no tiny model can be made."""
    task = get_task(name)
    if not isinstance(task, CompactTask):
        raise ValueError(f"task: {name} has no words of its own: pretrain on countdown, sudoku or medley")
    return task


def check_size(model: MaskedDiffusionLM, size: ModelSize) -> None:
    """ValueError for a size that was asked for and is not that of the model to go on from."""
    for name, default in ModelSize().model_dump().items():
        asked, own = getattr(size, name), getattr(model.config, name)
        if asked not in (default, own):
            raise ValueError(f"model.{name}: the model of --start decides the size, {own}, got {asked}: leave it out")


def main(arguments: list[str] | None = None) -> int:
    """The exit code, see ``diffpo.runs.faults``. Ctrl-C or SIGTERM saves the model of the step that it is at."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = parse(PretrainConfig, arguments)
    return command.carry_out(lambda: prepare(config, arguments))


def prepare(config: PretrainConfig, arguments: list[str]) -> "Run":
    """Everything that can be wrong is found before the output folder is made. ValueError or OSError."""
    task = compact_task(config.task)
    torch.manual_seed(config.seed)  # initial weights only; every other draw is keyed
    device = choose_device(config.device)
    model = load(config.start, device) if config.start else build_model(task, config.model).to(device)
    if config.start:
        check_size(model, config.model)
    check_vocabulary(model, task)
    fixed_problems(task, config.heldout)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    if {path.name for path in Path(config.output).iterdir()} - {_LOG}:  # the log alone is of a run that failed
        raise ValueError(f"output folder {config.output} is not empty: choose another with --output")
    keep_freed_memory()
    return Run(config, model, task, arguments)


class Run(command.Run):
    """Train, save, measure."""

    faults = (FloatingPointError,)

    def __init__(self, config: PretrainConfig, model: MaskedDiffusionLM, task: CompactTask, arguments: list[str]):
        super().__init__()
        self.config, self.model, self.task, self.arguments = config, model, task, arguments
        self.inputs = model_inputs(*resolve(config.start)) if config.start else {}
        self.folder = Path(config.output)
        path = self.folder / _LOG
        self.log = JsonLines(own_file(path), str(path), "line of metrics", fresh=True)
        self.steps = 0  # that are done
        self.found: list[Evaluation] = []
        self.saved = False

    def work(self) -> None:
        config, started = self.config, time.perf_counter()
        self.model.train()
        try:
            loss = pretrain(self.model, self.task, config, self._goes_on, self.log.write)
        except OSError:  # the reader is gone, or a line did not fit on the disk
            self._save()
            raise
        self._save()
        if not self.interruption.requested:
            seconds = time.perf_counter() - started
            self.found = evaluations(self.model, self.task, config.heldout)
            card = model_card(self.model, self.task, config, loss, seconds, self.found)
            write_atomically(self.folder / "README.md", lambda path: Path(path).write_text(card, encoding="utf-8"))
            print(card)

    def report(self) -> None:
        """summary.json, beside a model that is saved."""
        if not self.saved:
            return
        settings = json.loads(self.config.model_dump_json(exclude={"output"}))
        summary = {
            "config": settings | {"start": portable(self.config.start)},
            "steps": self.steps,
            "last": self.log.rows[-1] if self.log.rows else None,
            "evaluations": [evaluation.asdict() for evaluation in self.found],
            "provenance": command_provenance("pretrain", self.arguments, self.inputs),
        }
        text = json.dumps(finite(summary), indent=2) + "\n"
        write_atomically(self.folder / "summary.json", lambda path: Path(path).write_text(text, encoding="utf-8"))

    def close(self) -> None:
        self.log.close()

    def _save(self) -> None:
        check_finite(dict(self.model.named_parameters()))
        self.model.save(self.config.output)
        self.saved = True

    def _goes_on(self, steps: int) -> bool:
        self.steps = steps
        return not self.interruption.requested

    def progress(self) -> str:
        return f"after step {self.steps} of {self.config.steps}"

    def kept(self) -> str:
        return f"the model of that step is in {self.config.output}" if self.saved else ""


if __name__ == "__main__":
    with output_may_fail():
        raise SystemExit(main())
