"""Every GPU kernel compiles for every supported architecture, without a GPU, and stays inside its budget.

The same functions print the table of `python -m diffpo_kernels.ahead_of_time`.
"""

import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from diffpo_kernels import resource_usage
from diffpo_kernels.aot_case import AotCase
from diffpo_kernels.resource_usage import ARCHITECTURES, CUDA_ARCHITECTURES, CUDA_BUDGET, CUDA_SOURCES, Usage

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None and not INTERPRETED
CASES = resource_usage.triton_cases() if HAS_TRITON else []
# Registers and spills are the compiler's as much as the kernel's. With a triton that is not listed the kernels are only compiled.
BUDGETED = ("3.6.", "3.7.")
# At the memory bandwidth of an H200 there are 14.4 issue slots for every bf16 logit, and twice as many for a float32 one.
LOGIT_BUDGET = 14

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(resource_usage.missing_tools() is not None, reason=str(resource_usage.missing_tools())),
]


def assert_logits_are_cheap(usage: Usage) -> None:
    """The kernel that reads every logit: few enough instructions to keep up with the memory, and loads of 16 bytes."""
    is_float32 = "fp32" in usage.kernel or "<float" in usage.kernel
    assert usage.instructions_per_element <= LOGIT_BUDGET * (2 if is_float32 else 1), usage
    assert usage.vector_loads > 0, usage


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, or interpreted: there is nothing to compile")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton(case: AotCase, architecture: str) -> None:
    usage = resource_usage.compile_triton(case, architecture)
    if not version("triton").startswith(BUDGETED):
        pytest.skip(f"compiled; the budgets were set with other versions of triton than {version('triton')}")
    assert resource_usage.over_budget(usage, case) == []
    if case.name.startswith("row_statistics summarise") and architecture == "sm_90":
        assert_logits_are_cheap(usage)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, or interpreted: there is nothing to compile")
@pytest.mark.parametrize("ones", [("chunks",), ("row_stride", "vocabulary", "chunks")])
def test_row_statistics_where_a_size_is_one(ones: tuple[str, ...]) -> None:
    """Triton compiles an integer argument of 1 as a constant, which an expression may not expect; the interpreter does not."""
    (case,) = [case for case in CASES if case.name == "row_statistics finish bf16, drawing"]
    constants = dict.fromkeys(ones, 1) | ({"CHUNKS": 1} if "chunks" in ones else {})
    case = replace(
        case,
        signature=case.signature | dict.fromkeys(ones, "constexpr"),
        constexprs=case.constexprs | constants,
        divisible=tuple(name for name in case.divisible if name not in ones),
    )
    assert resource_usage.over_budget(resource_usage.compile_triton(case, "sm_90"), case) == []


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, or interpreted: there is nothing to compile")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_is_told_only_what_it_asks_for_at_launch(case: AotCase) -> None:
    """An argument that a kernel does not specialise for its alignment must not be compiled as aligned here."""
    blind = {p.name for p in case.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    assert blind.isdisjoint(case.divisible)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, or interpreted: there is nothing to compile")
def test_the_length_of_a_ban_list_and_the_alignment_of_row_values_do_not_recompile() -> None:
    (case,) = [case for case in CASES if case.name == "row_statistics finish bf16, drawing"]
    parameters = {p.name: p for p in case.kernel.params}
    assert parameters["banned_count"].do_not_specialize
    for name in ("temperatures", "uniforms", "partial_max", "token_out", "valid_out"):
        assert parameters[name].do_not_specialize_on_alignment


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: the CUDA sources cannot be compiled")
@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda(source: Path, architecture: str, tmp_path: Path) -> None:
    usages = resource_usage.compile_cuda(source, architecture, tmp_path)
    assert usages
    assert [complaint for usage in usages for complaint in resource_usage.over_budget(usage, CUDA_BUDGET)] == []
    # Of the instances of summarise, those for rows that allow loads of 16 bytes.
    aligned = [usage for usage in usages if usage.instructions_per_element is not None and usage.vector_loads > 0]
    if source.stem == "row_statistics":
        assert len(aligned) == 3  # float, bfloat16, half
    for usage in aligned:
        if architecture == "sm_90":
            assert_logits_are_cheap(usage)
