"""What a process does with memory that it has freed."""

import contextlib
import ctypes

KEPT_BYTES = 4 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_freed_memory() -> None:
    """Have glibc keep up to KEPT_BYTES of what is freed at the end of its heap, instead of giving each large buffer back to the kernel and faulting it
    in again: a fifth of the router's time at bodies of 220 KB went into that. Nor does it keep more: by itself glibc raises its thresholds to the size
    of what was freed, and a decoder's window of 16 MiB would stay. Another C library is left alone.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
