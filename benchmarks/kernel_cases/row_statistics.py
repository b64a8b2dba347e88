"""row_statistics: one decoding step's logits, greedy and drawn."""

import functools

import torch
from torch import Tensor

from diffpo_kernels import RowStatistics, row_statistics
from kernel_cases.case import (
    Case,
    Contestant,
    Workload,
    available_backends,
    errors_of,
    faster_than,
    generator,
    sample,
    share_at_least,
)

_OPERATOR = "row_statistics"
_FIELDS = ("logprob", "entropy", "top1", "top2", "lse")
_ITEM = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_LARGEST_REFERENCE = 2**29  # logits; the reference draws in float64 and would need over 100 bytes for each


def cases(device: str) -> list[Case]:
    if device == "cpu":
        sizes = [(64, 126464, torch.float32), (64, 126464, torch.bfloat16), (256, 126464, torch.float32)]
        sizes += [(256, 126464, torch.bfloat16), (64, 152064, torch.bfloat16), (256, 152064, torch.bfloat16)]
    else:
        sizes = [(rows, v, torch.bfloat16) for v in (126464, 152064) for rows in (2048, 16384, 256, 32)]
        sizes.append((2048, 126464, torch.float32))
    greedy = [case(device, *size, temperature=0.0) for size in sizes]
    return greedy + [case(device, *size, temperature=0.7) for size in sizes if size[1] == 126464]


def case(device: str, rows: int, vocabulary: int, dtype: torch.dtype, temperature: float) -> Case:
    targets = ()
    if device == "cpu" and (rows, vocabulary, temperature) == (64, 126464, 0.0):
        targets = (faster_than("eager", 20 if dtype == torch.float32 else 30), faster_than("torch.compile", 3))
    if device == "cuda" and rows >= 2048 and temperature == 0:
        targets = (share_at_least(0.9), faster_than("eager", 10))
    return Case(
        f"{rows} x {vocabulary} {_ITEM[dtype]}, T = {temperature:g}",
        functools.partial(build, rows, vocabulary, dtype, temperature),
        targets,
        quick=(rows, vocabulary, temperature) == (64 if device == "cpu" else 2048, 126464, 0.0)
        and dtype == torch.bfloat16,
    )


def build(rows: int, vocabulary: int, dtype: torch.dtype, temperature: float, device: torch.device) -> Workload:
    random = generator(device)
    logits_NV = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    for part_nV in logits_NV.split(1024):
        part_nV.copy_(3 * torch.randn(part_nV.shape, generator=random, device=device))
    uniform_N = torch.rand(rows, generator=random, device=device) if temperature > 0 else None
    checked_n = sample(rows, 64, device)
    logits_nV = logits_NV[checked_n]
    uniform_n = None if uniform_N is None else uniform_N[checked_n]
    log_p_nV = logits_nV.double().log_softmax(1)

    def against_truth(result: RowStatistics) -> dict[str, float]:
        return errors(RowStatistics(*result), log_p_nV, logits_nV, temperature, uniform_n)

    def contestant(backend: str) -> Contestant:
        def call() -> RowStatistics:
            return row_statistics(logits_NV, temperature, uniform_N, backend=backend)

        return Contestant(backend, call, lambda: against_truth([field_N[checked_n] for field_N in call()]))

    usable, missing = available_backends(_OPERATOR, device)
    if logits_NV.numel() > _LARGEST_REFERENCE:
        usable.remove("reference")
        missing["reference"] = "would not fit; the eager chain stands for it"
    compiled = torch.compile(eager_chain, dynamic=False)
    baselines = [
        Contestant("eager", lambda: eager_chain(logits_NV, temperature, uniform_N)),
        Contestant("torch.compile", lambda: compiled(logits_NV, temperature, uniform_N), compiles=True),
    ]
    return Workload(
        [*map(contestant, usable), *baselines],
        missing,
        lambda: against_truth(row_statistics(logits_nV, temperature, uniform_n, backend="reference")),
        bytes=logits_NV.numel() * logits_NV.element_size(),
    )


def eager_chain(logits_NV: Tensor, temperature: float, uniform_N: Tensor | None) -> tuple[Tensor, ...]:
    """What a sampler does without this operator: token, its log-probability, entropy and confidence."""
    log_p_NV = logits_NV.log_softmax(1, dtype=torch.float32)
    p_NV = log_p_NV.exp()
    entropy_N = -(p_NV * log_p_NV).sum(1)
    top1_N, token_N = p_NV.max(1)
    if uniform_N is not None:
        log_p_NV = (logits_NV.float() / temperature).log_softmax(1)
        cumulative_NV = log_p_NV.exp().cumsum(1)
        token_N1 = torch.searchsorted(cumulative_NV, uniform_N[:, None], right=True).clamp(max=logits_NV.shape[1] - 1)
        token_N = token_N1[:, 0]
    return token_N, log_p_NV.gather(1, token_N[:, None])[:, 0], entropy_N, top1_N


def errors(
    result: RowStatistics, log_p_nV: Tensor, logits_nV: Tensor, temperature: float, uniform_n: Tensor | None
) -> dict[str, float]:
    """Against float64. A draw is wrong by the probability mass between the uniform number and the drawn token's interval."""
    p_nV = log_p_nV.exp()
    top_n2 = p_nV.topk(2, dim=1).values
    best_n = log_p_nV.argmax(1)
    token_n = result.token.clamp(0, logits_nV.shape[1] - 1)
    log_q_nV = log_p_nV if uniform_n is None else (logits_nV.double() / temperature).log_softmax(1)
    truth = {
        "logprob": log_q_nV.gather(1, token_n[:, None])[:, 0],
        "entropy": torch.special.entr(p_nV).sum(1),
        "top1": top_n2[:, 0],
        "top2": top_n2[:, 1],
        "lse": logits_nV.double().logsumexp(1),
    }
    found: dict[str, float] = {}
    for name in _FIELDS:
        found |= errors_of(name, getattr(result, name) - truth[name])
    found["wrong flags"] = int((~result.valid).sum())
    if uniform_n is None:
        return found | {"wrong tokens": int((result.token != best_n).sum())}
    above_n = log_q_nV.exp().cumsum(1).gather(1, token_n[:, None])[:, 0]
    below_n = above_n - truth["logprob"].exp()
    outside_n = torch.maximum(below_n - uniform_n, uniform_n - above_n).clamp(min=0)
    outside_n[result.token != token_n] = torch.inf
    return found | errors_of("draw", outside_n)
