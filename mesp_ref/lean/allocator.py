"""One setting of the C library that training steps are faster with."""

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
