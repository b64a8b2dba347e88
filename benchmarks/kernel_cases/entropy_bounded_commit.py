"""entropy_bounded_commit_: one denoising step of 64 sequences."""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from diffpo_kernels import entropy_bounded_commit_
from kernel_cases.case import Case, Contestant, Target, Workload, available_backends, generator

_OPERATOR = "entropy_bounded_commit_"
_MASK_ID = 126336


def cases(device: str) -> list[Case]:
    supported = "advance" in inspect.signature(entropy_bounded_commit_).parameters
    modes = (False, True) if supported else (False,)
    return [case(device, 64, 2048, window, whole_step) for whole_step in modes for window in (32, 2048)]


def case(device: str, rows: int, length: int, window: int, whole_step: bool) -> Case:
    """whole_step: the records of the decoder (log-probability, commit step, NFE) and the next block's window are written too."""
    in_a_graph = Target("at most 10 us in a graph", lambda mine, _: mine.graph_seconds, 10e-6, at_most=True)
    return Case(
        f"{rows} rows, window of {window} in {length}" + (", all records" if whole_step else ""),
        functools.partial(build, rows, length, window, whole_step),
        (in_a_graph,) if device == "cuda" else (),
        graph=device == "cuda",
        quick=window == 32 and not whole_step,
    )


def build(rows: int, length: int, window: int, whole_step: bool, device: torch.device) -> Workload:
    random = generator(device)
    first = (length - window) // 2
    tokens_BL = torch.randint(0, 1000, (rows, length), generator=random, device=device)
    tokens_BL[torch.rand(rows, length, generator=random, device=device) < 0.75] = _MASK_ID
    tokens_BL[:, first] = _MASK_ID  # no window without a masked position
    proposal_BL = torch.randint(0, 1000, (rows, length), generator=random, device=device)
    entropy_BL = 2 * torch.rand(rows, length, generator=random, device=device)
    proxy_BL = entropy_BL + 0.1 * torch.randn(rows, length, generator=random, device=device)
    gamma_B = 20 * torch.rand(rows, generator=random, device=device)
    window_of_all = (first, first + window)

    def commit(
        backend: str,
        tokens_BL: Tensor,
        proposal_BL: Tensor,
        records: dict,
        function: Callable = entropy_bounded_commit_,
    ) -> Tensor:
        start, end = records.pop("window", window_of_all)
        return function(
            tokens_BL, proposal_BL, proxy_BL, entropy_BL, gamma_B, _MASK_ID, start, end, backend=backend, **records
        )

    def new_records() -> dict:
        if not whole_step:
            return {}
        return {
            "window": tuple(torch.full((rows,), bound, device=device) for bound in window_of_all),
            "max_window": window,
            "proposal_logprob": entropy_BL,
            "logprob": torch.zeros_like(entropy_BL),
            "commit_step": torch.zeros_like(tokens_BL),
            "nfe": torch.zeros(rows, dtype=torch.int64, device=device),
            "advance": True,
        }

    expected_BL = brute_force(tokens_BL, proxy_BL, entropy_BL, gamma_B, *window_of_all)

    def errors(backend: str) -> dict[str, float]:
        got_BL, records = tokens_BL.clone(), new_records()
        committed_BL = commit(backend, got_BL, proposal_BL, dict(records))
        wrong = {
            "wrong commits": committed_BL != expected_BL,
            "wrong tokens": got_BL != torch.where(expected_BL, proposal_BL, tokens_BL),
        }
        if whole_step:
            left_B = (got_BL[:, slice(*window_of_all)] == _MASK_ID).any(1)
            start, end = window_of_all
            next_start_B = torch.where(left_B, start, min(end, length))
            next_end_B = torch.where(left_B, end, min(2 * end - start, length))
            new_start_B, new_end_B = records["window"]
            wrong |= {
                "wrong logprobs": records["logprob"] != torch.where(expected_BL, entropy_BL, 0.0),
                "wrong commit steps": records["commit_step"] != expected_BL.long(),
                "wrong nfe": records["nfe"] != 1,
                "wrong windows": (new_start_B != next_start_B) | (new_end_B != next_end_B),
            }
        return {name: int(where.sum()) for name, where in wrong.items()}

    # Commits while timing write the mask token, so that every call finds what the first one found.
    timed_BL, mask_BL, timed_records = tokens_BL.clone(), torch.full_like(proposal_BL, _MASK_ID), new_records()

    def call(backend: str, function: Callable = entropy_bounded_commit_) -> Tensor:
        return commit(backend, timed_BL, mask_BL, dict(timed_records), function)

    usable, missing = available_backends(_OPERATOR, device)
    compiled = torch.compile(entropy_bounded_commit_, dynamic=False)
    contestants = [Contestant(name, functools.partial(call, name), functools.partial(errors, name)) for name in usable]
    contestants.append(Contestant("torch.compile", lambda: call("reference", compiled), compiles=True))
    bytes_moved = rows * (window * (8 + 4 + 4) + length)  # tokens, proxy, entropy; the result
    committed = int(expected_BL.sum())
    bytes_moved += committed * (8 + 8)  # proposal, token
    if whole_step:
        bytes_moved += (
            committed * (4 + 4 + 8) + rows * 6 * 8
        )  # log-probability twice, commit step; NFE and window, read and written
    return Workload(contestants, missing, lambda: errors("reference"), bytes=bytes_moved)


def brute_force(tokens_BL: Tensor, proxy_BL: Tensor, cost_BL: Tensor, gamma_B: Tensor, start: int, end: int) -> Tensor:
    """The contract, row by row in Python's float64."""
    committed_BL = torch.zeros(tokens_BL.shape, dtype=torch.bool)
    tokens, proxies, costs = tokens_BL.tolist(), proxy_BL.double().tolist(), cost_BL.double().tolist()
    for b, gamma in enumerate(gamma_B.double().tolist()):
        active = [i for i in range(start, end) if tokens[b][i] == _MASK_ID]
        total = largest = 0.0
        for rank, i in enumerate(sorted(active, key=lambda i: (proxies[b][i], i))):
            total, largest = total + costs[b][i], max(largest, costs[b][i])
            if rank > 0 and total - largest > gamma:
                break
            committed_BL[b, i] = True
    return committed_BL.to(tokens_BL.device)
