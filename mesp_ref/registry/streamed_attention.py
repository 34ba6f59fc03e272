"""streamed_attention: a chunk of queries over tiles of keys; alone, and a row in several chunks."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import lean
from mesp_ref.ops import Array
from mesp_ref.registry import attention
from mesp_ref.registry.sizes import Args, Sizes

ROW = replace(
    attention.ROW,
    name="streamed_attention",
    forward=lean.streamed_attention,
    backward=lean.streamed_attention_bwd,
    attributes=("scale", "tile", "keys"),
    sample=lambda rng, z, dtype: attention.sample(rng, z, dtype) | {"tile": 2, "keys": 2},
    golden=None,
)

_STARTS = (), (1, 2, 4), (3,)  # of documents after the first, row by row


def _packed(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    """A row of one document; one of documents that begin inside a tile and inside a chunk, of one token
    and more; one whose second begins with a chunk."""
    first = np.zeros((len(_STARTS), z.t), np.int64)
    for row, starts in zip(first, _STARTS, strict=True):
        for start in starts:
            row[start:] = start
    sizes = z._replace(n=len(_STARTS), g=2, share=1, past=0)
    return attention.sample(rng, sizes, dtype) | {"first": first}


PACKED = replace(
    ROW,
    name="streamed_packed_attention",
    sample=lambda rng, z, dtype: _packed(rng, z, dtype) | {"tile": 2, "keys": 2},
)

WINDOWED = replace(
    ROW,
    name="streamed_windowed_attention",
    sample=lambda rng, z, dtype: attention.windowed(rng, z, dtype) | {"tile": 2, "keys": 2},
)


class ChunksRes(NamedTuple):
    """What the chunks of a row leave: each has residuals of its own."""

    chunks: tuple[lean.StreamedRes, ...]


def _cut(first: Array | None, a: int, b: int) -> Array | None:
    return None if first is None else first[:, a:b]


def in_chunks(
    q: Array,
    k: Array,
    v: Array,
    *,
    first: Array | None = None,
    scale: float | None = None,
    tile: int,
    keys: int,
    rows: int,
) -> tuple[Array, ChunksRes]:
    """Attention of a whole row, `rows` queries at a time."""
    found = []
    for a in range(0, q.shape[1], rows):
        b = min(a + rows, q.shape[1])
        at = _cut(first, a, b)
        part = lean.streamed_attention(
            q[:, a:b], k[:, :b], v[:, :b], first=at, scale=scale, tile=tile, keys=keys
        )
        found.append(part)
    o = np.concatenate([y for y, _ in found], axis=1)
    return o, ChunksRes(tuple(res for _, res in found))


def in_chunks_bwd(
    do: Array,
    res: ChunksRes,
    *,
    first: Array | None = None,
    scale: float | None = None,
    tile: int,
    keys: int,
    rows: int,
) -> tuple[Array, Array, Array]:
    """VJP of in_chunks: from the last to the first, each adding to what later ones left."""
    last = res.chunks[-1]
    sums: Any = [np.zeros(x.shape, do.dtype, like=do) for x in (last.k, last.v)]
    dq = np.empty(do.shape, do.dtype, like=do)
    for part in reversed(res.chunks):
        b = part.k.shape[1]
        a = b - part.q.shape[1]
        at = _cut(first, a, b)
        dq[:, a:b], *sums = lean.streamed_attention_bwd(
            do[:, a:b], part._replace(sums=tuple(sums)), first=at, scale=scale, tile=tile, keys=keys
        )
    return dq, sums[0], sums[1]


def _whole(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    return attention.sample(rng, z._replace(past=0), dtype)


CHUNKS = replace(
    ROW,
    name="streamed_attention_in_chunks",
    forward=in_chunks,
    backward=in_chunks_bwd,
    attributes=("scale", "tile", "keys", "rows"),
    sample=lambda rng, z, dtype: _whole(rng, z, dtype) | {"tile": 1, "keys": 2, "rows": 2},
)

PACKED_CHUNKS = replace(
    CHUNKS,
    name="streamed_packed_attention_in_chunks",
    sample=lambda rng, z, dtype: _packed(rng, z, dtype) | {"tile": 2, "keys": 2, "rows": 3},
)
