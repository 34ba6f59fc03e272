"""Safetensors files written piece by piece, so that no model has to fit in memory."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mesp_ref.files.safetensors import DTYPES
from mesp_ref.ops import Array

Spec = tuple[np.dtype, tuple[int, ...]]


class Writer:
    """An open file whose layout is fixed first and whose tensors are then put in their places.

    Widest element types come first, as in the format's own library: every tensor is aligned.
    Format    see mesp_ref/weights/safetensors.py
    """

    def __init__(self, file: BinaryIO, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        codes = {dtype: code for code, dtype in DTYPES.items()}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._file, self._specs, self._starts = file, dict(specs), dict[str, int]()
        stop = 0
        for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
            start, stop = stop, stop + math.prod(shape) * dtype.itemsize
            self._starts[name] = start
            offsets = [start, stop]
            header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._data = file.tell()
        file.truncate(self._data + stop)

    def dtype(self, name: str) -> np.dtype:
        """The type that a tensor is stored in."""
        return self._specs[name][0]

    def put(self, name: str, array: Array, row: int = 0) -> None:
        """Write a tensor, or its rows from `row` on, cast to the tensor's stored type."""
        dtype, shape = self._specs[name]
        assert array.shape[1:] == shape[1:], f"{name}: {array.shape} is no part of {shape}"
        skipped = row * math.prod(shape[1:]) * dtype.itemsize
        self._file.seek(self._data + self._starts[name] + skipped)
        self._file.write(np.ascontiguousarray(array, dtype).tobytes())


@contextmanager
def write_safetensors(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> Iterator[Writer]:
    """Yield a Writer for a new file, which is synced at the end; zero where nothing was put."""
    with path.open("wb") as file:
        yield Writer(file, specs, metadata)
        file.flush()
        os.fsync(file.fileno())


def save_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays as they are. The same ones give the same bytes, which save_file of the
    safetensors package promises for a single item of metadata only."""
    specs = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with write_safetensors(path, specs, metadata) as writer:
        for name, array in tensors.items():
            writer.put(name, array)
