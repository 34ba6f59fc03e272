"""Block checkpoints: the input of every block, pushed on the way up and popped on the way down."""

import math
import mmap
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array


class Checkpoints(Protocol):
    """A stack of arrays."""

    halves: bool  # is room for the input of each half of a block, too, free of memory?

    def push(self, x: Array) -> None: ...
    def pop(self) -> Array: ...


class RamCheckpoints:
    """Checkpoints kept in memory: references, nothing is copied."""

    halves = False

    def __init__(self) -> None:
        self._stack: list[Array] = []

    def push(self, x: Array) -> None:
        self._stack.append(x)

    def pop(self) -> Array:
        return self._stack.pop()

    def __enter__(self) -> "RamCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.clear()


class DiskCheckpoints:
    """Checkpoints in one unnamed file, each mapped on its own.

    The space is reserved before it is mapped, so a disk that is too full is an error here and not
    a bus error at the first write. The file has no name: it vanishes with the process.

    Raises MespRefError when the space cannot be reserved.
    """

    halves = True

    def __init__(self, directory: str | Path | None = None):
        self._folder = Path(directory or tempfile.gettempdir())
        self._file: BinaryIO | None = None
        self._maps: list[tuple[mmap.mmap, np.dtype, tuple[int, ...]]] = []
        self._end = 0

    def push(self, x: Array) -> None:
        size = -(-max(1, x.nbytes) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # outlives us
            _reserve(self._file.fileno(), self._end, size)
            room = mmap.mmap(self._file.fileno(), size, offset=self._end)
        except OSError as error:
            self._close()
            raise MespRefError(
                f"{self._folder}: a checkpoint needs {size} bytes: {error.strerror}; free space, "
                "set TMPDIR to another disk or keep checkpoints in RAM"
            ) from None
        self._end += size
        self._maps.append((room, x.dtype, x.shape))
        np.frombuffer(room, x.dtype, x.size).reshape(x.shape)[...] = x

    def pop(self) -> Array:
        """The latest array as a read-only view of its map."""
        room, dtype, shape = self._maps.pop()
        view = np.frombuffer(room, dtype, math.prod(shape)).reshape(shape)
        view.setflags(write=False)
        return view

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()  # a view that is still alive keeps its map open
        self._file = None
        self._maps.clear()

    def __enter__(self) -> "DiskCheckpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def _reserve(handle: int, start: int, size: int) -> None:
    """Room on the disk, not just a longer file. macOS has no posix_fallocate: zeros are written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, start, size)
        return
    zeros, at = bytes(mmap.ALLOCATIONGRANULARITY), start  # `size` is a multiple of this
    while at < start + size:
        at += os.pwrite(handle, zeros, at)


def open_checkpoints(kind: str) -> RamCheckpoints | DiskCheckpoints:
    """The stack that "ram" or "disk" names.

    Raises MespRefError for another kind.
    """
    if kind == "ram":
        return RamCheckpoints()
    if kind == "disk":
        return DiskCheckpoints()
    raise MespRefError(f"checkpoints: found {kind!r}, expected 'ram' or 'disk'")
