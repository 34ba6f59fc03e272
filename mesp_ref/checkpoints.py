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

    def push(self, x: Array) -> None: ...
    def pop(self) -> Array: ...


class RamCheckpoints:
    """Checkpoints kept in memory: references, nothing is copied."""

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
    """Checkpoints in one unnamed mapped file, `count` arrays of one shape.

    The space is reserved before the file is mapped, so a disk that is too full is an error here and
    not a bus error at the first write. The file has no name: it vanishes with the process.

    Raises MespRefError when the space cannot be reserved.
    """

    def __init__(self, count: int, directory: str | Path | None = None):
        self._count, self._directory = count, directory
        self._file: BinaryIO | None = None
        self._map: mmap.mmap | None = None
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.float32)
        self._held = 0

    def _reserve(self, x: Array) -> None:
        self._shape, self._dtype = x.shape, x.dtype
        size = max(1, self._count * x.nbytes)
        folder = Path(self._directory or tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # outlives this call
            os.posix_fallocate(self._file.fileno(), 0, size)
            self._map = mmap.mmap(self._file.fileno(), size)
        except OSError as error:
            self._close()
            raise MespRefError(
                f"{folder}: checkpoints need {size} bytes: {error.strerror}; free space, "
                "set TMPDIR to another disk or keep checkpoints in RAM"
            ) from None

    def _slot(self, index: int) -> Array:
        assert self._map is not None, "pop before push"
        size = math.prod(self._shape)
        start = index * size * self._dtype.itemsize
        return np.frombuffer(self._map, self._dtype, size, start).reshape(self._shape)

    def push(self, x: Array) -> None:
        if self._map is None:
            self._reserve(x)
        self._slot(self._held)[...] = x
        self._held += 1

    def pop(self) -> Array:
        """The latest array as a read-only view of the map."""
        self._held -= 1
        view = self._slot(self._held)
        view.flags.writeable = False
        return view

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()  # views that are still alive keep the map itself open
        self._file = self._map = None

    def __enter__(self) -> "DiskCheckpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def open_checkpoints(kind: str, count: int) -> RamCheckpoints | DiskCheckpoints:
    """The stack that "ram" or "disk" names, for `count` blocks.

    Raises MespRefError for another kind.
    """
    if kind == "ram":
        return RamCheckpoints()
    if kind == "disk":
        return DiskCheckpoints(count)
    raise MespRefError(f"checkpoints: found {kind!r}, expected 'ram' or 'disk'")
