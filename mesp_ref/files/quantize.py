"""Dense checkpoints to MLX affine 4-bit or 8-bit, bit for bit as MLX quantises them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.files.affine import SCALE_DTYPES, Affine, layout, put_parts
from mesp_ref.files.checkpoint import (
    check_unchanged,
    open_checkpoint,
    storage_dtype,
    write_config,
)
from mesp_ref.files.config import kept_fields
from mesp_ref.files.output import copy_companions, new_directory
from mesp_ref.files.safetensors import Stored
from mesp_ref.files.writer import write_safetensors
from mesp_ref.ops import Array

_CHUNK = 1 << 18  # weights quantised at a time


def quantize(w: Array, affine: Affine) -> tuple[Array, Array, Array]:
    """Round each group of a row to integers times a scale plus a bias.

    Forward   scale = max((max − min)/(2^bits − 1), 1e-7), negative where |max| ≥ |min|;
              edge = the one of min, max that is larger in magnitude; n = rint(edge/scale);
              n ≠ 0: scale ← edge/n, bias = edge (so edge and 0 are exact), otherwise bias = 0;
              q = clip(rint((w − bias)/scale), 0, 2^bits − 1)
              All in float32; scale and bias are rounded to the dtype of w at the end.
    Shapes    w [out, in] -> uint32 [out, in·bits/32], scales and biases [out, in/g]
    Dtypes    w float16, bfloat16 or float32
    Source    mlx 0.32, mx.quantize, mode "affine"
    """
    top, groups = np.float32(2**affine.bits - 1), w.astype(np.float32)
    groups = groups.reshape(len(w), -1, affine.group_size)  # [out, in/g, g]
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    rising = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    scale = np.where(rising, scale, -scale)
    edge = np.where(rising, low, high)
    n = np.rint(edge / scale)
    scale = np.where(n != 0, edge / np.where(n != 0, n, 1), scale)
    bias = np.where(n != 0, edge, np.float32(0))
    q = np.clip(np.rint((groups - bias) / scale), 0, top).astype(np.uint8)
    packed = pack(q.reshape(w.shape), affine.bits)
    return packed, scale[..., 0].astype(w.dtype), bias[..., 0].astype(w.dtype)


def pack(q: Array, bits: int) -> Array:
    """Integers into little-endian words: uint8 [out, in] -> uint32 [out, in·bits/32]."""
    return np.ascontiguousarray(q if bits == 8 else q[:, ::2] | q[:, 1::2] << 4).view(np.uint32)


def quantize_checkpoint(
    path: str | Path,
    out: str | Path,
    bits: int = 4,
    group_size: int = 64,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the directory `out`, whole or not at all: `path` with packed matrices.

    Weights are cast to `dtype` (default: the type they are stored in) and quantised a few rows at
    a time; norms, biases of q, k and v, and scales are stored in it. mlx-lm loads the result.

    Raises MespRefError for bits other than 4 and 8, group sizes other than 32, 64 and 128, other
    dtypes, weights that are packed already or not finite, a model that changes meanwhile, and an
    `out` that is not empty
    """
    affine = Affine(bits, group_size)
    config, opened = open_checkpoint(path)
    tables: dict[str, Any] = dict(opened)
    stored, shapes = _scale_dtype(tables, dtype, path), config.weight_shapes()
    # the rest stays dense, as mlx-lm leaves it
    packed = {n: affine for n, s in shapes.items() if len(s) == 2 and s[1] % group_size == 0}
    if not packed:
        raise MespRefError(f"{path}: group_size: found {group_size}, expected a divisor of a row")
    with new_directory(out, overwrite=overwrite, inputs=[path]) as aside:
        file, specs = aside / "model.safetensors", layout(shapes, packed, stored, stored)
        with write_safetensors(file, specs, {"format": "mlx"}) as writer:
            for name, table in tables.items():
                for row, w in _chunks(f"{path}: {name}", table, stored):
                    if name in packed:
                        put_parts(writer, name, quantize(w, affine), row)
                    else:
                        writer.put(name, w, row)
        scheme, kept = {"quantization": affine.to_dict()}, kept_fields(Path(path))
        write_config(config, aside, stored, scheme, kept)
        copy_companions(Path(path), aside)
        check_unchanged(tables)


def _scale_dtype(tables: dict[str, Any], dtype: str | None, path: str | Path) -> np.dtype:
    """The type of scales: the one asked for, or the one the weights are stored in."""
    for name, table in tables.items():
        if not isinstance(table, Stored):
            raise MespRefError(f"{path}: {name}: is quantised already, expected dense weights")
    found = storage_dtype(dtype or next(iter(tables.values())).raw.dtype)
    if dtype is None and found == np.float64:
        return np.dtype(np.float32)
    if found.name not in SCALE_DTYPES:
        raise MespRefError(
            f"dtype: found {found.name}, expected one of {', '.join(SCALE_DTYPES)} for scales"
        )
    return found


def _chunks(where: str, table: Stored, dtype: np.dtype) -> Iterator[tuple[int, Array]]:
    """A tensor in its stored type, a few rows at a time: number of the first row, rows."""
    step = max(1, _CHUNK // table.raw[:1].size)
    for row in range(0, len(table), step):
        with np.errstate(over="ignore"):
            w = table.read(row, row + step).astype(dtype)
        if not np.isfinite(w.astype(np.float32)).all():
            raise MespRefError(f"{where}: found NaN or infinity in {dtype.name}, expected weights")
        yield row, w
