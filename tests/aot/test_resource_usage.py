"""What is read from the machine code is really there: matrix instructions, vector loads, spills; and a broken budget is named."""

import os
import sys
from dataclasses import replace

import pytest

from diffpo_kernels import ahead_of_time, resource_usage
from diffpo_kernels.aot_case import AotCase
from diffpo_kernels.resource_usage import ARCHITECTURES, Usage

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

FINE = Usage("product", "sm_90", 128, 1024, 0, 100, None, 0, 8)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, depth, SIZE: tl.constexpr, STEP: tl.constexpr):
    index, step = tl.arange(0, SIZE), tl.arange(0, STEP)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for k in range(0, depth, STEP):
        a = tl.load(a_ptr + index[:, None] * depth + k + step)
        b = tl.load(b_ptr + k + step[:, None] + index * depth)
        total += tl.dot(a, b)
    tl.store(c_ptr + index[:, None] * SIZE + index, total)


def product_case(size: int, num_warps: int) -> AotCase:
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
    signature = pointers | {"depth": "i32", "SIZE": "constexpr", "STEP": "constexpr"}
    constexprs = {"SIZE": size, "STEP": 64}
    return AotCase("product", product, signature, constexprs, num_warps=num_warps, divisible=(*pointers, "depth"))


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton is interpreted in this process")
@pytest.mark.skipif(resource_usage.missing_tools() is not None, reason=str(resource_usage.missing_tools()))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrix_instructions_and_spills_are_seen(architecture: str) -> None:
    fitting = resource_usage.compile_triton(product_case(64, num_warps=4), architecture)
    assert fitting.matrix_instructions > 0
    assert fitting.spills == 0
    if architecture == "sm_80":  # 128 x 128 sums on one warp are 512 registers a thread
        assert resource_usage.compile_triton(product_case(128, num_warps=1), architecture).spills > 0


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({}, None),
        ({"spills": 8}, "product on sm_90: spills 8 bytes"),
        ({"registers": 129}, "product on sm_90: 129 registers, allowed 128"),
        ({"shared": 50000}, "product on sm_90: 50000 bytes of shared memory, allowed 49152"),
        ({"shared": 49153, "architecture": "gfx942"}, "product on gfx942: 49153 bytes of shared memory, allowed 49152"),
        ({"matrix_instructions": 0}, "product on sm_90: no tensor-core instruction"),
        ({"architecture": "gfx942", "registers": 200}, None),
    ],
)
def test_a_broken_budget_is_named(broken: dict, complaint: str | None) -> None:
    budget = AotCase("product", None, {}, {}, tensor_cores=True)
    assert resource_usage.over_budget(replace(FINE, **broken), budget) == ([complaint] if complaint else [])


@pytest.mark.parametrize(
    ("architecture", "kibibytes"), [("sm_80", 163), ("sm_90", 227), ("sm_100", 227), ("gfx942", 64)]
)
def test_no_budget_allows_more_shared_memory_than_there_is(architecture: str, kibibytes: int) -> None:
    budget = AotCase("product", None, {}, {}, max_shared=2**30)
    fitting = replace(FINE, architecture=architecture, shared=kibibytes * 1024)
    assert resource_usage.over_budget(fitting, budget) == []
    assert len(resource_usage.over_budget(replace(fitting, shared=fitting.shared + 1), budget)) == 1


@pytest.mark.parametrize("complaints", [[], ["product on sm_90: spills 8 bytes"]])
def test_the_report_fails_where_a_budget_breaks(monkeypatch, capsys, complaints: list[str]) -> None:
    monkeypatch.setattr(resource_usage, "missing_tools", lambda: None)
    monkeypatch.setattr(resource_usage, "_measure_all", lambda console: [(FINE, complaints)])
    monkeypatch.setattr(sys, "argv", ["ahead_of_time"])
    if not complaints:
        ahead_of_time.main()
    else:
        with pytest.raises(SystemExit, match="1"):
            ahead_of_time.main()
        assert complaints[0] in capsys.readouterr().out
