"""GGUF files written tensor by tensor and row by row, whole or not at all.

A matrix is stored in one of TYPES, a vector in float32 whatever the type is, as llama.cpp's own
converter does it: its kernels add biases and multiply norms in float32.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.files.finite import cast_finite
from mesp_ref.ops import Array

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_DENSE = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_CHUNK = 1 << 20  # weights encoded at a time
_BLOCK = 32  # weights of a row that share a scale in Q8_0
_ADVICE = "convert in a wider --type, or repair the model"


class Outgoing(NamedTuple):
    """A tensor on its way: name in GGUF, one of the package's types, and how to get its rows."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], Array]
    where: str  # for messages


def stored_kind(kind: str, shape: tuple[int, ...]) -> str:
    """The type of a tensor in a file of one `kind`: F32 for vectors; F16 where the blocks of Q8_0 do
    not fill a row."""
    if len(shape) == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % _BLOCK else kind


def encode(w: Array, kind: str, where: str) -> Array:
    """Rows of numbers as they lie in a file.

    Q8_0      d = max|w|/127 in float16, q = round(w/d), of each 32 in a row: the package's arithmetic
    Raises    MespRefError for NaN, infinity and what is infinite in that type
    """
    if kind in _DENSE:
        return cast_finite(w, _DENSE[kind], where, _ADVICE)
    from gguf import GGMLQuantizationType, quantize

    w = cast_finite(w, np.float32, where, _ADVICE)
    with np.errstate(over="ignore"):
        blocks: Array = quantize(w, GGMLQuantizationType[kind])
    scales = blocks.reshape(-1, _BLOCK + 2)[:, :2]
    cast_finite(np.ascontiguousarray(scales).view("<f2"), np.float16, where, _ADVICE)
    return blocks


class _Stream:
    """What the package's writer takes for an array: its size, and how it is written."""

    def __init__(self, tensor: Outgoing, nbytes: int):
        self._tensor, self.nbytes = tensor, nbytes

    def tofile(self, file: BinaryIO) -> None:
        name, kind, shape, rows, where = self._tensor
        step = max(1, _CHUNK // max(1, int(np.prod(shape[1:]))))
        start = file.tell()
        for a in range(0, shape[0], step):
            file.write(encode(rows(a, min(a + step, shape[0])), kind, where).tobytes())
        assert file.tell() - start == self.nbytes, f"{name}: {file.tell() - start} bytes"


@contextlib.contextmanager
def new_gguf(path: Path, architecture: str) -> Iterator[Any]:
    """A GGUFWriter for a file of an architecture at `path`, closed in any case.

    Raises MespRefError where the gguf package is missing.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise MespRefError(
            "GGUF files need the gguf package: pip install 'mesp-ref[convert]'"
        ) from None
    writer = GGUFWriter(path, architecture)
    try:
        yield writer
    finally:
        writer.close()


def write_tensors(writer: Any, tensors: list[Outgoing]) -> None:
    """Write the header, what was added to the writer, and the tensors one after another."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    streams = []
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        weights, size = GGML_QUANT_SIZES[kind]
        streams.append(_Stream(tensor, int(np.prod(tensor.shape)) // weights * size))
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), streams[-1].nbytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stream in streams:
        writer.write_tensor_data(stream)
