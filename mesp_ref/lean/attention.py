"""Causal grouped-query attention over query tiles: no [Tq, Tk] array ever exists."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mesp_ref.lean.widths import query_tile
from mesp_ref.ops._array import Array
from mesp_ref.ops._tiles import tiles, view, widest
from mesp_ref.ops.softmax import causal_mask


class AttentionRes(NamedTuple):
    """Residuals of tiled attention. From lse, one number a row, a probability is rebuilt at once."""

    q: Array  # [N, Tq, H, D]
    k: Array  # [N, Tk, G, D]
    v: Array  # [N, Tk, G, D]
    o: Array  # [N, Tq, H, D]
    lse: Array  # [N, Tq, H], log Σ_j exp(s_ij) over visible j


class _Tile(NamedTuple):
    """One query tile of one key/value head: where its rows and its visible keys are."""

    queries: tuple[int, slice, slice]  # index into [N, T, H, ...]
    keys: tuple[int, slice, int]  # index into [N, Tk, G, D]
    size: int  # queries
    visible: int  # keys
    hidden: Array | None  # [size, 1, 1], how many of the visible keys lie before a query's first


def _tiles(q: Array, k: Array, first: Array | None, tile: int) -> Iterator[_Tile]:
    """Walk the query tiles of every key/value head, from the first key that a query of it sees to the
    last: what no query sees is skipped."""
    (n, tq, heads, _), (_, tk, groups, _) = q.shape, k.shape
    share = heads // groups
    first = None if first is None else np.broadcast_to(first, (n, tq))
    for i, g in np.ndindex(n, groups):
        for a, b in tiles(tq, tile):
            seen, start, hidden = b + tk - tq, 0, None
            if first is not None:
                start = int(first[i, a:b].min())
                hidden = (first[i, a:b] - start)[:, None, None]
            shared, keys = slice(g * share, (g + 1) * share), (i, slice(start, seen), g)
            yield _Tile((i, slice(a, b), shared), keys, b - a, seen - start, hidden)


def _stack(x: Array, at: tuple[int, slice, slice], scratch: Array) -> Array:
    """The tile's rows (query, head) as one matrix: [t, h, D] -> [t·h, D], copied to scratch."""
    out = view(scratch, *x[at].shape)
    out[...] = x[at]
    return out.reshape(-1, x.shape[-1])


def _scores(tile: _Tile, q: Array, k: Array, scratch: Array, scale: float | None) -> Array:
    """q·kᵀ·scale of a tile, −∞ where a key is hidden: some of the last, and some of the first where
    documents begin in the tile.  Shapes  -> [t·h, visible]"""
    s = np.matmul(q, k[tile.keys].T, out=view(scratch, len(q), tile.visible))
    s *= scale or q.shape[-1] ** -0.5
    by_query = s.reshape(tile.size, -1, tile.visible)
    later = ~causal_mask(tile.size, tile.size, like=s)[:, None, :]
    np.copyto(by_query[..., -tile.size :], s.dtype.type(-np.inf), where=later)
    if tile.hidden is not None:
        earlier = np.arange(tile.visible, like=s) < tile.hidden
        np.copyto(by_query, s.dtype.type(-np.inf), where=earlier)
    return s


def _scratch(
    q: Array, k: Array, first: Array | None, tile: int, dtype: np.dtype, *arrays: int
) -> list[list[Array]]:
    """Flat scratch: so many arrays for a tile of scores, as wide as the most keys that one sees, and so
    many for a tile of queries."""
    stacked = widest(q.shape[1], tile) * (q.shape[2] // k.shape[2])
    keys = k.shape[1] if first is None else max(t.visible for t in _tiles(q, k, first, tile))
    sizes = stacked * keys, stacked * q.shape[3]
    return [
        [np.empty(size, dtype, like=q) for _ in range(n)]
        for size, n in zip(sizes, arrays, strict=True)
    ]


def attention(
    q: Array, k: Array, v: Array, *, first: Array | None = None, scale: float | None = None,
    tile: int | None = None,
) -> tuple[Array, AttentionRes]:  # fmt: skip
    """Every query mixes the values of the keys at or before its position, from its first one on.

    Forward   s = q·kᵀ·scale;  lse_i = log Σ_{j visible} exp(s_ij);  o_i = Σ_j exp(s_ij − lse_i)·v_j
    Shapes    q [N, Tq, H, D]; k, v [N, Tk, G, D] with H a multiple of G -> o [N, Tq, H, D];
              first [N, Tq] or [1, Tq], the first key that each query sees, or None
    Tiles     `tile` queries with their visible keys: half the scores are never formed, and none
              between documents of a row or before a window
    Source    Dao et al. 2022 for rebuilding probabilities from one number a row
    """
    dtype = np.result_type(q, k, v)
    o, lse = np.empty(q.shape, dtype, like=q), np.empty(q.shape[:3], dtype, like=q)
    tile = tile or query_tile(q.shape[2] // k.shape[2], k.shape[1])
    (scores,), (queries, out) = _scratch(q, k, first, tile, dtype, 1, 2)
    for t in _tiles(q, k, first, tile):
        p = _scores(t, _stack(q, t.queries, queries), k, scores, scale)
        top = p.real.max(axis=1, keepdims=True)
        np.exp(np.subtract(p, top, out=p), out=p)
        total = p.sum(axis=1, keepdims=True)
        mixed = np.matmul(p, v[t.keys], out=view(out, len(p), v.shape[-1]))
        o[t.queries] = np.divide(mixed, total, out=mixed).reshape(t.size, -1, v.shape[-1])
        lse[t.queries] = (np.log(total) + top).reshape(t.size, -1)
    return o, AttentionRes(q, k, v, o, lse)


def attention_bwd(
    do: Array, res: AttentionRes, *, first: Array | None = None, scale: float | None = None,
    tile: int | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """VJP of tiled attention.

    Backward  p = exp(s − lse);  dv = pᵀ·do;  ds = p ⊙ (do·vᵀ − Σ_D do ⊙ o);
              dq = ds·k·scale;  dk = dsᵀ·q·scale
              Σ_D do ⊙ o is the Σ_j dp_ij·p_ij of the softmax, since o = p·v.
    Shapes    do [N, Tq, H, D] -> dq [N, Tq, H, D]; dk, dv [N, Tk, G, D]
    """
    q, k, v, o, lse = res
    dtype = np.result_type(do, *res)
    dq = np.empty(q.shape, dtype, like=q)
    dk, dv = np.zeros(k.shape, dtype, like=q), np.zeros(v.shape, dtype, like=q)
    tile = tile or query_tile(q.shape[2] // k.shape[2], k.shape[1])
    (scores, slopes), flat = _scratch(q, k, first, tile, dtype, 2, 3)
    for t in _tiles(q, k, first, tile):
        qt, dot, ot = (_stack(x, t.queries, s) for x, s in zip((q, do, o), flat, strict=True))
        p = _scores(t, qt, k, scores, scale)
        np.exp(np.subtract(p, lse[t.queries].reshape(-1, 1), out=p), out=p)
        dv[t.keys] += p.T @ dot
        ds = np.matmul(dot, v[t.keys].T, out=view(slopes, *p.shape))
        ds -= np.einsum("md,md->m", dot, ot)[:, None]
        ds *= np.multiply(p, scale or q.shape[-1] ** -0.5, out=p)
        dq[t.queries] = np.matmul(ds, k[t.keys], out=ot).reshape(t.size, -1, q.shape[-1])
        dk[t.keys] += ds.T @ qt
    return dq, dk, dv
