"""Padding, kept keys, and precision: what the transformer's attention sees, and in which dtype."""

import pytest
import torch

from diffpo.models import attention
from diffpo.models.transformer import rotary_angles, rotate


def variable_length_reference(q, k, v, query_bounds, key_bounds, longest_query, longest_key):
    """What flash-attn's and torch's kernels do: sequences that lie one after the other, each with its own keys."""
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    assert (query_bounds[0], query_bounds[-1]) == (0, len(q))
    assert (key_bounds[0], key_bounds[-1]) == (0, len(k))
    assert 0 <= query_bounds.diff().min() <= query_bounds.diff().max() <= longest_query
    assert 0 <= key_bounds.diff().min() <= key_bounds.diff().max() <= longest_key
    out = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for a, b, c, d in zip(query_bounds, query_bounds[1:], key_bounds, key_bounds[1:], strict=False):
        keys, values = k[c:d].repeat_interleave(groups, dim=1), v[c:d].repeat_interleave(groups, dim=1)
        weight = (torch.einsum("qhd,khd->hqk", q[a:b], keys) / q.shape[2] ** 0.5).softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", weight, values)
    return out


@pytest.fixture
def variable_length(monkeypatch):
    monkeypatch.setattr(attention, "variable_length_kernel", lambda device, dtype: variable_length_reference)


@pytest.mark.parametrize("heads", [4, 2], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("queries", [9, 3])
def test_bounds_of_left_padded_rows(variable_length, heads, queries):
    padding = torch.tensor([0, 4, 6, 2])
    q, k, v = torch.randn(4, queries, 4, 8), torch.randn(4, 9, heads, 8), torch.randn(4, 9, heads, 8)
    bounded = attention.left_padding(padding, queries, 9, torch.bfloat16)
    assert bounded.query_bounds is not None
    masked = attention.Padding(bounded.mask)
    assert torch.equal(bounded.mask[:, 0, 0].sum(dim=1), 9 - padding)
    expected, got = attention.attend(q, k, v, masked), attention.attend(q, k, v, bounded)
    real = bounded.mask[:, 0, 0, 9 - queries :] if queries == 9 else torch.ones(4, queries, dtype=torch.bool)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)
    assert got.isfinite().all()


@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
def test_left_padding_equals_a_mask(random_model, random_prompts, variable_length, shift):
    model = random_model(seed=2, logit_shift=shift, num_key_value_heads=2)
    lengths, width = [11, 4, 7, 1, 14], 14
    tokens = torch.zeros(5, width, dtype=torch.int64)
    for i, row in enumerate(random_prompts(model, lengths, seed=3)):
        tokens[i, width - len(row) :] = row
    padding = width - torch.tensor(lengths)
    mask = torch.arange(width) >= padding[:, None]
    torch.testing.assert_close(model(tokens, padding=padding)[mask], model(tokens, mask)[mask], rtol=1e-5, atol=1e-5)


def test_kernels_are_for_half_precision_on_a_gpu():
    assert attention.variable_length_kernel("cpu", torch.bfloat16) is None
    assert attention.variable_length_kernel("cuda", torch.float32) is None
    assert attention.left_padding(torch.tensor([0, 1]), 3, 3, torch.float32).key_bounds is None


def test_torchs_kernel_gets_grouped_heads_in_every_version():
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    seen = []

    def new(q, k, v, a, b, c, d, *, enable_gqa=False):
        seen.append((k.shape[1], enable_gqa))
        return q

    def old(q, k, v, a, b, c, d):
        seen.append((k.shape[1], None))
        return q

    for kernel in (new, old):
        attention._torch_variable_length(kernel, q, k, v, None, None, 5, 5)
        attention._torch_variable_length(kernel, q, q, q, None, None, 5, 5)
    assert seen == [(2, True), (4, False), (4, None), (4, None)]


def test_rotation_is_in_fp32_whatever_the_dtype():
    """Of bf16 inputs, the only error is the rounding of the result: half a unit in the last place, at most 2^-8."""
    x = torch.randn(2, 64, 3, 16).bfloat16()
    cos, sin = rotary_angles(torch.arange(4000, 4064)[None], 16, 500000.0)
    assert cos.dtype == sin.dtype == torch.float32
    exact = rotate(x.double(), (cos.double(), sin.double()))
    got = rotate(x, (cos, sin))
    assert got.dtype == torch.bfloat16
    bound = exact.abs() * 2**-8 + 1e-6
    assert ((got.double() - exact).abs() <= bound).all()
    rounded = rotate(x, (cos.bfloat16(), sin.bfloat16()))
    assert ((rounded.double() - exact).abs() > bound).float().mean() > 0.02, "which rounded angles do not reach"


def test_a_bf16_model_is_as_near_to_fp32_as_rounding_allows(random_model, random_prompts):
    """Norms and rotations in fp32: at large positions the error is no larger than at small ones."""
    model = random_model(seed=1, max_position_embeddings=4096, rope_theta=500000.0)
    row = random_prompts(model, [24])[0][None]
    with torch.no_grad():
        exact = model.logits(row)
        low = model.bfloat16()
        got = low.logits(row).float()
    error = (got - exact).abs().mean() / exact.std()
    assert error < 0.03


def test_a_bf16_norm_is_computed_in_fp32():
    x, norm = torch.randn(64, 256).bfloat16() * 30, torch.nn.RMSNorm(256, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(256).bfloat16())
        exact = norm(x.float())
        assert torch.equal(norm.bfloat16()(x), exact.bfloat16())


@pytest.mark.parametrize("heads", [4, 2], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bf16_with_a_gradient_is_the_fp32_attention_of_the_rounded_inputs(heads, padded, autocast):
    """On a CPU: the result and the gradients are fp32's, rounded once."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 9, count, 8, generator=generator).bfloat16() for count in (4, heads, heads)]
    weight = torch.randn(3, 9, 4, 8, generator=generator).bfloat16()
    padding = attention.left_padding(torch.tensor([0, 4, 2]), 9, 9, torch.bfloat16) if padded else None
    real = padding.mask[:, 0, 0] if padded else torch.ones(3, 9, dtype=torch.bool)

    def attended(dtype, cast):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = attention.attend(*given, padding)
        (out * weight.to(dtype))[real].sum().backward()
        return out, [x.grad for x in given]

    exact, exact_gradients = attended(torch.float32, False)
    out, gradients = attended(torch.bfloat16, autocast)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[real], exact[real].bfloat16())
    for got, expected in zip(gradients, exact_gradients, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(
            got.float(), expected, rtol=2**-8, atol=1e-6
        )  # half a unit in the last place is 2^-9


def test_bf16_without_a_gradient_stays_with_torchs_kernel(monkeypatch):
    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, *more, **options: seen.append(q.dtype) or kernel(q, *more, **options),
    )
    q, k, v = (torch.randn(2, 5, 4, 8).bfloat16() for _ in range(3))
    out = attention.attend(q, k, v, None)
    exact = attention.attend(q.float(), k.float(), v.float(), None)
    attention.attend(q.requires_grad_(), k, v, None)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
