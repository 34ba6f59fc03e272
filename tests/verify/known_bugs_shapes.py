"""Mistakes that show at another shape, order, stride or padding, or with repeated indices."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from known_bugs import Known, drawn, numbers, total

from mesp_ref.verify import strategies
from mesp_ref.verify.drawn import arguments

_X, _CUBE = numbers(3, 4), numbers(2, 3, 4)
_ROWS = arguments("n c")


def array(draw: st.DrawFn, axes: int) -> Any:
    return draw(strategies.values(draw(strategies.shapes(axes))))


def turned(draw: st.DrawFn) -> tuple[Any, ...]:
    return array(draw, 3), tuple(draw(st.permutations(range(3))))


def shifted(draw: st.DrawFn) -> tuple[Any, ...]:
    return array(draw, 2), draw(st.integers(-3, 7))


def two_parts(draw: st.DrawFn) -> tuple[Any, ...]:
    n, a, b = draw(strategies.shapes(3))
    return draw(strategies.values((n, a))), draw(strategies.values((n, b)))


def pair_of(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return numbers(*shape), numbers(*shape, seed=1)


def join_bwd(dy: Any, a: Any, b: Any, equal: bool = False) -> Any:
    at = dy.shape[1] // 2 if equal else a.shape[1]
    if equal and a.shape != b.shape:  # as large as they must be, filled from the wrong place
        at = min(a.shape[1], dy.shape[1] - b.shape[1])
        return np.roll(dy, 1, 1)[:, : a.shape[1]], dy[:, dy.shape[1] - b.shape[1] :]
    return dy[:, :at], dy[:, at:]


def repeated(x: Any, times: int) -> Any:
    return np.repeat(x, times, -1)


def repeated_bwd(dy: Any, x: Any, times: int, tiled: bool = False) -> Any:
    if tiled:
        return dy.reshape(*x.shape[:-1], times, x.shape[-1]).sum(-2)
    return dy.reshape(*x.shape, times).sum(-1)


def several(draw: st.DrawFn) -> tuple[Any, ...]:
    return array(draw, 2), draw(st.integers(1, 3))


def sort_bwd(dy: Any, x: Any, inverse: bool = True) -> Any:
    order = np.argsort(x, -1, "stable")
    if not inverse:
        return np.take_along_axis(dy, order, -1)
    return np.take_along_axis(dy, np.argsort(order, -1, "stable"), -1)


def diagonal_bwd(dy: Any, x: Any, k: int, offset: bool = True) -> Any:
    dx = np.zeros_like(x)
    i = np.arange(len(dy))
    dx[i + (max(-k, 0) if offset else 0), i + (max(k, 0) if offset else 0)] = dy
    return dx


def off_diagonal(draw: st.DrawFn) -> tuple[Any, ...]:
    n, m = draw(strategies.shapes(2))
    k = draw(st.integers(-min(n - 1, 2), min(m - 1, 2)))
    return draw(strategies.values((n, m))), k


def convolved(x: Any, w: Any, stride: int, dilation: int) -> Any:
    """x [channels, length] with w [out, channels, taps]."""
    reach = (w.shape[-1] - 1) * dilation
    starts = np.arange(0, x.shape[-1] - reach, stride)
    windows = x[:, starts[:, None] + dilation * np.arange(w.shape[-1])]
    return np.einsum("ctk,ock->ot", windows, w)


def convolved_bwd(
    dy: Any, x: Any, w: Any, stride: int, dilation: int, sees: int | None = None
) -> Any:
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for k in range(w.shape[-1]):
        at = np.arange(dy.shape[-1]) * stride + k * dilation
        dx[:, at] += w[:, :, k].T @ dy
        seen = np.arange(dy.shape[-1]) * stride + k * (dilation if sees is None else sees)
        dw[:, :, k] = dy @ x[:, seen].T
    return dx, dw


def dilated(draw: st.DrawFn) -> tuple[Any, ...]:
    c, o, taps = (draw(st.integers(1, 3)) for _ in range(3))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    long = (taps - 1) * dilation + draw(st.integers(1, 6))
    return (
        draw(strategies.values((c, long))),
        draw(strategies.values((o, c, taps))),
        stride,
        dilation,
    )


def grouped(x: Any, w: Any) -> Any:
    """x [groups·c, t] mixed inside of groups by w [groups, o, c]."""
    g, _, c = w.shape
    return np.einsum("gct,goc->got", x.reshape(g, c, -1), w).reshape(-1, x.shape[-1])


def grouped_bwd(dy: Any, x: Any, w: Any, right: bool = True) -> Any:
    g, o, c = w.shape
    up = dy.reshape(g, o, -1) if right else dy.reshape(o, g, -1).swapaxes(0, 1)
    dx = np.einsum("got,goc->gct", dy.reshape(g, o, -1), w).reshape(x.shape)
    return dx, np.einsum("got,gct->goc", up, x.reshape(g, c, -1))


def in_groups(draw: st.DrawFn) -> tuple[Any, ...]:
    g, o, c, t = draw(strategies.shapes(4, 4))
    return draw(strategies.values((g * c, t))), draw(strategies.values((g, o, c)))


def windows(x: Any, size: int, stride: int) -> Any:
    return np.lib.stride_tricks.sliding_window_view(x, size, -1)[..., ::stride, :]


def max_pool(x: Any, size: int, stride: int) -> Any:
    return windows(x, size, stride).max(-1)


def max_pool_bwd(dy: Any, x: Any, size: int, stride: int, add: bool = True) -> Any:
    dx = np.zeros_like(x)
    best = windows(x, size, stride).argmax(-1)
    for k in range(dy.shape[-1]):
        at = best[..., k : k + 1] + k * stride
        before = np.take_along_axis(dx, at, -1) if add else 0
        np.put_along_axis(dx, at, before + dy[..., k : k + 1], -1)
    return dx


def max_pool_every_tie(dy: Any, x: Any, size: int, stride: int) -> Any:
    dx, y = np.zeros_like(x), max_pool(x, size, stride)
    for k in range(dy.shape[-1]):
        at = slice(k * stride, k * stride + size)
        dx[..., at] += dy[..., k : k + 1] * (x[..., at] == y[..., k : k + 1])
    return dx


def pooled(draw: st.DrawFn) -> tuple[Any, ...]:
    n, size, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return draw(strategies.values((n, size + draw(st.integers(0, 6))))), size, stride


def mean_pool(x: Any, pad: int) -> Any:
    """Over three neighbours, of which those in the padding do not count."""
    wide = np.pad(x, ((0, 0), (pad, pad)))
    there = np.pad(np.ones(x.shape), ((0, 0), (pad, pad)))
    return windows(wide, 3, 1).sum(-1) / windows(there, 3, 1).sum(-1)


def mean_pool_bwd(dy: Any, x: Any, pad: int, counted: bool = False) -> Any:
    there = np.pad(np.ones(x.shape), ((0, 0), (pad, pad)))
    g = dy / (3 if counted else windows(there, 3, 1).sum(-1))
    wide = np.zeros((len(x), x.shape[1] + 2 * pad), x.dtype)
    for k in range(3):
        wide[:, k : k + g.shape[1]] += g
    return wide[:, pad : pad + x.shape[1]]


def in_padding(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c = draw(st.integers(1, 3)), draw(st.integers(3, 9))
    return draw(strategies.values((n, c))), draw(st.integers(0, 1))


def bins(long: int, count: int) -> list[slice]:
    return [slice(i * long // count, -(-(i + 1) * long // count)) for i in range(count)]


def adaptive(x: Any, count: int) -> Any:
    return np.stack([x[..., b].mean(-1) for b in bins(x.shape[-1], count)], -1)


def adaptive_bwd(dy: Any, x: Any, count: int, even: bool = False) -> Any:
    dx = np.zeros_like(x)
    for k, b in enumerate(bins(x.shape[-1], count)):
        share = max(x.shape[-1] // count, 1) if even else b.stop - b.start
        dx[..., b] += dy[..., k : k + 1] / share
    return dx


def to_bins(draw: st.DrawFn) -> tuple[Any, ...]:
    x = array(draw, 2)
    return x, draw(st.integers(1, 4))


def edges(mode: str, long: int, pad: int) -> Any:
    return np.pad(np.arange(long), pad, mode)  # type: ignore[call-overload]


def padded(x: Any, pad: int, mode: str) -> Any:
    return x[..., edges(mode, x.shape[-1], pad)]


def padded_bwd(dy: Any, x: Any, pad: int, mode: str, at: Any = None) -> Any:
    dx = np.zeros_like(x)
    seen = edges(mode, x.shape[-1], pad) if at is None else at
    for k, i in enumerate(seen):
        dx[..., i] += dy[..., k]
    return dx


def padded_as_symmetric(dy: Any, x: Any, pad: int, mode: str) -> Any:
    """Reflection with the border twice: the same for no padding and for replication by one."""
    return padded_bwd(dy, x, pad, mode, edges("symmetric", x.shape[-1], pad))


def to_pad(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c, pad = draw(st.integers(1, 3)), draw(st.integers(3, 7)), draw(st.integers(0, 2))
    return draw(strategies.values((n, c))), pad, draw(st.sampled_from(["edge", "reflect", "wrap"]))


def resized(long: int, out: int) -> Any:
    """[out, long] of linear interpolation with aligned corners; a single point is the first."""
    made = np.zeros((out, long))
    for i in range(out):
        at = i * (long - 1) / (out - 1) if out > 1 else 0.0
        low = min(int(at), long - 1)
        made[i, low] += 1 - (at - low)
        made[i, min(low + 1, long - 1)] += at - low
    return made


def resize(x: Any, out: int) -> Any:
    return x @ resized(x.shape[-1], out).T


def resize_bwd(dy: Any, x: Any, out: int, corners: bool = True) -> Any:
    weights = resized(x.shape[-1], out)
    if not corners and out == 1:
        weights = np.full_like(weights, 1 / x.shape[-1])
    return dy @ weights


def to_size(draw: st.DrawFn) -> tuple[Any, ...]:
    return array(draw, 2), draw(st.integers(1, 6))


def along_bwd(dy: Any, x: Any, ids: Any, add: bool = True) -> Any:
    dx = np.zeros_like(x)
    if add:
        np.add.at(dx, (np.arange(len(x))[:, None], ids), dy)
    else:
        np.put_along_axis(dx, ids, dy, -1)
    return dx


def along(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c, t = draw(strategies.shapes(3))
    return draw(strategies.values((n, c))), draw(strategies.indices((n, t), c))


def added_at(x: Any, ids: Any, more: Any) -> Any:
    y = x.copy()
    np.add.at(y, ids, more)
    return y


def written_at(x: Any, ids: Any, more: Any) -> Any:
    y = x.copy()
    for i, row in zip(ids, more, strict=True):
        y[i] = row
    return y


def written_at_bwd(dy: Any, x: Any, ids: Any, more: Any, last: bool = True) -> Any:
    dx, dm, gone = dy.copy(), np.zeros_like(more), set()
    for k in reversed(range(len(ids))):
        if int(ids[k]) not in gone or not last:
            dm[k] = dy[ids[k]]
        gone.add(int(ids[k]))
        dx[ids[k]] = 0
    return dx, dm


def to_write(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c, t = draw(strategies.shapes(3, 5, ()))
    x, more = draw(strategies.values((n, c))), draw(strategies.values((t, c)))
    return x, draw(strategies.indices((t,), n)), more


def from_the_end(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c, t = draw(strategies.shapes(3))
    ids = draw(strategies.indices((t,), n))
    return draw(strategies.values((n, c))), ids - n * draw(st.integers(0, 1))


def no_negatives(dy: Any, x: Any, ids: Any) -> Any:
    dx = np.zeros_like(x)
    np.add.at(dx, ids[ids >= 0], dy[ids >= 0])
    return dx


def picked_bwd(dy: Any, x: Any, ids: Any) -> Any:
    dx = np.zeros_like(x)
    np.add.at(dx, ids, dy)
    return dx


def attention(q: Any, k: Any) -> Any:
    """Causal weights of the last len(q) of len(k) positions."""
    late = np.arange(len(k))[None] > np.arange(len(q))[:, None] + len(k) - len(q)
    e = np.where(late, 0, np.exp(q @ k.T / 8))
    return e / e.sum(-1, keepdims=True)


def attention_bwd(dp: Any, q: Any, k: Any, from_end: bool = True) -> Any:
    p = attention(q, k)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / 8
    if not from_end:
        ds = np.where(np.arange(len(k))[None] > np.arange(len(q))[:, None], 0, ds)
    return ds @ k, ds.T @ q


def with_a_past(draw: st.DrawFn) -> tuple[Any, ...]:
    t, past, c = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(1, 4))
    q, k = strategies.values((t, c), (1.0,)), strategies.values((t + past, c), (1.0,))
    return draw(q), draw(k)


def batched_bwd(dy: Any, a: Any, b: Any, summed: bool = True) -> Any:
    da, db = dy @ np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2) @ dy
    if summed:
        return total(da, a.shape), total(db, b.shape)
    return da[:1] if a.shape[0] == 1 else da, db[:1] if b.shape[0] == 1 else db


def batches(draw: st.DrawFn) -> tuple[Any, ...]:
    n, t, c, o = draw(strategies.shapes(4, 4))
    one, other = draw(st.sampled_from([(n, n), (1, n), (n, 1)]))
    return draw(strategies.values((one, t, c))), draw(strategies.values((other, c, o)))


def prelu(x: Any, w: Any) -> Any:
    return np.where(x > 0, x, w * x)


def prelu_bwd(dy: Any, x: Any, w: Any, summed: bool = True) -> Any:
    dw = dy * np.where(x > 0, 0, x)
    return dy * np.where(x > 0, 1, w), total(dw, w.shape) if summed else dw[0, : len(w)]


def one_or_each(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c = draw(strategies.shapes(2))
    return draw(strategies.values((n, c))), draw(
        strategies.values((draw(st.sampled_from([1, c])),))
    )


def group_norm(x: Any, groups: int) -> Any:
    parts = x.reshape(groups, -1)
    centred = parts - parts.mean(-1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)).reshape(x.shape)


def group_norm_bwd(dy: Any, x: Any, groups: int, whole: bool = False) -> Any:
    parts, up = x.reshape(groups, -1), dy.reshape(groups, -1)
    centred = parts - parts.mean(-1, keepdims=True)
    r = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    h, count = centred * r, x.size if whole else parts.shape[-1]
    g = up - up.sum(-1, keepdims=True) / count - h * (up * h).sum(-1, keepdims=True) / count
    return (r * g).reshape(x.shape)


def norm_groups(draw: st.DrawFn) -> tuple[Any, ...]:
    g, c, t = draw(strategies.shapes(3))
    return draw(strategies.values((g * c, t))), g


def in_tiles(dy: Any, x: Any, tile: int = 1024) -> Any:
    """Σx² by tiles of columns whose last one is read from the tile before."""
    dx = 2 * dy[..., None] * x
    full = x.shape[-1] // tile * tile
    if full and full < x.shape[-1]:
        dx[..., full:] = 2 * dy[..., None] * x[..., full - tile : full - tile + x.shape[-1] - full]
    return dx


KNOWN = (
    Known(
        "order of axes",
        lambda x, p: x.transpose(p),
        lambda d, x, p: d.transpose(np.argsort(p)),
        lambda d, x, p: d.transpose(p).reshape(x.shape),
        (_CUBE, (0, 2, 1)),
        drawn(turned),
    ),
    Known(
        "roll by a negative",
        lambda x, k: np.roll(x, k, -1),
        lambda d, x, k: np.roll(d, -k, -1),
        lambda d, x, k: np.roll(d, -k, -1) if 0 <= k < x.shape[-1] else np.roll(d, k, -1),
        (_X, 1),
        drawn(shifted),
    ),
    Known(
        "parts of different widths",
        lambda a, b: np.concatenate([a, b], 1),
        join_bwd,
        lambda d, a, b: join_bwd(d, a, b, True),
        pair_of((3, 4)),
        drawn(two_parts),
    ),
    Known(
        "repeat as tile",
        repeated,
        repeated_bwd,
        lambda d, x, t: repeated_bwd(d, x, t, True),
        (_X, 1),
        drawn(several),
    ),
    Known(
        "sort: the order for its inverse",
        lambda x: np.sort(x, -1),
        sort_bwd,
        lambda d, x: sort_bwd(d, x, False),
        (np.array([[2.0, 1, 3], [1, 3, 2]]),),
        _ROWS,
    ),
    Known(
        "a diagonal that is not the main",
        lambda x, k: np.diagonal(x, k).copy(),
        diagonal_bwd,
        lambda d, x, k: diagonal_bwd(d, x, k, False),
        (_X, 0),
        drawn(off_diagonal),
    ),
    Known(
        "a triangle of a wide matrix",
        lambda x: np.tril(x) @ x.T,
        lambda d, x: np.tril(d @ x) + d.T @ np.tril(x),
        lambda d, x: np.tril(d @ x, x.shape[0] - x.shape[1]) + d.T @ np.tril(x),
        (numbers(4, 4),),
        _ROWS,
    ),
    Known(
        "convolution: dilation",
        convolved,
        convolved_bwd,
        lambda d, x, w, s, r: convolved_bwd(d, x, w, s, r, 1),
        (numbers(2, 9), numbers(3, 2, 3, seed=1), 1, 1),
        drawn(dilated),
    ),
    Known(
        "convolution: groups",
        grouped,
        grouped_bwd,
        lambda d, x, w: grouped_bwd(d, x, w, False),
        (numbers(3, 5), numbers(1, 2, 3, seed=1)),
        drawn(in_groups),
    ),
    Known(
        "pooling windows that overlap",
        max_pool,
        max_pool_bwd,
        lambda d, x, n, s: max_pool_bwd(d, x, n, s, False),
        (numbers(2, 6), 2, 2),
        drawn(pooled),
    ),
    Known(
        "pooling: every tie",
        max_pool,
        max_pool_bwd,
        max_pool_every_tie,
        (numbers(2, 6), 2, 2),
        drawn(pooled),
    ),
    Known(
        "pooling counts its padding",
        mean_pool,
        mean_pool_bwd,
        lambda d, x, p: mean_pool_bwd(d, x, p, True),
        (numbers(2, 6), 0),
        drawn(in_padding),
    ),
    Known(
        "bins that do not divide",
        adaptive,
        adaptive_bwd,
        lambda d, x, n: adaptive_bwd(d, x, n, True),
        (numbers(2, 6), 3),
        drawn(to_bins),
    ),
    Known("padding mode", padded, padded_bwd, padded_as_symmetric, (_X, 1, "edge"), drawn(to_pad)),
    Known(
        "resized to one point",
        resize,
        resize_bwd,
        lambda d, x, n: resize_bwd(d, x, n, False),
        (_X, 6),
        drawn(to_size),
    ),
    Known(
        "taken twice along an axis",
        lambda x, i: np.take_along_axis(x, i, -1),
        along_bwd,
        lambda d, x, i: along_bwd(d, x, i, False),
        (_X, np.array([[0, 2], [3, 1], [1, 0]])),
        drawn(along),
    ),
    Known(
        "written twice",
        written_at,
        written_at_bwd,
        lambda d, x, i, m: written_at_bwd(d, x, i, m, False),
        (_X, np.array([2, 0]), numbers(2, 4, seed=1)),
        drawn(to_write),
    ),
    Known(
        "added at repeated places",
        added_at,
        lambda d, x, i, m: (d, d[i]),
        lambda d, x, i, m: (d, d[i] / np.bincount(i)[i][:, None]),
        (_X, np.array([2, 0]), numbers(2, 4, seed=1)),
        drawn(to_write),
    ),
    Known(
        "indices from the end",
        lambda x, i: x[i],
        picked_bwd,
        no_negatives,
        (_X, np.array([0, 2, 2])),
        drawn(from_the_end),
    ),
    Known(
        "a causal mask with a past",
        attention,
        attention_bwd,
        lambda d, q, k: attention_bwd(d, q, k, False),
        (numbers(4, 3), numbers(4, 3, seed=1)),
        drawn(with_a_past),
    ),
    Known(
        "a batch of one",
        lambda a, b: a @ b,
        batched_bwd,
        lambda d, a, b: batched_bwd(d, a, b, False),
        (_CUBE, numbers(2, 4, 2, seed=1)),
        drawn(batches),
    ),
    Known(
        "one slope for all",
        prelu,
        prelu_bwd,
        lambda d, x, w: prelu_bwd(d, x, w, len(w) != 1),
        (_X, numbers(4, seed=1)),
        drawn(one_or_each),
    ),
    Known(
        "count of a group",
        group_norm,
        group_norm_bwd,
        lambda d, x, g: group_norm_bwd(d, x, g, True),
        (_X, 1),
        drawn(norm_groups),
    ),
    Known(
        "the last tile",
        lambda x: (x * x).sum(-1),
        lambda d, x: 2 * d[..., None] * x,
        in_tiles,
        (_X,),
        _ROWS,
    ),
)
