"""`python -m diffpo_kernels`: what was built, what can run here, and what backend=None picks, with reasons."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Column, Table

from diffpo_kernels import backends


def main(arguments: Sequence[str] = ()) -> None:
    """Print the report: which kernels were built, which are used, and why the others are not."""
    argparse.ArgumentParser(prog="python -m diffpo_kernels", description=main.__doc__).parse_args(arguments)
    console = Console()
    native, report = backends.native_module(), backends.build_report()
    if native is not None:
        console.print(f"compiled extension: loaded, CPU instruction set [bold]{native.instruction_set}[/]")
        if report.get("native", "built") != "built":
            console.print(f"  {report['native']}", highlight=False, markup=False)
    else:
        console.print(f"compiled extension: [bold]missing[/], {backends.missing_extension_reason()}", highlight=False)
        console.print(
            "  cost: every operator runs in plain torch on the CPU; row_statistics is then about 20 to 30 times slower at large vocabularies"
        )
        console.print(
            "  remedy: install a C++17 compiler (cmake and ninja come by themselves), then `pip install .` again"
        )
    console.print(f"CUDA kernels: {report.get('cuda', 'no build report')}", highlight=False)
    console.print(f"Triton: {_triton()}", highlight=False)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {_devices()}", highlight=False)

    name = Column("operator", no_wrap=True)  # is whole in a narrow terminal too
    table = Table(name, "device", "None picks", "available", "not available, and why")
    for operator in backends.OPERATORS:
        for device_type in ("cpu", "cuda"):
            reasons = {name: backends.unavailable_reason(operator, name, device_type) for name in backends.BACKENDS}
            available = ", ".join(name for name, reason in reasons.items() if reason is None)
            missing = "\n".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
            table.add_row(operator, device_type, backends.preferred(operator, device_type), available, missing)
    console.print(table)
    if torch.cuda.is_available() or (native is not None and native.has_cuda):
        in_cuda = ", ".join(name for name in backends.OPERATORS if "cuda" in backends.implementations(name))
        console.print(
            "No GPU kernel, in Triton or in CUDA C++, was yet run on a GPU: they compile, and Triton's pass the tests under its interpreter. "
            f"None never picks cuda (written for {in_cuda})."
        )


def _triton() -> str:
    reason = backends.unavailable_reason("row_statistics", "triton", "cuda")
    if reason is not None:
        return reason
    return "launched a kernel" if torch.cuda.is_available() else "no CUDA device to launch a kernel on"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device visible to torch"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _program() -> None:
    """``main``, and exit code 1 where standard output cannot be written: quietly where its reader is gone, in one line where the disk is
    full, as the commands of diffpo end. Closed from the start, it is /dev/null."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the program
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()  # what was printed last may still be on its way
    except OSError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        raise SystemExit(1 if isinstance(error, BrokenPipeError) else f"stopped at the end: {error.strerror}") from None


if __name__ == "__main__":
    _program()
