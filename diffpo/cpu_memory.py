"""One setting of the C allocator that small-model training on a CPU gains from."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep freed buffers instead of handing them back to the kernel; elsewhere do nothing.

    Activations of a tiny model are a few MB each: by default every operator maps, faults in and unmaps its output, which
    costs more than the arithmetic (measured: 2 to 4 times the time of a forward and backward pass).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
