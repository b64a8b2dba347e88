"""entropy_bounded_commit_: which masked positions a denoising step commits, and all that follows from it, written in place."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffpo_kernels import backends, validation
from diffpo_kernels.entropy_bounded_commit import compiled, reference

_OPERATOR = "entropy_bounded_commit_"
RULES = ("joint", "ranked")


def entropy_bounded_commit_(
    tokens: Tensor,
    proposal: Tensor,
    proxy: Tensor,
    entropy: Tensor,
    gamma: float | Tensor,
    mask_id: int,
    start: int | Tensor,
    end: int | Tensor,
    *,
    rule: str = "joint",
    proposal_logprob: Tensor | None = None,
    logprob: Tensor | None = None,
    commit_step: Tensor | None = None,
    nfe: Tensor | None = None,
    advance: bool = False,
    max_window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Commit the longest prefix of the masked positions, most certain first, whose entropies stay within gamma.

    In each row, sort the positions l with start <= l < end and tokens[l] == mask_id by proxy ascending (ties: the lowest position) and
    take the longest prefix U of at least one position that the rule accepts:

        joint    sum_{l in U} entropy[l] - max_{l in U} entropy[l] <= gamma
        ranked   (n + 1) entropy[l_n] <= gamma for the n-th position l_n of U, n = 2, 3, ...

    The left side of "joint" bounds the joint dependence that independent draws ignore, so gamma (nats) is the price paid for committing
    several tokens at once: 0 commits one token a step (more only where entropies are exactly 0), inf the whole window. Source: the
    Entropy-Bounded sampler, arXiv 2505.24857. A row without a masked position in its window commits nothing.

    `entropy` is simply the cost, so the other rules are data:

        k tokens a step           "joint", cost 1, gamma = k - 1
        confidence threshold p    "joint", cost 0 where confidence >= p, else inf; proxy -confidence; gamma 0 (or any finite one)
        factor f (Fast-dLLM)      "ranked", cost 1 - confidence, proxy -confidence, gamma = f: the n-th confidence in descending order
                                  is accepted while it is at least 1 - f / (n + 1), the first always (arXiv 2505.22618)

    A NaN cost counts as +inf and one below 0 as 0; a NaN proxy sorts last, like +inf. A prefix of two or more that holds an infinite cost
    exceeds every finite gamma, so such a position is committed only alone, as the first, or when gamma is inf. A
    gamma that turns out to be NaN on a device, where it cannot be looked at, accepts nothing beyond the first position.

    Nothing here waits for a GPU, and with `triton` or `cuda` the whole step is one launch, so a CUDA graph can hold it; what changes
    between replays (gamma, start, end) must then be a tensor.

    Args:
        tokens: [B, L] int64, changed in place: proposal is written at the committed positions.
        proposal: [B, L] int64, read at committed positions only.
        proxy: [B, L] float, the order: lower is committed earlier (entropy, negative confidence, negative margin).
        entropy: [B, L] float, the costs, in nats for the published rule. Prefix sums are in float64.
        gamma: >= 0, inf allowed, one number or a float tensor [B].
        mask_id: the mask token's id.
        start, end: the active window, half-open: an int or an int64 tensor [B]. Parts outside [0, L) hold no positions.
        rule: "joint" or "ranked".
        proposal_logprob, logprob: [B, L] float of one dtype, both or neither; logprob is changed in place: logprob[l] =
            proposal_logprob[l] at the committed positions.
        commit_step: [B, L] int64, changed in place: the row's new nfe at the committed positions. Needs nfe.
        nfe: [B] int64, changed in place: one more in the rows that had a masked position in their window.
        advance: a row whose window holds no masked position any more moves to its next block of the same length, in place:
            start, end = min(end, L), min(2 end - start, L), so that a row past its last block has the empty window [L, L). Needs start
            and end as tensors.
        max_window: a promise that no row's window has more positions in [0, L) than this, so that a GPU sorts only so many; None stands
            for end - start where both are ints, else L. A row that breaks the promise is a ValueError where looking is cheap (CPU
            tensors, ints); on a GPU it commits none of the positions beyond its first max_window and does not advance.
        backend: None (fastest available), "reference", "native", "triton" or "cuda". "triton" and "cuda" order by fp32, so they do not
            take a float64 proxy, and sort at most 2048 positions; None then takes the reference.

    Tensors may have any strides; rows with adjacent columns are used as they are, others through a copy.

    Returns:
        committed [B, L] bool, True where a token was written. Nothing is differentiable.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing has been written. RuntimeError: the backend asked for cannot run here.
    """
    validation.check_tensor("tokens", tokens, ("B", "L"), (torch.int64,))
    shape, device = tokens.shape, tokens.device
    rows, length = shape
    validation.check_tensor("proposal", proposal, shape, (torch.int64,), device)
    validation.check_tensor("proxy", proxy, shape, validation.ANY_FLOAT, device)
    validation.check_tensor("entropy", entropy, shape, validation.ANY_FLOAT, device)
    gamma = validation.check_row_values("gamma", gamma, rows, device, 0.0)
    validation.check_int("mask_id", mask_id)
    if not -(2**63) <= mask_id < 2**63:
        raise ValueError(f"mask_id must lie in the range of int64, got {mask_id}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    start, end = _checked_window(start, end, shape, device, advance)
    _check_records(proposal_logprob, logprob, commit_step, nfe, shape, device)
    written: dict[str, object] = {"tokens": tokens, "logprob": logprob, "commit_step": commit_step, "nfe": nfe}
    _check_memory(written | ({"start": start, "end": end} if advance else {}))
    max_window = _checked_max_window(max_window, start, end, length)

    chosen = _select(device, backend, proxy.dtype, max_window)
    implementation = reference if chosen == "reference" else compiled
    return implementation.entropy_bounded_commit_(
        tokens, proposal, proxy, entropy, gamma, mask_id, start, end, rule, proposal_logprob, logprob, commit_step, nfe,
        advance, max_window, chosen,
    )  # fmt: skip


def _checked_window(
    start: int | Tensor, end: int | Tensor, shape: Sequence[int], device: torch.device, advance: bool
) -> tuple[int | Tensor, int | Tensor]:
    """The bounds; ints cut to [0, L], which holds the same positions."""
    bounds: list[int | Tensor] = []
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, Tensor):
            validation.check_tensor(name, value, shape[:1], (torch.int64,), device)
        else:
            validation.check_int(name, value)
            if advance:
                raise TypeError(f"{name} must be an int64 tensor [B] where advance is True, got an int")
            value = min(max(value, 0), shape[1])
        bounds.append(value)
    return bounds[0], bounds[1]


def _check_records(
    proposal_logprob: Tensor | None,
    logprob: Tensor | None,
    commit_step: Tensor | None,
    nfe: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
) -> None:
    """What a step leaves behind: all optional, but each with what it is computed from."""
    if (logprob is None) != (proposal_logprob is None):
        missing = "logprob" if logprob is None else "proposal_logprob"
        raise ValueError(f"logprob and proposal_logprob must be given together, got no {missing}")
    if logprob is not None:
        validation.check_tensor("logprob", logprob, shape, validation.ANY_FLOAT, device)
        validation.check_tensor("proposal_logprob", proposal_logprob, shape, (logprob.dtype,), device)
    if nfe is not None:
        validation.check_tensor("nfe", nfe, shape[:1], (torch.int64,), device)
    if commit_step is not None:
        if nfe is None:
            raise ValueError("nfe must be given with commit_step, which records it, got None")
        validation.check_tensor("commit_step", commit_step, shape, (torch.int64,), device)


def _check_memory(written: Mapping[str, object]) -> None:
    """Each element needs its own memory. Of tensors that overlap, those that start at the same address are found."""
    name_at: dict[int, str] = {}
    for name, tensor in written.items():
        if not isinstance(tensor, Tensor) or tensor.numel() == 0:
            continue
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{name} is written in place, so each element must have its own memory, got shape {list(tensor.shape)} with "
                f"strides {list(tensor.stride())}"
            )
        if torch.compiler.is_compiling():  # no addresses there
            continue
        other = name_at.setdefault(tensor.data_ptr(), name)
        if other != name:
            raise ValueError(
                f"{other} and {name} are written in place, so they must not share memory, but both start at one address"
            )


def _overlaps_itself(tensor: Tensor) -> bool:
    """False for whatever slicing and transposing make of a tensor that does not; True for what expand or unfold make of one."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _checked_max_window(max_window: int | None, start: int | Tensor, end: int | Tensor, length: int) -> int:
    """The most positions that a row's window may hold in [0, L)."""
    of_all = None if isinstance(start, Tensor) or isinstance(end, Tensor) else max(end - start, 0)
    if max_window is None:
        return length if of_all is None else of_all
    validation.check_int("max_window", max_window)
    if max_window < 0:
        raise ValueError(f"max_window must be at least 0, got {max_window}")
    if of_all is not None:
        longest = of_all
    elif all(not isinstance(bound, Tensor) or validation.values_are_cheap(bound) for bound in (start, end)):
        last, first = torch.as_tensor(end).clamp(max=length), torch.as_tensor(start).clamp(min=0)
        longest = max((last - first).tolist(), default=0)
    else:
        longest = 0
    if longest > max_window:
        raise ValueError(f"max_window must be at least the longest window, {longest} positions, got {max_window}")
    return min(max_window, length)


def _select(device: torch.device, backend: str | None, proxy_dtype: torch.dtype, max_window: int) -> str:
    """The backend that runs; None takes the reference where the preferred one cannot take these arguments."""
    chosen = backends.select(_OPERATOR, device, backend)
    reason = compiled.refusal(proxy_dtype, max_window) if chosen in ("triton", "cuda") else None
    if reason is None:
        return chosen
    if backend is None:
        return "reference"
    raise ValueError(f"{reason} with backend {backend!r}; backend 'reference' takes any")
