"""Peak memory of an update, in a fresh process: the largest resident set while it runs, less that before it.

Gradients count, weights do not; libraries are loaded and threads started by an update of a small vocabulary before. Linux only.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from diffpo.cpu_memory import keep_freed_memory
from diffpo.trajectory import Trajectory
from likelihood_cases.updates import Case, Setting, model_of, rollouts


def in_fresh_process(function, *arguments):
    """The value of a function of a module, computed by a new interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def of_update(setting: Setting, trajectory: bytes, name: str, flags: dict, keep_freed: bool) -> int:
    """Bytes that ``Case.<name>(**flags)`` needs at its peak."""
    if keep_freed:
        keep_freed_memory()
    warm_up(setting, name, flags)
    case = Case(setting, Trajectory.from_bytes(trajectory), model_of(setting))
    update = getattr(case, name)(**flags)
    return of_call(update)


def of_one_part(setting: Setting, trajectory: bytes, keep_freed: bool) -> int:
    """Bytes that an update needs at its peak whose latents fill one part alone."""
    if keep_freed:
        keep_freed_memory()
    warm_up(setting, "ours", {})
    case = Case(setting, Trajectory.from_bytes(trajectory), model_of(setting))
    latents = case.latents
    first = type(latents)(
        *(value[-setting.sequences_at_once :].clone() for value in (latents.row, latents.masked, latents.weight))
    )
    case.latents = latents = None
    return of_call(case.ours(latents=first))


def warm_up(setting: Setting, name: str, flags: dict) -> None:
    small = replace(setting, shape=replace(setting.shape, vocabulary=1000), rollouts=8, steps=4, sequences_at_once=None)
    model = model_of(small)
    getattr(Case(small, rollouts(small, model), model), name)(**flags)()


def of_call(call) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
