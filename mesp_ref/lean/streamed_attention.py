"""Causal grouped-query attention of a chunk of queries over tiles of keys, earlier chunks' included."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.lean.attention import _stack
from mesp_ref.lean.widths import query_tile
from mesp_ref.ops._array import Array
from mesp_ref.ops._tiles import tiles, view, widest
from mesp_ref.ops.softmax import causal_mask

KEYS = 1024  # of earlier chunks at once


class StreamedRes(NamedTuple):
    """Residuals of streamed_attention, of one chunk of queries."""

    q: Array  # [N, Tq, H, D]
    k: Array  # [N, Tk, G, D]
    v: Array  # [N, Tk, G, D]
    o: Array  # [N, Tq, H, D]
    lse: Array  # [N, Tq, H], log Σ_j exp(s_ij) over visible j
    sums: tuple[Any, Any] | None = None  # dk and dv as later chunks left them; None: there are none


class _Queries(NamedTuple):
    """One tile of a chunk's queries, of the heads that share a key/value head."""

    at: tuple[int, slice, slice]  # index into [N, Tq, H, ...]
    group: int
    size: int
    first: Array | None  # [size, 1, 1], the first key that each query sees
    low: int  # the first key that any of them sees
    end: int  # behind the last key that any of them sees


def _queries(q: Array, k: Array, i: int, first: Array | None, tile: int) -> Iterator[_Queries]:
    """Walk the query tiles of every key/value head of row i.

    What a query sees begins at `first`, whatever the reason: keys before it, and tiles of nothing
    but such keys, are skipped.
    """
    groups, before = k.shape[2], k.shape[1] - q.shape[1]
    share = q.shape[2] // groups
    for g in range(groups):
        for a, b in tiles(q.shape[1], tile):
            seen = None if first is None else first[i, a:b][:, None, None]
            low = 0 if seen is None else int(seen.min())
            at = i, slice(a, b), slice(g * share, (g + 1) * share)
            yield _Queries(at, g, b - a, seen, low, before + b)


def _pieces(low: int, before: int, end: int, keys: int) -> Iterator[tuple[int, int]]:
    """Bounds of the keys low … end−1: those of the chunk itself, then earlier ones in tiles."""
    yield max(low, before), end
    for a in range(low // keys * keys, before if low < before else 0, keys):
        yield max(a, low), min(a + keys, before)


def _scores(
    t: _Queries, q: Array, k: Array, a: int, b: int, scratch: Array, scale: float | None
) -> Array:
    """q·kᵀ·scale of a query tile and keys a … b−1; −∞ where a key is hidden.

    Shapes    q [t·h, D], k [N, Tk, G, D] -> [t·h, b−a]
    """
    s = np.matmul(q, k[t.at[0], a:b, t.group].T, out=view(scratch, len(q), b - a))
    s *= scale or q.shape[-1] ** -0.5
    by_query, hidden = s.reshape(t.size, -1, b - a), s.dtype.type(-np.inf)
    if b == t.end:
        later = ~causal_mask(t.size, t.size, like=s)[:, None, :]
        np.copyto(by_query[..., -t.size :], hidden, where=later)
    if t.first is not None:
        np.copyto(by_query, hidden, where=np.arange(b - a, like=s) < t.first - a)
    return s


def _sizes(q: Array, k: Array, tile: int | None, keys: int | None) -> tuple[int, int, int, int]:
    """Queries of a tile, earlier keys of a tile; the most keys at once, and rows (query, head)."""
    share, keys = q.shape[2] // k.shape[2], keys or KEYS
    most = max(q.shape[1], min(keys, k.shape[1] - q.shape[1]))
    tile = tile or query_tile(share, most)
    return tile, keys, most, widest(q.shape[1], tile) * share


def streamed_attention(
    q: Array, k: Array, v: Array,
    *, first: Array | None = None, scale: float | None = None, tile: int | None = None,
    keys: int | None = None,
) -> tuple[Array, StreamedRes]:  # fmt: skip
    """Attention of the last Tq of Tk positions: every query mixes the values of the keys that it sees.

    Forward   per tile of keys, s = q·kᵀ·scale; scale is 1/√D unless given;
              m′ = max(m, max s);  r = exp(m − m′);  p = exp(s − m′);  total = r·total + Σ p;
              mixed = r·mixed + p·v;  after the last:  o = mixed/total,  lse = log(total) + m
    Shapes    q [N, Tq, H, D]; k, v [N, Tk, G, D] with H a multiple of G -> o [N, Tq, H, D];
              first [N, Tq] or [1, Tq], the first key that each query sees, or None
    Tiles     `tile` queries; the chunk's own Tq keys, then the Tk − Tq earlier ones by `keys` (KEYS).
              A chunk that holds all rows has the bits of lean.attention
    Source    Milakov & Gimelshein 2018; Dao et al. 2022
    """
    dtype, before = np.result_type(q, k, v), k.shape[1] - q.shape[1]
    o, lse = np.empty(q.shape, dtype, like=q), np.empty(q.shape[:3], dtype, like=q)
    tile, keys, most, stacked = _sizes(q, k, tile, keys)
    scores = np.empty(stacked * most, dtype, like=q)
    queries, sums, product = np.empty((3, stacked * q.shape[3]), dtype, like=q)
    first = None if first is None else np.broadcast_to(first, q.shape[:2])
    for t in (t for i in range(len(q)) for t in _queries(q, k, i, first, tile)):
        qt = _stack(q, t.at, queries)
        mixed, part = view(sums, *qt.shape), view(product, *qt.shape)
        mixed[...] = 0
        top = np.full((len(qt), 1), -np.inf, scores.real.dtype, like=q)
        total = np.zeros((len(qt), 1), dtype, like=q)
        for a, b in _pieces(t.low, before, t.end, keys):
            p = _scores(t, qt, k, a, b, scores, scale)
            earlier, top = top, np.maximum(top, p.real.max(axis=1, keepdims=True))
            np.exp(np.subtract(p, top, out=p), out=p)
            rescale = np.exp(earlier - top)
            total *= rescale
            total += p.sum(axis=1, keepdims=True)
            mixed *= rescale
            mixed += np.matmul(p, v[t.at[0], a:b, t.group], out=part)
        o[t.at] = np.divide(mixed, total, out=mixed).reshape(t.size, -1, v.shape[-1])
        lse[t.at] = (np.log(total) + top).reshape(t.size, -1)
    return o, StreamedRes(q, k, v, o, lse)


def streamed_attention_bwd(
    do: Array, res: StreamedRes,
    *, first: Array | None = None, scale: float | None = None, tile: int | None = None,
    keys: int | None = None,
) -> tuple[Array, Any, Any]:  # fmt: skip
    """VJP of streamed_attention.

    Backward  p = exp(s − lse);  dv = pᵀ·do;  ds = p ⊙ (do·vᵀ − Σ_D do ⊙ o);
              dq = ds·k·scale;  dk = dsᵀ·q·scale, a tile of keys at a time
    Shapes    do [N, Tq, H, D] -> dq [N, Tq, H, D]; dk, dv [N, Tk, G, D]
    Sums      `res.sums` are dk and dv as the queries of later chunks left them, [N, ≥ Tk, G, D] in
              memory or in a file: those of this chunk are added there, and they are what is returned.
              The chunk's own keys then have all of theirs: no earlier query sees them
    """
    q, k, v, *_ = res
    dtype, before = np.result_type(do, q, k, v), k.shape[1] - q.shape[1]
    dq = np.empty(q.shape, dtype, like=q)
    dk, dv = res.sums or (np.zeros(x.shape, dtype, like=q) for x in (k, v))
    tile, keys, most, stacked = _sizes(q, k, tile, keys)
    scores = np.empty((2, stacked * most), dtype, like=q)
    flat = np.empty((3, stacked * q.shape[3]), dtype, like=q)
    room = np.empty((2, most * k.shape[2] * k.shape[3]), dtype, like=q)
    first = None if first is None else np.broadcast_to(first, q.shape[:2])
    for i in range(len(q)):
        low = 0 if first is None else int(first[i].min())
        for a, b in _pieces(low, before, k.shape[1], keys):
            dk_tile, dv_tile = (view(part, b - a, *k.shape[2:]) for part in room)
            dk_tile[...], dv_tile[...] = dk[i, a:b], dv[i, a:b]
            for t in _queries(q, k, i, first, tile):
                c, d = max(a, t.low), min(b, t.end)
                if c < d:
                    at = slice(c - a, d - a), t.group
                    found = _tile_bwd(
                        t, do, res, c, d, scores, flat, dk_tile[at], dv_tile[at], scale
                    )
                    dq[t.at] = found if a >= before else np.add(dq[t.at], found, out=found)
            dk[i, a:b], dv[i, a:b] = dk_tile, dv_tile
    return dq, dk, dv


def _tile_bwd(
    t: _Queries, do: Array, res: StreamedRes, a: int, b: int, scores: Array, flat: Array,
    dk: Array, dv: Array, scale: float | None,
) -> Array:  # fmt: skip
    """A query tile's dq from keys a … b−1, in scratch; what it gives to their dk and dv is added."""
    q, k, v, o, lse, _ = res
    qt, dot, ot = (_stack(x, t.at, part) for x, part in zip((q, do, o), flat, strict=True))
    p = _scores(t, qt, k, a, b, scores[0], scale)
    np.exp(np.subtract(p, lse[t.at].reshape(-1, 1), out=p), out=p)
    dv += p.T @ dot
    ds = np.matmul(dot, v[t.at[0], a:b, t.group].T, out=view(scores[1], *p.shape))
    ds -= np.einsum("md,md->m", dot, ot)[:, None]
    ds *= np.multiply(p, scale or q.shape[-1] ** -0.5, out=p)
    dk += ds.T @ qt
    return np.matmul(ds, k[t.at[0], a:b, t.group], out=ot).reshape(t.size, -1, q.shape[-1])
