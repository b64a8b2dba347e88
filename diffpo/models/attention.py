"""Scaled dot-product attention over rows with padding, or with any mask, through the fastest kernel that applies.

Shapes: B rows, Q query positions, S key positions, H query heads, K key/value heads, d head size.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Padding(NamedTuple):
    """Which keys are padding: a mask for torch's kernel, or the bounds of every row for a variable-length kernel.

    mask: bool [B, 1, 1, S], True where a key is real
    query_bounds, key_bounds: int32 [2 B + 1], or None where the mask is to be used. Row b is cut into two sequences, 2 b its left padding
        and 2 b + 1 its tokens, which never see each other: so rows stay where they are and every shape is static.
    """

    mask: Tensor
    query_bounds: Tensor | None = None
    key_bounds: Tensor | None = None


def left_padding(padding_B: Tensor, queries: int, keys: int, dtype: torch.dtype) -> Padding:
    """Rows whose first ``padding_B`` (int64) of S keys are padding; the queries are all S positions, or some of the tokens'."""
    mask_BS = torch.arange(keys, device=padding_B.device) >= padding_B[:, None]
    if variable_length_kernel(padding_B.device.type, dtype) is None:
        return Padding(mask_BS[:, None, None])
    key_bounds = _bounds(padding_B, keys)
    query_bounds = key_bounds if queries == keys else _bounds(torch.zeros_like(padding_B), queries)
    return Padding(mask_BS[:, None, None], query_bounds, key_bounds)


def _bounds(padding_B: Tensor, width: int) -> Tensor:
    """int32 [2 B + 1]: 0, padding_0, width, width + padding_1, 2 width, ..."""
    first_B = torch.arange(len(padding_B), device=padding_B.device) * width
    inner = torch.stack([first_B, first_B + padding_B], dim=1).flatten()
    return torch.cat([inner, first_B[-1:] + width]).int()


def check_mask(mask: Tensor, rows: int, queries: int, keys: int) -> None:
    """ValueError unless a mask is [B, S], which tokens are real, or bool [B, Q, S] or [B, 1, Q, S], which keys each query sees (a B of 1
    is for all rows)."""
    if mask.dim() == 2 and mask.shape == (rows, keys):
        return
    inner = ((queries, keys), (1, queries, keys))
    if mask.dtype != torch.bool or mask.dim() < 3 or mask.shape[0] not in (1, rows) or mask.shape[1:] not in inner:
        raise ValueError(
            f"attention_mask must be [{rows}, {keys}] (which tokens are real), or bool [{rows}, {queries}, {keys}] or "
            f"[{rows}, 1, {queries}, {keys}] (which keys each query sees), got {mask.dtype} {list(mask.shape)}"
        )


def attend(q_BQHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, visible: Padding | Tensor | None) -> Tensor:
    """softmax(q k / sqrt(d)) v [B, Q, H, d] over the keys that a query may see; a padding query's result means nothing.

    visible: which keys are padding; or bool [B, Q, S] or [B, 1, Q, S], True where a query sees a key, of which it needs one; None: all.
    """
    if isinstance(visible, Tensor):
        visible = Padding(visible[:, None] if visible.dim() == 3 else visible)
    if visible is not None and visible.key_bounds is not None:
        kernel = variable_length_kernel(q_BQHd.device.type, q_BQHd.dtype)
        assert kernel is not None  # bounds are made only where there is one
        q, k, v = (x.flatten(0, 1) for x in (q_BQHd, k_BSKd, v_BSKd))
        return kernel(q, k, v, visible.query_bounds, visible.key_bounds, q_BQHd.shape[1], k_BSKd.shape[1]).view_as(
            q_BQHd
        )
    q, k, v = (x.transpose(1, 2) for x in (q_BQHd, k_BSKd, v_BSKd))
    mask = None if visible is None else visible.mask
    # on a CPU the gradient in bf16 takes ten times as long as in fp32
    precise = q.device.type == "cpu" and q.requires_grad and q.dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False) if precise else contextlib.nullcontext():
        if precise:
            q, k, v = q.float(), k.float(), v.float()
        out_BHQd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out_BHQd.transpose(1, 2).to(q_BQHd.dtype)


@functools.cache
def variable_length_kernel(device_type: str, dtype: torch.dtype) -> Callable | None:
    """f(q, k, v, query_bounds, key_bounds, longest query, longest key): flash-attn's if importable, else torch's, else None.

    Both take bf16 and fp16 on a GPU of compute capability 8 or later.
    """
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.version.hip:
        return None
    if torch.cuda.get_device_capability()[0] < 8:
        return None
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):
        pass
    try:
        torch_kernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return functools.partial(_torch_variable_length, torch_kernel)


def _torch_variable_length(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
) -> Tensor:
    options = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(kernel).parameters:
            options["enable_gqa"] = True
        else:  # an older torch
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return kernel(q, k, v, query_bounds, key_bounds, longest_query, longest_key, **options)
