"""Evaluation by all processes of a training: each decodes and grades some of the problems."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch

from diffpo.decoding.rules import Rule
from diffpo.evaluation import Evaluation, Item, evaluated, of_items
from diffpo.models.sharding import gathered
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Task
from diffpo.tasks.prompts import prompt_ids
from diffpo.tasks.task import Lengths
from diffpo.training.distributed import ALONE, World


def evaluate(
    model: MaskedDiffusionLM,
    task: Task,
    problems: Sequence,
    rule: Rule,
    lengths: Lengths,
    batch_size: int,
    world: World = ALONE,
    seen: Callable[[Item], object] = lambda item: None,
) -> Evaluation:
    """As `diffpo.evaluation.evaluate`, in all processes. Seconds are those of all of them together; ``seen`` is called with each item that
    this process has done, at the end with the others."""
    rule = rule.resolve(model)
    prompts = prompt_ids(model.tokenizer, task, problems)
    own = world.share(torch.tensor([len(ids) for ids in prompts])).tolist()

    def decoded() -> list[Item]:
        mine, asked = [problems[i] for i in own], [prompts[i] for i in own]
        done = []
        for item in evaluated(model, task, mine, asked, lengths, rule, batch_size) if own else ():
            done.append(item | {"index": own[item["index"]]})
            seen(item)
        return done

    with gathered(model):
        parts = world.gather_json(world.agreed(decoded))
    items = sorted(chain.from_iterable(parts), key=lambda item: item["index"])
    for item in items:
        if item["index"] not in own:
            seen(item)
    return of_items(task, problems, rule, items)
