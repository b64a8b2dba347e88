"""``python benchmarks/experiments/harder.py``: DiFFPO and d1 on a harder task with longer answers, sized for one GPU.

Countdown with four numbers (18 tokens an answer, 291,075 problems to train on) and a model of 15 M parameters: pretrained by
configs/countdown4-pretrain.toml, then trained by configs/countdown4-joint.toml and configs/countdown4-d1.toml, every seed. What exists is
not repeated. Decoding and areas as in sampler.py. Writes harder.json and harder.png.

    python benchmarks/experiments/harder.py --device cuda      everything, on a GPU
    python benchmarks/experiments/harder.py --smoke            a tiny model, a few steps, on the CPU
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from decode_front import GAMMAS, SMOKE_GAMMAS, sweep
from learning_curves import STYLE, draw_band
from rich.console import Console
from sampler import base_front, proxy_of
from sampler_figure import COLOURS, draw_fronts
from sampler_report import print_tables, reading, summarise
from study import CONFIGS, Options, Run, parser, provenance, read, train_all, write

from diffpo.device import choose_device

TASK = "countdown4"
ARMS = ("joint", "d1")
HELDOUT = 1000
PRETRAINING_MINUTES, MINUTES = 25.0, 15.0  # on a GPU, estimated from the operations and never measured; on a CPU days
SMOKE_PRETRAINING = {
    **{"steps": 4, "batch-size": 8, "heldout": 8, "model.hidden-size": 32},
    **{"model.intermediate-size": 64, "model.num-hidden-layers": 1, "model.num-attention-heads": 2},
}


def pretrain(base: Path, given: Options) -> None:
    """The base model in its own process, unless it is there."""
    if (base / "config.json").exists():
        return
    flags = {"output": base, "device": given.device} | (SMOKE_PRETRAINING if given.smoke else {})
    command = [sys.executable, "-m", "diffpo.pretrain", str(CONFIGS / f"{TASK}-pretrain.toml")]
    subprocess.run(
        [*command, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))], check=True
    )


def runs(seeds: int, base: Path, arms: tuple[str, ...] = ARMS) -> list[Run]:
    flags = {"heldout": HELDOUT}
    return [Run(arm, TASK, seed, flags, f"{TASK}-{arm}.toml", str(base)) for seed in range(seeds) for arm in arms]


def fronts(results: list[dict], base: Path, given: Options) -> dict:
    """The front of every run goes into its result; the base model's is returned. Kept in harder/fronts/."""
    folder, device = given.output / "harder" / "fronts", str(choose_device(given.device))
    heldout, gammas = (16, SMOKE_GAMMAS) if given.smoke else (HELDOUT, GAMMAS)

    def kept(name: str, make) -> dict | None:
        path = folder / f"{name}.json"
        if not path.exists():
            if given.report:
                return None
            write(path, make() | {"provenance": provenance({"heldout": 0})})
        return json.loads(path.read_text())

    for result in results:
        name = f"{TASK}-{result['arm']}-seed{result['seed']}"
        model, proxy = given.runs / "harder" / name / "model", proxy_of(result["flags"])
        result["front"] = kept(
            name, lambda model=model, proxy=proxy: sweep(str(model), TASK, proxy, heldout, gammas, device)
        )
        result["adaptation"] = None
    return kept("base", lambda: base_front(str(base), TASK, heldout, gammas, given.smoke, device))


def draw(results: list[dict], base: dict, limit: float, path: Path) -> None:
    """Fronts, and training accuracy against denoiser calls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        draw_fronts(left, results, base, limit)
        left.set_title(f"{TASK}: {left.get_title(loc='left')}")
        for arm in ARMS:
            curves = [result["curve"] for result in results if result["arm"] == arm]
            if curves:
                draw_band(right, curves, "denoiser_calls", "accuracy", COLOURS[arm], arm)
        right.set(
            title=f"{TASK}: training accuracy, rollouts at T = 1",
            xlabel="denoiser calls (sequences)",
            ylabel="accuracy",
        )
        right.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def report(results: list[dict], base: dict, given: Options) -> None:
    summary = summarise(results, {TASK: base})
    document = {"tasks": summary, "reading": reading(summary)}
    seeds = {"runs": sorted({result["seed"] for result in results}), "heldout": 0, "pretraining": 0}
    write(given.output / "harder.json", document | {"provenance": provenance(seeds)})
    draw(results, base, summary[TASK]["limit"], given.output / "harder.png")
    console = Console(width=180, highlight=False)
    print_tables(summary, console)
    console.print(*document["reading"], sep="\n")


def main() -> None:
    command = parser(__doc__, seeds=3, tasks=(TASK,))
    command.set_defaults(device="auto", jobs=1)
    given = read(command.parse_args())
    base = given.runs / "harder" / "base"
    if not given.report:
        if not given.smoke and not (base / "config.json").exists():
            print(f"pretraining: about {PRETRAINING_MINUTES:.0f} minutes on a GPU (estimated, not measured)")
        pretrain(base, given)
    wanted = runs(given.seeds, base, ("joint",) if given.smoke else ARMS)
    results = train_all("harder", wanted, given, lambda run: MINUTES)
    base_points = fronts(results, base, given)
    results = [result for result in results if result["front"]]
    if results and base_points:
        report(results, base_points, given)


if __name__ == "__main__":
    main()
