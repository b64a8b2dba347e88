"""Whether Triton can launch a kernel here.

That ``import triton`` works says little: the first launch compiles a launcher, which takes a C compiler and Python.h, and writes it to
a cache folder.
"""

import functools

import torch


@functools.cache
def launch_failure(device_index: int) -> str | None:
    """Why a kernel cannot be compiled and launched on this CUDA device, in one line, or None if one was. Tried once in a process."""
    try:
        _launch(device_index)
    except Exception as error:  # compilers, drivers and file systems fail in ways of their own
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return f"Triton cannot launch a kernel: {type(error).__name__}: {first_line}"[:300]
    return None


def _launch(device_index: int) -> None:
    """One kernel without tensors, so that it runs in the middle of torch.compile's tracing too, and nothing waits for it."""
    import triton

    with torch.cuda.device(device_index):
        triton.jit(_nothing)[(1,)](2)


def _nothing(number):  # type: ignore[no-untyped-def]  # a kernel: Triton would take an annotation for its own
    pass
