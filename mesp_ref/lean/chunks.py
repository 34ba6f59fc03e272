"""Chunks of rows: how a long step is cut, what a chunk is given, and where its results are kept."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.inputs import apart
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.model import Model
from mesp_ref.engine.positions import angles, first_keys
from mesp_ref.lean.activations import Checkpoints
from mesp_ref.ops import IGNORED, Array

Chunk: TypeAlias = tuple[slice, slice]  # sequences and tokens: an index into [N, T, ...]

CHUNK = 256  # rows: from here on products are as fast as with more
LARGEST_CHUNK = 1 << 20
DECODED = 512  # where weights are decoded, which happens once a chunk
_CLEARED = 1024  # tokens at once


def chunk_rows(decoded: bool, workers: int = 1) -> int:
    """Rows of a chunk where nobody says: as many for each worker as products need to be fast."""
    return max(DECODED if decoded else CHUNK, CHUNK * workers)


def file_size(config: Qwen2Config, rows: int, itemsize: int) -> int:
    """Bytes of the file of a step: of every block the input of each half and of a norm after it, k, v, o
    and lse; one gradient of the rows, and of k and v."""
    c, d = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, 2 * config.num_key_value_heads * d
    inputs = 2 + sum(bool(after) for _, after in config.traits.norms)
    block = inputs * c + q + kv + config.num_attention_heads
    return rows * itemsize * (config.num_hidden_layers * block + c + kv)


def chunks(shape: tuple[int, ...], rows: int) -> list[Chunk]:
    """[N, T] cut into chunks of at most `rows`: whole sequences, or tokens of a single one."""
    n, t = shape
    if t <= rows:
        step = rows // t
        return [(slice(i, min(i + step, n)), slice(0, t)) for i in range(0, n, step)]
    cuts = [slice(a, min(a + rows, t)) for a in range(0, t, rows)]
    return [(slice(i, i + 1), cut) for i in range(n) for cut in cuts]


class Stream(NamedTuple):
    """What a step in chunks is given in place of a stack of block inputs."""

    stack: Checkpoints  # where rooms are
    chunks: list[Chunk]
    layer: Callable[[int, Chunk], Layer]  # a block as a chunk needs it: with the angles of its rows
    labels: Callable[[Chunk], Array]  # what each position of a chunk predicts


def stream(
    model: Model, adapter: Adapter | None, labels: Array, positions: Array | None,
    stack: Checkpoints, rows: int,
) -> Stream:  # fmt: skip
    """The stream of a checked batch.  Shapes  labels, positions [N, T]"""

    def layer(number: int, chunk: Chunk) -> Layer:
        return _layer(model, adapter, positions, number, chunk)

    def targets(chunk: Chunk) -> Array:
        return _targets(labels, positions, chunk)

    return Stream(stack, chunks(labels.shape, rows), layer, targets)


def _layer(
    model: Model, adapter: Adapter | None, positions: Array | None, number: int, chunk: Chunk
) -> Layer:
    """A block with the angles of a chunk's positions, and with the first key that each row sees.

    Positions of packed rows come in runs, of each of which a table is made.
    """
    rows, tokens = chunk
    config, mine = model.config, None if positions is None else positions[rows, tokens]
    kind = config.layer_type(number)
    first = first_keys(config, kind, tokens.start, tokens.stop, mine)
    if mine is None:
        cos, sin = angles(model, kind, tokens.start, tokens.stop)
    else:
        values, place = np.unique(mine, return_inverse=True)
        runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
        tables = [angles(model, kind, int(run[0]), int(run[-1]) + 1) for run in runs]
        place = place.reshape(mine.shape)
        cos, sin = (np.concatenate(parts)[place] for parts in zip(*tables, strict=True))
    return Layer(number, config, model.weights, adapter, cos, sin, first)


def _targets(labels: Array, positions: Array | None, chunk: Chunk) -> Array:
    """Labels moved one place left, as `shift` does: a chunk's last predicts the next chunk's first."""
    rows, tokens = chunk
    after = rows, slice(tokens.start + 1, tokens.stop + 1)
    found = apart(labels[after], None if positions is None else positions[after])
    moved = np.full((len(found), tokens.stop - tokens.start), IGNORED, labels.dtype)
    moved[:, : found.shape[1]] = found
    return moved


class Rooms:
    """Arrays [N, T, …] by name, each made when its first chunk is written."""

    def __init__(self, stack: Checkpoints, shape: tuple[int, ...]):
        self._stack, self._shape = stack, shape
        self.tokens = shape[1]
        self._arrays: dict[str, Any] = {}
        self._parts: dict[int, Rooms] = {}

    def write(self, name: str, at: Chunk, x: Array) -> None:
        if name not in self._arrays:
            shape = *self._shape, *x.shape[2:]
            self._arrays[name] = self._stack.room(shape, x.dtype, x)
        self._arrays[name][at] = x

    def read(self, name: str, at: Chunk) -> Array:
        found: Array = self._arrays[name][at]
        return found

    def find(self, name: str, at: Chunk) -> Array | None:
        """None where nothing was written under that name."""
        return self.read(name, at) if name in self._arrays else None

    def whole(self, name: str) -> Any:
        """All of an array, to be read and written a piece at a time."""
        return self._arrays[name]

    def clear(self, name: str, rows: slice, like: Array) -> None:
        """Zeros for all tokens of some sequences.  Shapes  like [n, t, …]"""
        for a in range(0, self._shape[1], _CLEARED):
            b = min(a + _CLEARED, self._shape[1])
            zeros = np.zeros((len(like), b - a, *like.shape[2:]), like.dtype, like=like)
            self.write(name, (rows, slice(a, b)), zeros)

    def part(self, number: int) -> "Rooms":
        """Those of one worker's part of the heads."""
        return self._parts.setdefault(number, Rooms(self._stack, self._shape))


class _Sum:
    """An array [N, T, …] that begins at one of its sequences, to be read and written."""

    def __init__(self, array: Any, start: int):
        self.array, self.start = array, start

    def __getitem__(self, at: Any) -> Array:
        found: Array = self.array[self.start + at[0], at[1]]
        return found

    def __setitem__(self, at: Any, x: Array) -> None:
        self.array[self.start + at[0], at[1]] = x


class Earlier(NamedTuple):
    """Keys and values of a chunk and of those before it, and what else its attention leaves behind."""

    block: Rooms  # k, v, o, lse of one block
    gradients: Rooms  # of k and v: of one block after the other
    at: Chunk

    def extend(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Write those of the chunk; those of all rows up to its end.  Shapes  [n, t, G, D]"""
        self.block.write("k", self.at, k)
        self.block.write("v", self.at, v)
        return self._seen("k"), self._seen("v")

    def keep(self, o: Array, lse: Array) -> None:
        self.block.write("o", self.at, o)
        self.block.write("lse", self.at, lse)

    def kept(self) -> tuple[Array, Array, Array, Array]:
        """k and v of all rows up to the chunk's end; o and lse of the chunk."""
        o, lse = (self.block.read(name, self.at) for name in ("o", "lse"))
        return self._seen("k"), self._seen("v"), o, lse

    def sums(self) -> tuple["_Sum", "_Sum"]:
        """dk and dv of the chunk's sequences so far; zeros before the last chunk adds to them."""
        rows, tokens = self.at
        if tokens.stop == self.block.tokens:
            for name in ("k", "v"):
                self.gradients.clear(name, rows, self.block.read(name, self.at))
        dk, dv = (_Sum(self.gradients.whole(name), rows.start) for name in ("k", "v"))
        return dk, dv

    def own(self) -> tuple[Array, Array]:
        """dk and dv of the chunk itself."""
        return self.gradients.read("k", self.at), self.gradients.read("v", self.at)

    def part(self, number: int) -> "Earlier":
        """What one worker keeps, whose part of the heads is always the same."""
        return Earlier(self.block.part(number), self.gradients.part(number), self.at)

    def _seen(self, name: str) -> Array:
        rows, tokens = self.at
        return self.block.read(name, (rows, slice(0, tokens.stop)))
