"""Where the time of a decoding goes: transformer, head, statistics and commit, the rest. From one profiled run on the CPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from decoding_cases.plain_loops import STATISTICS
from diffpo.models.transformer import MaskedDiffusionLM

TRANSFORMER, HEAD, REST = "transformer", "head", "rest"
_PART_OF = {
    TRANSFORMER: TRANSFORMER,
    HEAD: HEAD,
    STATISTICS: STATISTICS,
    "diffpo_kernels::row_statistics": STATISTICS,
    "diffpo_kernels::entropy_bounded_commit_": STATISTICS,
}


def seconds_by_part(model: MaskedDiffusionLM, decode: Callable[[], Any]) -> dict[str, float]:
    """Of one call of `decode`; the rest is what no other part accounts for."""
    with _named(model), profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        decode()
        total = time.perf_counter() - start
    parts = dict.fromkeys((TRANSFORMER, HEAD, STATISTICS), 0.0)
    for event in recorded.key_averages():
        if event.key in _PART_OF:
            parts[_PART_OF[event.key]] += event.cpu_time_total / 1e6
    empty = [name for name, seconds in parts.items() if seconds == 0]
    if empty:
        raise RuntimeError(f"the profile of a decoding shows no time in: {', '.join(empty)}")
    return parts | {REST: total - sum(parts.values())}


@contextmanager
def _named(model: MaskedDiffusionLM) -> Iterator[None]:
    """The profiler sees the modules of the model under the names of their parts."""
    modules = [(module, TRANSFORMER) for module in (model.embed_tokens, *model.layers, model.norm)]
    hooks = [hook for module, name in [*modules, (model.lm_head, HEAD)] for hook in _record(module, name)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _record(module: nn.Module, name: str) -> list:
    open_ranges: list[record_function] = []

    def begin(*_: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
