"""Settings of the C allocator for training on a CPU."""

import ctypes
import platform

_SMALL = 64 * 2**20  # bytes of weights
_LARGE_BUFFER = 2**17
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory(weights: int = 0) -> None:
    """Make glibc keep freed buffers of a small model instead of handing them back to the kernel; elsewhere do nothing.

    weights: bytes. Activations of a tiny model are a few MB each: by default every operator maps, faults in and unmaps its output, which
    costs more than the arithmetic (measured: 2 to 4 times the time of a forward and backward pass). Those of a large model would leave
    holes that nothing fits into, and there memory is what is short: its large buffers are handed back at once.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, small = ctypes.CDLL(None), weights <= _SMALL
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30 if small else _LARGE_BUFFER)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1 if small else _LARGE_BUFFER)
