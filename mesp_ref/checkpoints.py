"""Block checkpoints: the input of every block, pushed on the way up and popped on the way down."""

import mmap
import os
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array

# "ram"; "disk", a mapped file; "offload", the same with all that a backward would compute again.
KINDS = ("ram", "disk", "offload")
_ALIGN = 64  # bytes, a cache line
_ROOM = 1 << 26  # bytes of the file that are mapped together


class Checkpoints:
    """A stack of arrays in memory: references, nothing is copied."""

    halves = False  # is room for the input of each half of a block, too, free of memory?
    offload = False  # and room for what its backward would compute again?

    def __init__(self) -> None:
        self._stack: list[Array] = []

    def keep(self, x: Array) -> Array:
        """The array itself, or its twin where it costs no memory."""
        return x

    def push(self, x: Array) -> None:
        self._stack.append(self.keep(x))

    def pop(self) -> Array:
        return self._stack.pop()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.clear()


class DiskCheckpoints(Checkpoints):
    """Checkpoints in one unnamed file, which vanishes with the process.

    Arrays are written, not stored through a map: the first store into each page of a mapped file
    costs a page fault that its file system takes part in, 15 times a write on one machine; and a
    disk that is full is an error of the write, not a bus error. They are read through a map.

    Raises MespRefError when the file cannot be written.
    """

    halves = True

    def __init__(self, directory: str | Path | None = None, *, offload: bool = False):
        super().__init__()
        self.offload = offload
        self._folder = Path(directory or tempfile.gettempdir())
        self._file: BinaryIO | None = None
        self._map: mmap.mmap | None = None  # the latest piece of the file
        self._start = self._used = 0  # where that piece begins; bytes of it that are taken
        self._lock = threading.Lock()  # workers keep arrays at the same time

    def keep(self, x: Array) -> Array:
        """A read-only twin of the array in the file."""
        room: mmap.mmap | None = None
        try:
            with self._lock:
                handle, room, offset = self._reserve(x.nbytes)
                start = self._start
            _write(handle, np.ascontiguousarray(x), start + offset)
        except OSError as error:
            room = (
                None  # or the traceback would keep the file; another worker may still write to it
            )
            raise MespRefError(
                f"{self._folder}: a checkpoint needs {x.nbytes} bytes: {error.strerror}; free "
                "space, set TMPDIR to another disk or keep checkpoints in RAM"
            ) from None
        return np.frombuffer(room, x.dtype, x.size, offset).reshape(x.shape)

    def _reserve(self, size: int) -> tuple[int, mmap.mmap, int]:
        """The file, a map of a piece of it, and where in that piece there is room."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # outlives us
        handle, offset = self._file.fileno(), -(-self._used // _ALIGN) * _ALIGN
        if self._map is None or offset + size > len(self._map):
            self._start += 0 if self._map is None else len(self._map)
            length = -(-max(size, _ROOM) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            os.ftruncate(handle, self._start + length)  # a hole: it takes no room yet
            self._map = mmap.mmap(handle, length, access=mmap.ACCESS_READ, offset=self._start)
            offset = 0
        self._used = offset + size
        return handle, self._map, offset

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._file is not None:
            self._file.close()  # a view that is still alive keeps its map open
        self._file = self._map = None


def _write(handle: int, x: Array, start: int) -> None:
    """All bytes of a contiguous array: one call may write fewer."""
    left = x.reshape(-1).view(np.uint8)
    while len(left):
        done = os.pwrite(handle, left.data, start)
        left, start = left[done:], start + done


def open_checkpoints(kind: str) -> Checkpoints:
    """The stack that one of KINDS names.

    Raises MespRefError for another kind.
    """
    if kind not in KINDS:
        raise MespRefError(f"checkpoints: found {kind!r}, expected one of {', '.join(KINDS)}")
    return Checkpoints() if kind == "ram" else DiskCheckpoints(offload=kind == "offload")
