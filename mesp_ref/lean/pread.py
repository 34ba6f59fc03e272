"""pread and pwrite: bytes at a place of an open file, on systems without these calls, too."""

import os
import threading
from typing import Any

_ONE = threading.Lock()  # without pread and pwrite, as on Windows, a file's place is everybody's


def read_at(handle: int, size: int, start: int) -> bytes:
    """At most `size` bytes from `start`."""
    if hasattr(os, "pread"):
        return os.pread(handle, size, start)
    with _ONE:
        os.lseek(handle, start, os.SEEK_SET)
        return os.read(handle, size)


def write_at(handle: int, data: Any, start: int) -> int:
    """Bytes written at `start`; perhaps fewer than `data` has."""
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, data, start)
    with _ONE:
        os.lseek(handle, start, os.SEEK_SET)
        return os.write(handle, data)
