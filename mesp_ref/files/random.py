"""Checkpoint directories of random weights, written a few rows at a time: what a shape costs."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError
from mesp_ref.files.affine import Affine, layout, put_parts
from mesp_ref.files.checkpoint import storage_dtype, write_config
from mesp_ref.files.output import new_directory
from mesp_ref.files.writer import Writer, write_safetensors
from mesp_ref.ops import Array

_CHUNK = 1 << 20  # weights drawn at a time
_SPARE = 1 << 20  # bytes for the header and config.json


def write_random_checkpoint(
    config: Qwen2Config,
    path: str | Path,
    *,
    dtype: str = "float32",
    affine: Affine | None = None,
    seed: int = 0,
    std: float = 0.02,
) -> None:
    """Write the directory `path`, whole or not at all, without ever holding a tensor whole.

    Dense     normal(0, std) matrices, norms 1, biases 0, stored as `dtype`
    affine    matrices whose rows hold whole groups are packed: uniform integers q and
              scale·q + bias with mean 0 and deviation std; scales and the rest in `dtype`

    Raises MespRefError when the disk has less room than the file needs, before anything is written
    """
    path, stored = Path(path), storage_dtype(dtype)
    shapes = config.weight_shapes()
    packed = {n: affine for n, s in shapes.items() if affine and _fits(s, affine)}
    if affine and not packed:
        raise MespRefError(
            f"group_size: found {affine.group_size}, expected a divisor of "
            f"{config.hidden_size}, the length of a row"
        )
    specs = layout(shapes, packed, stored, stored)
    _require_room(path, sum(t.itemsize * math.prod(shape) for t, shape in specs.values()))
    rng = np.random.default_rng(seed)
    with new_directory(path, overwrite=True) as aside:
        metadata = {"format": "mlx" if affine else "pt"}
        with write_safetensors(aside / "model.safetensors", specs, metadata) as writer:
            for name, shape in shapes.items():
                if name in packed:
                    _put_packed(writer, name, shape, packed[name], std, rng)
                else:
                    _put_dense(writer, name, shape, std, rng)
        fields = {"quantization": affine.to_dict()} if affine else {}
        write_config(config, aside, stored, fields)


def _fits(shape: tuple[int, ...], affine: Affine) -> bool:
    return len(shape) == 2 and shape[1] % affine.group_size == 0


def _require_room(path: Path, size: int) -> None:
    """Raise MespRefError when the disk that will hold `path` has less than `size` bytes free."""
    home = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(home).free
    if free < size + _SPARE:
        raise MespRefError(
            f"{path}: the weights need {size / 1e6:.0f} MB, found {free / 1e6:.0f} MB free; free "
            "space or set MESP_REF_CACHE to another disk"
        )


def _rows(shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """First row and shape of each piece of a tensor."""
    step = max(1, _CHUNK // math.prod(shape[1:]))
    for row in range(0, shape[0], step):
        yield row, (min(step, shape[0] - row), *shape[1:])


def _put_dense(
    writer: Writer, name: str, shape: tuple[int, ...], std: float, rng: np.random.Generator
) -> None:
    for row, piece in _rows(shape):
        if len(shape) == 1:  # a norm or a bias
            array: Array = np.full(piece, name.endswith("norm.weight"), np.float32)
        else:
            array = rng.standard_normal(piece, dtype=np.float32)
            array *= np.float32(std)
        writer.put(name, array, row)


def _put_packed(
    writer: Writer, name: str, shape: tuple[int, ...], affine: Affine, std: float,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Random words: each integer in them is uniform on 0 … n−1, of deviation sqrt((n² − 1)/12)."""
    levels = 2**affine.bits
    scale = std / math.sqrt((levels**2 - 1) / 12)
    parts: dict[str, Any] = affine.shapes(shape)
    for row, (count, _) in _rows(shape):
        words = rng.integers(0, 2**32, (count, parts["weight"][1]), np.uint32)
        scales = np.full((count, parts["scales"][1]), scale, np.float32)
        put_parts(writer, name, (words, scales, scales * np.float32(-(levels - 1) / 2)), row)
