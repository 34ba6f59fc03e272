"""Safetensors files read through a memory map: nothing is copied until an op asks for it.

The safetensors package copies every tensor it returns. Here a float32 tensor of a float32 model is
a view of the map: its bytes are the page cache's, not the process's.
Format: header length in 8 little-endian bytes; the header, a JSON object {name: {dtype, shape,
data_offsets}}; the data.
"""

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import open_regular, parse_json
from mesp_ref.ops import Array

_HEADER_LIMIT = 1 << 25  # bytes; a model of a hundred thousand tensors has a third of it
_AXES = 8
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}


class Stored:
    """A tensor as it lies in the file; indexing decodes just the part asked for.

    `stored[index]` has the compute dtype. When that is the stored dtype it is a view of the map,
    otherwise a fresh array that dies with its last user. `guard` is called before the map is touched.
    `read(a, b)` is rows a … b−1 as stored, from the file itself and not from the map.
    """

    def __init__(
        self, raw: Array, dtype: np.dtype, guard: Callable[[], None] = lambda: None,
        read: Callable[[int, int], Array] | None = None,
    ):  # fmt: skip
        self.raw, self.dtype, self.shape, self.guard = raw, dtype, raw.shape, guard
        self.read = read or (lambda a, b: raw[a:b])

    def __getitem__(self, index: Any) -> Array:
        self.guard()
        return self.raw[index].astype(self.dtype, copy=False)

    def __len__(self) -> int:
        return len(self.raw)


class Gain(Stored):
    """A norm's weight of a family that stores the gain without its 1: indexing gives 1 + w.

    `read` and `raw` are w as stored, so what is written again is written unchanged.
    """

    def __getitem__(self, index: Any) -> Array:
        self.guard()
        gain: Array = self.raw[index].astype(self.dtype)  # a copy, whatever is stored
        gain += 1
        return gain


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def identity(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is replaced, resized or written to."""
    return status.st_ino, status.st_size, status.st_mtime_ns


class MappedFile:
    """One safetensors file, mapped read-only and checked before anything is trusted.

    Raises MespRefError for a missing or truncated file, a header that is not JSON, lies about its
    length or places a tensor outside the file or over another one, gaps and bytes that are no
    tensor's (as the safetensors package does), and for element types the engine cannot decode.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open_regular(self.path) as file:
                self._identity = identity(os.fstat(file.fileno()))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise MespRefError(f"{path}: not found, expected a safetensors file") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MespRefError(f"{path}: cannot be mapped: {reason}") from None
        self._place = os.path.abspath(self.path)  # noqa: PTH100  # stays when the process moves
        header, self._data = self._read_header()
        metadata = header.pop("__metadata__", None)  # MLX writes null where there is none
        self.metadata: dict[str, str] = {} if metadata is None else metadata
        if not isinstance(self.metadata, dict):
            found = shown(self.metadata)
            raise MespRefError(f"{self.path}: __metadata__: found {found}, expected an object")
        self._tensors = {name: self._check(name, entry) for name, entry in header.items()}
        self._check_whole()

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = len(self._map)
        length = int.from_bytes(self._map[:8], "little") if size >= 8 else 0
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            raise MespRefError(
                f"{self.path}: header length: found {length}, expected 2 to {max(size - 8, 2)} "
                f"bytes in a file of {size}; truncated or not a safetensors file"
            )
        try:
            header = parse_json(self._map[8 : 8 + length])
        except ValueError as error:
            raise MespRefError(f"{self.path}: header: not JSON: {error}") from None
        if not isinstance(header, dict):
            raise MespRefError(f"{self.path}: header: found no object, expected tensors by name")
        return header, 8 + length

    def _check(self, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int]:
        """Type, shape and first byte of a tensor whose place in the file is proven."""
        try:
            code, shape = entry["dtype"], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            sane = isinstance(code, str) and len(shape) <= _AXES
            sane = sane and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            # An empty tensor can have any shape that NumPy can address; another is held by the file.
            sane = sane and (0 not in shape or math.prod(max(n, 1) for n in shape) < 2**56)
        except (TypeError, KeyError, ValueError):
            sane = False
        if not sane:
            raise MespRefError(
                f"{self.path}: {name}: expected dtype, shape and data_offsets, found {shown(entry)}"
            )
        if code not in DTYPES:
            raise MespRefError(
                f"{self.path}: {name}: dtype: found {shown(code)}, expected one of {', '.join(DTYPES)}"
            )
        dtype, held = DTYPES[code], len(self._map) - self._data
        if stop > held:
            raise MespRefError(
                f"{self.path}: {name}: ends at data byte {stop}, expected at most {held}; "
                "the file is truncated, fetch it again"
            )
        if stop - start != _size(dtype, shape):
            raise MespRefError(
                f"{self.path}: {name}: found {stop - start} bytes, expected "
                f"{_size(dtype, shape)} for {code} {list(shape)}"
            )
        return dtype, shape, self._data + start

    def _check_whole(self) -> None:
        """Sorted by their places, the tensors follow each other without a gap and fill the file."""
        end, last = self._data, "the header"
        places = ((start, _size(dtype, shape), name)
                  for name, (dtype, shape, start) in self._tensors.items())  # fmt: skip
        for start, size, name in sorted(places):
            if start != end:
                raise MespRefError(
                    f"{self.path}: {name}: begins at data byte {start - self._data}, expected "
                    f"{end - self._data}, the end of {last}; the file is damaged"
                )
            end, last = start + size, name
        if end != len(self._map):
            raise MespRefError(
                f"{self.path}: found {len(self._map) - end} bytes after the last tensor, expected "
                "none; the file is damaged, fetch it again"
            )

    def check_unchanged(self) -> None:
        """Stop before a map is touched whose file is no longer the one that was opened.

        A map of a file that was truncated kills the process where it is touched; one that was
        written over gives other numbers. A `stat` costs microseconds.
        Raises    MespRefError naming the file, when it is gone, replaced, resized or written to
        """
        now: object = "nothing"
        with contextlib.suppress(OSError):
            now = identity(os.stat(self._place))  # noqa: PTH116  # a third of Path.stat's time
        if now != self._identity:
            self._refuse_change(now)

    def _refuse_change(self, now: object) -> NoReturn:
        raise MespRefError(
            f"{self.path}: changed while in use (found inode, size and time {now}, expected "
            f"{self._identity}); nothing was computed from it, restore the file and start again"
        )

    def read_rows(self, name: str, a: int, b: int) -> Array:
        """Rows a … b−1 of a tensor, read and not mapped.

        Where a map of a file that is cut short at this moment would end the process, this is an
        error: for what reads a whole model once, and so for long, but needs no piece twice.
        """
        dtype, shape, start = self._tensors[name]
        rows, row = min(b, shape[0]) - a, _size(dtype, shape[1:])
        now: object = "nothing"
        with contextlib.suppress(OSError), open_regular(self._place) as file:
            now = identity(os.fstat(file.fileno()))
            file.seek(start + a * row)
            content = file.read(rows * row)
            if now == self._identity and len(content) == rows * row:
                return np.frombuffer(content, dtype).reshape(rows, *shape[1:])
        return self._refuse_change(now)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def raw(self, name: str) -> Array:
        """The tensor as stored: a read-only view of the map."""
        dtype, shape, start = self._tensors[name]
        return np.frombuffer(self._map, dtype, math.prod(shape), start).reshape(shape)
