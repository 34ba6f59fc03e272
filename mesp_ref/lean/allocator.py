"""What the C library does with freed memory: keep it for the next step, or return it."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h
_KEPT = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of freed arrays for the next ones, where it runs on glibc.

    glibc returns large freed arrays to the kernel, and every page of the next one is paid for in a
    page fault. Steps make and free the same arrays again and again, so keeping them saves time and
    takes no more than the peak that was reached anyway. The command line calls this; a program of
    your own may, before its first step.

    Returns   whether the C library took the setting; False, and nothing changed, on other systems
    Source    mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT)) and bool(mallopt(_MMAP_THRESHOLD, _KEPT))


def return_freed_memory() -> bool:
    """Give what is freed back to the kernel now, where this process runs on glibc.

    Returns   whether the C library was asked; False on other systems
    Source    malloc_trim(3)
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return trim is not None and trim(0) >= 0
