"""Block checkpoints: the input of every block, pushed on the way up and popped on the way down; and
rooms, arrays that are filled and read a piece at a time.
"""

import math
import mmap
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.lean.pread import write_at
from mesp_ref.ops import Array

# "ram"; "disk", a temporary file; "offload", the same with results of projections, too: mesp_tiled.
KINDS = ("ram", "disk", "offload")
_ALIGN = 64  # bytes, a cache line
_ROOM = 1 << 26  # bytes of the file that are mapped together, at least
_MOST = 1 << 30  # bytes of one write; some systems refuse 2 GiB


class Checkpoints:
    """A stack of arrays in memory: references, nothing is copied."""

    halves = False  # is room for the input of each half of a block, too, free of memory?
    offload = False  # and room for results of projections, too?

    def __init__(self) -> None:
        self._stack: list[Array] = []

    def keep(self, x: Array) -> Array:
        """The array itself, or its twin where it costs no memory."""
        return x

    def room(self, shape: tuple[int, ...], dtype: np.dtype, like: Array | None = None) -> Any:
        """An array without numbers yet, of which pieces are written, `room[at] = x`, and read."""
        return np.empty(shape, dtype, like=like)

    def need(self, size: int) -> None:
        """Raise MespRefError where there is no room for so many bytes, before any work is done."""

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
        try:
            with self._lock:
                handle, start, room, offset = self._reserve(x.nbytes)
            _write(handle, np.ascontiguousarray(x), start + offset)
        except OSError as error:  # the file stays open: another worker may be writing to it
            raise self._full(x.nbytes, error) from None
        return np.ndarray(x.shape, x.dtype, room, offset)  # np.frombuffer takes 400 bytes more

    def room(self, shape: tuple[int, ...], dtype: np.dtype, like: Array | None = None) -> "Room":
        size = math.prod(shape) * dtype.itemsize
        try:
            with self._lock:
                handle, start, room, offset = self._reserve(size)
        except OSError as error:
            raise self._full(size, error) from None
        return Room(np.ndarray(shape, dtype, room, offset), handle, start + offset, self._full)

    def need(self, size: int) -> None:
        check_room(size, self._folder)

    def _full(self, size: int, error: OSError) -> MespRefError:
        return MespRefError(
            f"{self._folder}: a checkpoint needs {size} bytes: {error.strerror}; free "
            "space, set TMPDIR to another disk or keep checkpoints in RAM"
        )

    def _reserve(self, size: int) -> tuple[int, int, mmap.mmap, int]:
        """The file, where the latest piece of it begins, its map, and where in it there is room."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # outlives us
        handle, offset = self._file.fileno(), -(-self._used // _ALIGN) * _ALIGN
        if self._map is None or offset + size > len(self._map):
            start, offset = self._start + (len(self._map) if self._map else 0), 0
            length = max(size, _ROOM, start)  # twice the file: each map holds a descriptor
            length = -(-length // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            os.ftruncate(handle, start + length)  # a hole: it takes no room yet
            self._map = mmap.mmap(handle, length, access=mmap.ACCESS_READ, offset=start)
            self._start = start
        self._used = offset + size
        return handle, self._start, self._map, offset

    def __exit__(self, *failure: Any) -> None:
        super().__exit__()
        if self._file is not None:
            self._file.close()  # a view that is still alive keeps its map, and so the file
        self._file = self._map = None
        if trace := failure[-1]:
            traceback.clear_frames(trace)  # of views


class Room:
    """An array in the file of DiskCheckpoints: written a contiguous piece at a time, read as views."""

    def __init__(
        self, array: Array, handle: int, start: int, full: Callable[[int, OSError], MespRefError]
    ):
        self._array, self._handle, self._start, self._full = array, handle, start, full

    def __getitem__(self, index: Any) -> Array:
        found: Array = self._array[index]
        return found

    def __setitem__(self, index: Any, x: Array) -> None:
        place = self._array[index]
        assert place.flags.c_contiguous
        offset = place.__array_interface__["data"][0] - self._array.__array_interface__["data"][0]
        try:
            _write(self._handle, np.ascontiguousarray(x), self._start + offset)
        except OSError as error:
            raise self._full(x.nbytes, error) from None


def check_room(size: int, folder: str | Path | None = None) -> None:
    """Raise MespRefError where a temporary file of so many bytes finds no room.

    A system that does not tell how much is free is no reason to stop: a write that fails will say so.
    """
    try:
        place = Path(folder or tempfile.gettempdir())
        free = shutil.disk_usage(place).free
    except OSError:
        return
    if size > free:
        raise MespRefError(
            f"{place}: found {free} bytes free, expected {size} for the activations of a step; free "
            f"{size - free}, set TMPDIR to another disk or shorten the sequence"
        )


def _write(handle: int, x: Array, start: int) -> None:
    """All bytes of a contiguous array: one call may write fewer."""
    left = x.reshape(-1).view(np.uint8)
    while len(left):
        done = write_at(handle, left[:_MOST].data, start)
        left, start = left[done:], start + done


def open_checkpoints(kind: str) -> Checkpoints:
    """The stack that one of KINDS names.

    Raises MespRefError for another kind.
    """
    if kind not in KINDS:
        raise MespRefError(f"checkpoints: found {kind!r}, expected one of {', '.join(KINDS)}")
    return Checkpoints() if kind == "ram" else DiskCheckpoints(offload=kind == "offload")
