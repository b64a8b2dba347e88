"""``python benchmarks/hops.py``: how many functions of diffpo one has to know to follow a prompt, and a group of rollouts.

Distinct Python functions (code objects; comprehensions, lambdas and module bodies do not count) of diffpo and diffpo_kernels that run in

    generate     one prompt through `diffpo.generate`, under the default rule
    update       one group of rollouts through `Trainer.step`, from the collected rollouts to the optimizer step
    step         the same with the collection of the rollouts

Prints the counts, and the functions by file. What is computed once and cached is counted: each is traced at its first call.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import diffpo
from diffpo.tasks import get_task
from diffpo.training.config import TrainConfig
from diffpo.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (str(ROOT / "diffpo") + "/", str(ROOT / "diffpo_kernels") + "/")
MODEL = "tiny-countdown-diffpo"


def traced(call: Callable[[], object]) -> set[CodeType]:
    """The functions of the two packages that `call` runs."""
    found: set[CodeType] = set()

    def seen(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            found.add(frame.f_code)

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {code for code in found if code.co_filename.startswith(PACKAGES) and not code.co_name.startswith("<")}


def one_prompt() -> set[CodeType]:
    model = diffpo.load(MODEL, "cpu")
    return traced(lambda: diffpo.generate(model, ["8 12 5 -> 36"], gen_length=12))


def one_group() -> tuple[set[CodeType], set[CodeType]]:
    """Of the update alone, and of the whole step."""
    config = TrainConfig(algorithm={"name": "diffpo", "prompts_per_update": 1, "inner_updates": 2})
    trainer = Trainer(config, diffpo.load(config.model, "cpu"), get_task(config.task))
    collected: set[CodeType] = set()
    collect = trainer.collect

    def apart():
        outer = sys.getprofile()
        kept = []
        collected.update(traced(lambda: kept.append(collect())))
        sys.setprofile(outer)
        (rollout,) = kept
        rollout.reward[0] += 1  # one group of equal rewards would be left out
        return rollout

    trainer.collect = apart
    update = traced(trainer.step)
    return update, update | collected


def by_file(codes: set[CodeType]) -> dict[str, list[str]]:
    files = defaultdict(list)
    for code in codes:
        files[str(Path(code.co_filename).relative_to(ROOT))].append(code.co_qualname)
    return {name: sorted(functions) for name, functions in sorted(files.items())}


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    generate, (update, step) = one_prompt(), one_group()
    for name, codes in (("generate", generate), ("update", update), ("step", step)):
        files = by_file(codes)
        kernels = sum(len(functions) for file, functions in files.items() if file.startswith("diffpo_kernels/"))
        print(f"{name}: {len(codes)} functions in {len(files)} files, {kernels} of them of diffpo_kernels")
        for file, functions in files.items():
            print(f"  {file}: {len(functions)}  {', '.join(functions)}")


if __name__ == "__main__":
    main()
