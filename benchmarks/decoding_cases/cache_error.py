"""What the caches cost in accuracy: the shipped models, with kept keys and values against exact decoding.

Greedy, one token a step: the share of equal tokens and the accuracy on held-out problems. Drawn at temperature 1, the divergence of the
distribution that the tokens came from against the exact one at the same latents: mean over committed tokens of log q - log p, an unbiased
estimate of KL(q || p) in nats per token (it can be slightly negative), as positions are committed in the order of their entropies, on which
the draws have no influence. log q is the trajectory's; log p is computed here, by evaluating every latent of the trajectory anew. The row without a cache is the check: all tokens equal, and a divergence of rounding alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffpo.decoding.generation import Generation, generate
from diffpo.decoding.rules import EntropyBounded, FixedSchedule, Rule
from diffpo.evaluation import fixed_problems
from diffpo.models.checkpoints import load
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Task, get_task
from diffpo.trajectory import Trajectory

MODELS = {"tiny-countdown": "countdown", "tiny-sudoku": "sudoku"}
BLOCK_LENGTH = 4  # of the tasks' 12 and 16 tokens: with a single block there is nothing after it to keep
BATCH = 64
CACHES = (("none", None), ("prefix", None), ("prefix", 2), ("dual", None), ("dual", 2))


@dataclass
class Row:
    """refresh: steps between exact passes, None: at each block's start. equal_tokens: share; kl: nats per token, standard_error its own."""

    model: str
    cache: str
    refresh: int | None
    problems: int
    status: str = "ok"
    equal_tokens: float | None = None
    accuracy: float | None = None
    exact_accuracy: float | None = None
    kl: float | None = None
    standard_error: float | None = None


def run(problems: int, report: Callable[[list[Row]], None]) -> None:
    """Every shipped model with every cache, `report` after each model."""
    for name, task_name in MODELS.items():
        model, task = load(name, "cpu"), get_task(task_name)
        held_out = fixed_problems(task, problems)
        exact, rows = _decode(model, task, held_out, FixedSchedule(task.gen_length), 0.0, {}), []
        for cache, refresh in CACHES:
            row = Row(name, cache, refresh, problems)
            rows.append(row)
            try:
                _measure(row, model, task, held_out, exact)
            except Exception as error:  # one mode's failure stops no other
                row.status = f"FAILED: {type(error).__name__}: {error}"[:300]
        report(rows)


def _measure(row: Row, model: MaskedDiffusionLM, task: Task, problems: list, exact: Generation) -> None:
    options = {} if row.cache == "none" else {"cache": row.cache, "cache_refresh": row.refresh}
    greedy = _decode(model, task, problems, FixedSchedule(task.gen_length), 0.0, options)
    row.equal_tokens = (greedy.tokens == exact.tokens).float().mean().item()
    row.accuracy, row.exact_accuracy = (_accuracy(task, problems, out) for out in (greedy, exact))
    drawn = _decode(model, task, problems, EntropyBounded(0.0), 1.0, options)
    row.kl, row.standard_error = divergence(model, drawn.trajectory)


def _decode(
    model: MaskedDiffusionLM, task: Task, problems: list, rule: Rule, temperature: float, options: dict
) -> Generation:
    prompts = [task.prompt(problem) for problem in problems]
    return generate(model, prompts, task.gen_length, BLOCK_LENGTH, rule, temperature, batch_size=BATCH, **options)


def _accuracy(task: Task, problems: list, out: Generation) -> float:
    return sum(task.grade(problem, text).correct for problem, text in zip(problems, out.text, strict=True)) / len(
        problems
    )


@torch.no_grad()
def divergence(model: MaskedDiffusionLM, path: Trajectory) -> tuple[float, float]:
    """Mean and standard error (over rows) of log q - log p per committed token, nats."""
    mask_BL = torch.cat([path.prompt_mask, torch.ones_like(path.committed)], dim=1)
    exact_BL = torch.zeros_like(path.logprob)
    for step in range(1, int(path.nfe.max()) + 1):
        chosen_BL = path.commit_step == step
        latent_BL = torch.cat([path.prompt_ids, path.latent(step - 1)], dim=1)
        hidden_BLD = model(latent_BL, mask_BL)[:, -path.tokens.shape[1] :]
        logits_NV = model.head(hidden_BLD[chosen_BL]).double()
        logits_NV[:, model.mask_id] = -torch.inf  # never proposed
        logp_N = logits_NV.log_softmax(dim=1).gather(1, path.tokens[chosen_BL][:, None])[:, 0]
        exact_BL[chosen_BL] = logp_N.to(exact_BL.dtype)
    gap_B = (path.logprob - exact_BL).sum(dim=1).double()  # both 0 where nothing was committed
    tokens = path.committed.sum().item()
    return gap_B.sum().item() / tokens, gap_B.std().item() * len(gap_B) ** 0.5 / tokens


def failed(row: Row) -> bool:
    return row.status.startswith("FAILED")
