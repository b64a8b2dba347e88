"""Peak memory of an update, in a fresh process: the largest resident set while it runs, less that before it.

Gradients count, weights do not; libraries are loaded and threads started by an update of a small vocabulary before. Linux with glibc only.
"""

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from diffpo.cpu_memory import keep_freed_memory
from diffpo.likelihood.latents import Latents
from diffpo.trajectory import Trajectory
from likelihood_cases.updates import GROUP, Case, Setting, model_of, rollouts

_LIBC = ctypes.CDLL(None)
_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 18  # glibc's malloc.h; bytes


def in_fresh_process(function, *arguments):
    """The value of a function of a module, computed by a new interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def of_update(setting: Setting, trajectory: bytes, name: str, flags: dict, keep_freed: bool) -> int:
    """Bytes that ``Case.<name>(**flags)`` needs at its peak."""
    set_allocator(keep_freed)
    warm_up(setting, name, flags)
    case = Case(setting, Trajectory.from_bytes(trajectory), model_of(setting))
    return of_call(getattr(case, name)(**flags))


def of_one_part(setting: Setting, trajectory: bytes, keep_freed: bool) -> int:
    """Bytes that an update of the same batch needs at its peak whose latents fill one part alone."""
    set_allocator(keep_freed)
    warm_up(setting, "ours", {})
    case = Case(setting, Trajectory.from_bytes(trajectory), model_of(setting))
    last, every = setting.sequences_at_once, case.latents
    case.latents = Latents(every.row[-last:].clone(), every.masked[-last:].clone(), every.weight[-last:].clone())
    del every
    return of_call(case.ours())


def set_allocator(keep_freed: bool) -> None:
    """Unless freed memory is to be kept, a freed array gives its pages back at once, so that the resident set is what is in use: by default
    glibc stops to do so as arrays come and go, and holes between them count."""
    if keep_freed:
        keep_freed_memory()
    else:
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def warm_up(setting: Setting, name: str, flags: dict) -> None:
    shape = replace(setting.shape, vocabulary=1000)
    small = replace(setting, shape=shape, rollouts=GROUP, gen_length=16, steps=4, sequences_at_once=None)
    model = model_of(small)
    getattr(Case(small, rollouts(small, model), model), name)(**flags)()


def of_call(call) -> int:
    _LIBC.malloc_trim(0)  # what was freed before must not serve the call
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)  # the kernel counts pages in batches


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
