"""linear_logprob: forward, and forward with the gradients of hidden and head, against bare matrix products and fused cross-entropies.

Baselines return a summed cross-entropy, so they are spared one log-probability per token and per-token upstream gradients.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpo_kernels import linear_logprob
from kernel_cases.case import (
    Call,
    Case,
    Contestant,
    Result,
    Target,
    Workload,
    at_most_times,
    available_backends,
    errors_of,
    extra_memory_at_most,
    faster_than,
    generator,
    import_or_reason,
    relative_errors_of,
    sample,
    time_ratio,
)

_OPERATOR = "linear_logprob"
_ITEM = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_WITHOUT_ENTROPY = ", no entropy"
_QUICK = ((64, 126464, 256, torch.float32), (4096, 126464, 4096, torch.bfloat16))


@dataclass(frozen=True)
class Mode:
    """What is computed: the gradients of hidden and head or only the forward pass, with or without the entropy."""

    gradients: bool
    entropy: bool = False

    def __str__(self) -> str:
        return ("forward + backward" if self.gradients else "forward") + (", entropy" if self.entropy else "")


FORWARD, BACKWARD, ENTROPY = Mode(False), Mode(True), Mode(True, entropy=True)


@dataclass(frozen=True)
class Inputs:
    """Upstream gradients differ from row to row: ones would hide a wrong gradient of the head."""

    hidden: Tensor  # [N, D]
    head: Tensor  # [V, D]
    target: Tensor  # [N]
    upstream: Tensor  # [N]
    upstream_entropy: Tensor  # [N]


def cases(device: str) -> list[Case]:
    if device == "cpu":
        sizes = [
            (n, 126464, d, torch.float32, mode) for n in (64, 256) for d in (256, 1024) for mode in (FORWARD, BACKWARD)
        ]
        sizes += [(64, 126464, 256, torch.float32, ENTROPY), (64, 126464, 256, torch.bfloat16, BACKWARD)]
        return [case(device, *size) for size in sizes]
    rows = (4096, 1024, 16384, 2048, 256, 32)
    sizes = [(n, 126464, 4096, torch.bfloat16, BACKWARD) for n in rows[:4]]
    sizes += [(n, 126464, 4096, torch.bfloat16, FORWARD) for n in rows]
    sizes += [(4096, 126464, 4096, torch.bfloat16, ENTROPY)]
    sizes += [
        (n, 152064, 4096, torch.bfloat16, mode) for n, mode in ((4096, BACKWARD), (2048, FORWARD), (256, FORWARD))
    ]
    return [case(device, *size) for size in sizes]


def case(device: str, rows: int, vocabulary: int, width: int, dtype: torch.dtype, mode: Mode) -> Case:
    targets: tuple[Target, ...] = ()
    if device == "cpu" and mode.gradients:
        targets = (faster_than("reference", 1, "no slower than eager"), extra_memory_at_most(64 * 2**20, "64 MiB"))
    if device == "cuda" and mode == BACKWARD and rows == 4096:
        targets = (
            at_most_times("bare GEMMs", 1.2),
            faster_than("liger-kernel", 5),
            faster_than("cut-cross-entropy exact", 1),
            extra_memory_at_most(2_500_000_000, "2.5 GB"),
        )
    if mode.entropy:
        targets += (Target("entropy for at most 2% more", _entropy_costs, 1.02, at_most=True),)
    return Case(
        f"{rows} x {vocabulary}, D = {width}, {_ITEM[dtype]}, {mode}",
        functools.partial(build, rows, vocabulary, width, dtype, mode),
        targets,
        quick=mode == BACKWARD and (rows, vocabulary, width, dtype) in _QUICK,
    )


def _entropy_costs(mine: Result, others: dict[str, Result]) -> float | None:
    return time_ratio(mine, others.get(mine.contestant + _WITHOUT_ENTROPY))


def build(rows: int, vocabulary: int, width: int, dtype: torch.dtype, mode: Mode, device: torch.device) -> Workload:
    inputs = draw(rows, vocabulary, width, dtype, device)
    truth = Truth(inputs, mode)
    usable, missing = available_backends(_OPERATOR, device)
    contestants, torch_errors = [], functools.cache(lambda: truth.errors(ours(inputs, mode, "reference")))
    for backend in usable:
        for suffix, keywords in variants(mode, backend).items():
            call = functools.partial(ours, inputs, mode, backend, **keywords)
            contestants.append(Contestant(backend + suffix, call, lambda call=call: truth.errors(call())))
        if mode.entropy:
            contestants.append(
                Contestant(backend + _WITHOUT_ENTROPY, functools.partial(ours, inputs, BACKWARD, backend))
            )
    products = 3 if mode.gradients else 1
    contestants.append(Contestant("bare GEMMs", functools.partial(bare_products, inputs, mode)))
    compiled = torch.compile(linear_logprob, dynamic=False)
    contestants.append(
        Contestant("torch.compile", lambda: ours(inputs, mode, "reference", function=compiled), compiles=True)
    )
    if not mode.entropy:
        rivals, absent = cross_entropies(device)
        missing |= absent
        contestants += [
            Contestant(name, functools.partial(summed_loss, inputs, mode, loss)) for name, loss in rivals.items()
        ]
    head = inputs.head
    return Workload(
        contestants,
        missing,
        torch_errors,
        bytes=head.numel() * head.element_size() * (2 if mode.gradients else 1),  # the head once, and its gradient
        flops=2 * products * rows * vocabulary * width,
        dtype=dtype,
    )


def draw(rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits with a standard deviation of 3."""
    random = generator(device)
    hidden_ND = torch.randn(rows, width, generator=random, device=device).to(dtype).requires_grad_()
    head_VD = (torch.randn(vocabulary, width, generator=random, device=device) * (3 / width**0.5)).to(dtype)
    target_N = torch.randint(vocabulary, (rows,), generator=random, device=device)
    upstream_N, upstream_entropy_N = torch.randn(2, rows, generator=random, device=device)
    return Inputs(hidden_ND, head_VD.requires_grad_(), target_N, upstream_N, upstream_entropy_N)


def variants(mode: Mode, backend: str) -> dict[str, dict[str, Any]]:
    """What is measured of a backend: its own choice, and in the forward pass never keeping a logit as well."""
    chunked = "chunk_bytes" in inspect.signature(linear_logprob).parameters
    if mode.gradients or backend != "triton" or not chunked:
        return {"": {}}
    return {"": {}, ", logits-free": {"chunk_bytes": 0}}


def ours(
    inputs: Inputs, mode: Mode, backend: str, function: Any = linear_logprob, **keywords: Any
) -> tuple[Tensor, ...]:
    """(logprob, entropy if wanted, gradients of hidden and head if wanted)."""
    with torch.set_grad_enabled(mode.gradients):
        result = function(
            inputs.hidden,
            inputs.head,
            inputs.target,
            return_entropy=mode.entropy,
            backend=backend,
            **keywords,
        )
    outputs = result if mode.entropy else (result,)
    if not mode.gradients:
        return outputs
    upstream = (inputs.upstream, inputs.upstream_entropy)[: len(outputs)]
    gradients = torch.autograd.grad(outputs, (inputs.hidden, inputs.head), upstream)
    return *(output.detach() for output in outputs), *gradients


@torch.no_grad()
def bare_products(inputs: Inputs, mode: Mode) -> tuple[Tensor, ...]:
    """The matrix products that nobody can avoid, and nothing else."""
    logits_NV = inputs.hidden @ inputs.head.T
    if not mode.gradients:
        return (logits_NV,)
    return logits_NV @ inputs.head, logits_NV.T @ inputs.hidden


def cross_entropies(device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """name -> loss(hidden, head, target), the sum over rows; and name -> why it is missing."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = functools.partial(F.linear_cross_entropy, reduction="sum")
        found["F.linear_cross_entropy, chunked"] = functools.partial(
            F.linear_cross_entropy, reduction="sum", options=options
        )
    else:
        missing["F.linear_cross_entropy"] = f"torch {torch.__version__} has none, 2.13 does"
    for name, module, settings in (
        ("liger-kernel", "liger_kernel.transformers.functional", {}),
        ("cut-cross-entropy exact", "cut_cross_entropy", {"filter_eps": None, "impl": "cce"}),
    ):
        if device.type != "cuda":
            missing[name] = "runs on a GPU only"
            continue
        imported, reason = import_or_reason(module)
        if reason is not None:
            missing[name] = reason
            continue
        function = getattr(imported, "liger_fused_linear_cross_entropy", None) or imported.linear_cross_entropy
        found[name] = functools.partial(function, reduction="sum", **settings)
    return found, missing


def summed_loss(inputs: Inputs, mode: Mode, loss: Call) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(mode.gradients):
        value = loss(inputs.hidden, inputs.head, inputs.target)
    if not mode.gradients:
        return (value,)
    return value.detach(), *torch.autograd.grad(value, (inputs.hidden, inputs.head))


class Truth:
    """Log-probability and entropy of every row in float64, and of the gradients some rows of hidden and some of the head.

    The head's are those of the first and last token, some in between, and some targets, where the gradient is large. A block of the
    vocabulary at a time, so that the logits need not fit.
    """

    def __init__(self, inputs: Inputs, mode: Mode):
        device = inputs.hidden.device
        self.mode, self.inputs = mode, inputs
        self.rows_n = sample(len(inputs.hidden), 32, device)
        self.tokens_v = torch.cat([sample(len(inputs.head), 32, device), inputs.target[:32]]).unique()
        self.hidden_ND, self.head_VD = inputs.hidden.detach().double(), inputs.head.detach()
        lse, mean = zip(*(self._block_sums(block_vD) for block_vD in self.head_VD.split(8192)), strict=True)
        lse_CN = torch.stack(lse)
        self.lse_N = lse_CN.logsumexp(0)
        self.entropy_N = self.lse_N - ((lse_CN - self.lse_N).exp() * torch.stack(mean)).sum(0)
        target_logit_N = (self.hidden_ND * self.head_VD[inputs.target].double()).sum(1)
        self.logprob_N = target_logit_N - self.lse_N
        if mode.gradients:
            self.d_hidden_nD = self._gradient_of_hidden()
            self.d_head_vD = self._d_logits(slice(None), self.tokens_v).T @ self.hidden_ND

    def errors(self, outputs: tuple[Tensor, ...]) -> dict[str, float]:
        found = errors_of("logprob", outputs[0] - self.logprob_N)
        if self.mode.entropy:
            found |= errors_of("entropy", outputs[1] - self.entropy_N)
        if self.mode.gradients:
            found |= relative_errors_of("gradient of hidden", outputs[-2][self.rows_n], self.d_hidden_nD)
            found |= relative_errors_of("gradient of head", outputs[-1][self.tokens_v], self.d_head_vD)
        return found

    def _block_sums(self, block_vD: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of a block of the vocabulary, and the mean logit under the block's softmax."""
        logits_Nv = self.hidden_ND @ block_vD.double().T
        lse_N = logits_Nv.logsumexp(1)
        return lse_N, (logits_Nv * logits_Nv.softmax(1)).sum(1)

    def _gradient_of_hidden(self) -> Tensor:
        token_V = torch.arange(len(self.head_VD), device=self.head_VD.device)
        return sum(self._d_logits(self.rows_n, v) @ self.head_VD[v].double() for v in token_V.split(8192))

    def _d_logits(self, rows: Tensor | slice, tokens_v: Tensor) -> Tensor:
        """g (onehot - p) - h p (log p + H), for upstream gradients g of the log-probability and h of the entropy."""
        log_p_nv = self.hidden_ND[rows] @ self.head_VD[tokens_v].double().T - self.lse_N[rows, None]
        p_nv = log_p_nv.exp()
        is_target_nv = self.inputs.target[rows, None] == tokens_v
        d_logits_nv = self.inputs.upstream[rows, None].double() * (is_target_nv.double() - p_nv)
        if self.mode.entropy:
            cost_nv = p_nv * (log_p_nv + self.entropy_N[rows, None])
            d_logits_nv = d_logits_nv - self.inputs.upstream_entropy[rows, None].double() * cost_nv
        return d_logits_nv
