"""What each kernel takes on each architecture: compiled ahead of time, read from the machine code, held against its budget.

Instructions are counted statically: every instruction of the kernel but NOP, whether it runs or not. Divided by the elements of one
thread this is an upper bound of the instructions issued per element wherever no loop runs over elements.
"""

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from diffpo_kernels import backends
from diffpo_kernels.aot_case import AotCase

CUDA_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
ARCHITECTURES = (*CUDA_ARCHITECTURES, "gfx942")  # Triton's; the last is AMD's MI300
CUDA_SOURCES = sorted((Path(__file__).parents[1] / "csrc").glob("*.cu"))  # none where only the package is installed
# What one block can have, in bytes.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
CUDA_BUDGET = AotCase("CUDA C++", None, {}, {})  # 128 registers: at least 512 threads on a multiprocessor
LOGITS_PER_THREAD = {"row_statistics summarise": 64}  # kPerLane in csrc/row_statistics.cu
_VECTOR_LOAD = re.compile(r"\bLDG\.E\.128\b|\b(?:global|buffer)_load_dwordx4\b")
_MATRIX_INSTRUCTION = re.compile(r"\b(?:[HQIO]MMA|[HQI]GMMA|UTC\w*MMA|v_mfma\w*|v_smfmac\w*)\b")


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture. registers: per thread (vector registers on AMD). shared, spills: bytes."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    spills: int
    instructions: int
    instructions_per_element: float | None
    vector_loads: int  # of 16 bytes, from global memory
    matrix_instructions: int


def triton_cases() -> list[AotCase]:
    """The cases of every operator that has a Triton backend."""
    operators = [name for name in backends.OPERATORS if "triton" in backends.implementations(name)]
    folders = [name.rstrip("_") for name in operators]
    return [
        case
        for folder in folders
        for case in importlib.import_module(f"diffpo_kernels.{folder}.triton_kernels").aot_cases()
    ]


def compile_triton(case: AotCase, architecture: str) -> Usage:
    """Compile one case and read its usage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuda = architecture.startswith("sm_")
    target = GPUTarget("cuda", int(architecture[3:]), 32) if cuda else GPUTarget("hip", architecture, 64)
    arguments = list(case.signature)
    attributes = {(arguments.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    compiled = triton.compile(
        ASTSource(case.kernel, case.signature, case.constexprs, attributes),
        target=target,
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    per_thread = case.elements / (target.warp_size * case.num_warps)
    if cuda:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            (usage,) = _read_cubin(cubin)
        registers, spills = usage["registers"], usage["spills"]
        instructions = usage["instructions"]
    else:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spills = 4 * (_number(r"\.vgpr_spill_count:\s+(\d+)", text) + _number(r"\.sgpr_spill_count:\s+(\d+)", text))
        instructions = [line for line in re.findall(r"^\t([a-z]\w+)", text, re.M) if not line.startswith("s_nop")]
    return _usage(case.name, architecture, registers, compiled.metadata.shared, spills, instructions, per_thread)


def compile_cuda(source: Path, architecture: str, folder: Path) -> list[Usage]:
    """Compile one .cu file with nvcc and read the usage of each of its kernels. Raises RuntimeError with nvcc's output if it fails."""
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    command = [
        shutil.which("nvcc") or "nvcc",
        "-O3",
        "-std=c++17",
        f"-arch={architecture}",
        "-cubin",
        "-o",
        str(cubin),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed for {source.name} on {architecture}:\n{done.stdout}{done.stderr}")
    usages = []
    for kernel in _read_cubin(cubin):
        name = f"{source.stem} {_readable(kernel['name'])}"
        per_thread = next((n for prefix, n in LOGITS_PER_THREAD.items() if name.startswith(prefix)), 0)
        usages.append(
            _usage(
                name,
                architecture,
                kernel["registers"],
                kernel["shared"],
                kernel["spills"],
                kernel["instructions"],
                per_thread,
            )
        )
    return usages


def over_budget(usage: Usage, budget: AotCase) -> list[str]:
    """What breaks the budget, in words; empty if nothing does. Registers of AMD are not held against a budget made for NVIDIA."""
    shared = min(budget.max_shared, SHARED_MEMORY[usage.architecture])
    checks = [
        (usage.spills > budget.max_spills, f"spills {usage.spills} bytes"),
        (usage.shared > shared, f"{usage.shared} bytes of shared memory, allowed {shared}"),
        (budget.tensor_cores and usage.matrix_instructions == 0, "no tensor-core instruction"),
    ]
    if usage.architecture.startswith("sm_"):
        message = f"{usage.registers} registers, allowed {budget.max_registers}"
        checks.append((usage.registers > budget.max_registers, message))
    return [f"{usage.kernel} on {usage.architecture}: {message}" for broken, message in checks if broken]


def missing_tools() -> str | None:
    """Why machine code cannot be read here, or None if it can."""
    absent = [name for name in ("cuobjdump", "nvdisasm") if _tool(name) is None]
    return f"{' and '.join(absent)} not found: neither on the path nor inside triton" if absent else None


def versions() -> dict[str, str | None]:
    """Of what compiled."""
    nvcc = shutil.which("nvcc")
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"release \S+, V(\S+)", release)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {"triton": triton, "nvcc": found.group(1) if found else None, "torch": version("torch")}


def report(out: Path | None) -> bool:
    """Print everything as a table, name what breaks its budget, and write JSON to `out`. True if nothing does."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    if (reason := missing_tools()) is not None:
        raise SystemExit(reason)
    compilers = versions()
    measured = list(track(_measure_all(console), description="compiling", console=console, transient=True))
    columns = (
        "kernel",
        "on",
        "registers",
        "shared",
        "spills",
        "instructions",
        "per element",
        "16-byte loads",
        "matrix",
    )
    table = Table(*columns, title=", ".join(f"{name} {number}" for name, number in compilers.items()))
    for usage, _ in measured:
        table.add_row(*("" if value is None else str(value) for value in asdict(usage).values()))
    console.print(table)
    for _, complaints in measured:
        for complaint in complaints:
            console.print(f"over budget: {complaint}", style="bold red", highlight=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        kernels = [asdict(usage) | {"over_budget": complaints} for usage, complaints in measured]
        out.write_text(json.dumps({"versions": compilers, "kernels": kernels}, indent=1) + "\n")
        console.print(f"written to {out}", highlight=False)
    return not any(complaints for _, complaints in measured)


def _measure_all(console: Console) -> Iterator[tuple[Usage, list[str]]]:
    if find_spec("triton") is None:
        console.print("triton is not installed: its kernels are left out")
    else:
        for case in triton_cases():
            for architecture in ARCHITECTURES:
                usage = compile_triton(case, architecture)
                yield usage, over_budget(usage, case)
    if shutil.which("nvcc") is None:
        console.print("nvcc is not installed: the CUDA sources are left out")
        return
    with tempfile.TemporaryDirectory() as folder:
        for source in CUDA_SOURCES:
            for architecture in CUDA_ARCHITECTURES:
                for usage in compile_cuda(source, architecture, Path(folder)):
                    yield usage, over_budget(usage, CUDA_BUDGET)


def _usage(
    name: str, architecture: str, registers: int, shared: int, spills: int, instructions: list[str], per_thread: float
) -> Usage:
    return Usage(
        kernel=name,
        architecture=architecture,
        registers=registers,
        shared=shared,
        spills=spills,
        instructions=len(instructions),
        instructions_per_element=round(len(instructions) / per_thread, 2) if per_thread else None,
        vector_loads=sum(_VECTOR_LOAD.search(line) is not None for line in instructions),
        matrix_instructions=sum(_MATRIX_INSTRUCTION.search(line) is not None for line in instructions),
    )


def _read_cubin(cubin: Path) -> list[dict]:
    """Per kernel: mangled name, registers, spills (stack and local memory), shared (static) and the list of instructions."""
    resources = _run("cuobjdump", "--dump-resource-usage", str(cubin))
    # no data flow: the same instructions in two thirds of the time
    listing = _run("nvdisasm", "-c", "-ndf", str(cubin))
    _, *parts = re.split(r"^\s*\.section\s+\.text\.([^\",\s]+)", listing, flags=re.M)
    code = dict(zip(parts[::2], parts[1::2], strict=True))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", resources)
    return [
        {
            "name": name,
            "registers": int(registers),
            "spills": int(stack) + int(local),
            "shared": int(shared),
            "instructions": _instructions(code[name]),
        }
        for name, registers, stack, shared, local in found
    ]


def _instructions(section: str) -> list[str]:
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", section, re.M)
    return [line for line in lines if line != "NOP"]


def _readable(mangled: str) -> str:
    """summarise<__nv_bfloat16, true> for the mangled name of a kernel, where the binutils are installed."""
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\w+::", "", name.removeprefix("void "))
    return name.split("(")[0]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_tool(tool) or tool, *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def _tool(name: str) -> str | None:
    """The toolkit's, or the copy that comes with triton."""
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else None
    return str(bundled) if bundled and bundled.is_file() else shutil.which(name)


def _number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[0])
