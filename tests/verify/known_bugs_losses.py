"""Mistakes of losses, in what is counted, ignored or weighed; and of state, dtype and containers."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from known_bugs import Known, drawn, numbers, soft
from scipy import special

from mesp_ref.verify import strategies
from mesp_ref.verify.drawn import arguments

_X, _IDS = numbers(3, 4), np.array([1, 3, 0])
_ROWS = arguments("n c")
IGNORED = -100


def log_soft(x: Any) -> Any:
    return x - special.logsumexp(x, axis=-1, keepdims=True)


def cross(x: Any, ids: Any) -> Any:
    """The mean over the labels that count; 0 where none does."""
    kept = ids != IGNORED
    each = -log_soft(x)[np.arange(len(x)), np.where(kept, ids, 0)]
    return (each * kept).sum() / max(kept.sum(), 1)


def cross_bwd(dy: Any, x: Any, ids: Any, over: int = 0, mask: bool = True) -> Any:
    kept = ids != IGNORED
    g = soft(x)
    g[np.arange(len(x)), np.where(kept, ids, 0)] -= 1
    return dy * g * (kept[:, None] if mask else 1) / (over or max(kept.sum(), 1))


def labelled(draw: st.DrawFn) -> tuple[Any, ...]:
    n, v = draw(strategies.shapes(2))
    return draw(strategies.values((n, v))), draw(strategies.labels((n,), v))


def weighted(x: Any, ids: Any, w: Any) -> Any:
    each = -log_soft(x)[np.arange(len(x)), ids]
    return (each * w[ids]).sum() / w[ids].sum()


def weighted_bwd(dy: Any, x: Any, ids: Any, w: Any, by_weight: bool = True) -> Any:
    g = soft(x)
    g[np.arange(len(x)), ids] -= 1
    dx = dy * g * w[ids][:, None] / (w[ids].sum() if by_weight else len(x))
    each = -log_soft(x)[np.arange(len(x)), ids]
    dw = np.zeros_like(w)
    np.add.at(dw, ids, dy * (each - weighted(x, ids, w)) / w[ids].sum())
    return dx, dw


def with_weights(draw: st.DrawFn) -> tuple[Any, ...]:
    n, v = draw(strategies.shapes(2))
    weights = np.abs(draw(strategies.values((v,), (1.0,)))) + 0.1
    return draw(strategies.values((n, v))), draw(strategies.indices((n,), v)), weights


def smoothed(x: Any, ids: Any, share: float) -> Any:
    kept = ids != IGNORED
    low = log_soft(x)
    each = -(1 - share) * low[np.arange(len(x)), np.where(kept, ids, 0)] - share * low.mean(-1)
    return (each * kept).sum()


def smoothed_bwd(dy: Any, x: Any, ids: Any, share: float, mask: bool = True) -> Any:
    kept = (ids != IGNORED)[:, None]
    one = np.zeros_like(x)
    one[np.arange(len(x)), np.where(kept[:, 0], ids, 0)] = 1
    hard, spread = (1 - share) * (soft(x) - one), share * (soft(x) - 1 / x.shape[-1])
    return dy * (hard * kept + spread * (kept if mask else 1))


def smoothing(draw: st.DrawFn) -> tuple[Any, ...]:
    return (*labelled(draw), draw(st.sampled_from([0.1, 0.0, 0.5])))


def reduced(x: Any, t: Any, how: str) -> Any:
    each = (x - t) ** 2
    return {"mean": each.mean, "sum": each.sum, "batchmean": lambda: each.sum() / len(x)}[how]()


def reduced_bwd(dy: Any, x: Any, t: Any, how: str) -> Any:
    g = dy * 2 * (x - t) / {"mean": x.size, "sum": 1, "batchmean": len(x)}[how]
    return g, -g


def reductions(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    how = draw(st.sampled_from(["mean", "sum", "batchmean"]))
    return draw(strategies.values(shape)), draw(strategies.values(shape)), how


def with_logits(x: Any, t: Any, more: float) -> Any:
    """Binary cross entropy of logits, the positive ones `more` times."""
    return more * t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)


def with_logits_bwd(dy: Any, x: Any, t: Any, more: float) -> Any:
    return dy * ((1 - t) * special.expit(x) - more * t * special.expit(-x))


def binary(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    t = draw(strategies.masks(shape)).astype(bool)
    return draw(strategies.values(shape)), t, draw(st.sampled_from([1.0, 3.0]))


def hinge(x: Any, sign: Any) -> Any:
    return np.maximum(1 - x * sign, 0)


def signed(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    return draw(strategies.values(shape)), np.where(draw(strategies.masks(shape)), 1, -1)


def gaussian(m: Any, t: Any, var: Any) -> Any:
    v = np.maximum(var, 1e-2)
    return 0.5 * (np.log(v) + (m - t) ** 2 / v)


def gaussian_bwd(dy: Any, m: Any, t: Any, var: Any, held: bool = True) -> Any:
    v = np.maximum(var, 1e-2)
    g = dy * (m - t) / v
    dv = dy * 0.5 * (1 / v - (m - t) ** 2 / v**2)
    return g, -g, dv * (var > 1e-2) if held else dv


def variances(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(1))
    m, t, v = (draw(strategies.values(shape, (1.0,))) for _ in range(3))
    return m, t, np.abs(v)


def divergence(log_q: Any, p: Any) -> Any:
    """Σ p·(log p − log q), 0·log 0 = 0."""
    return (special.xlogy(p, p) - p * log_q).sum(-1)


def lookup(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c, t = draw(strategies.shapes(3))
    return draw(strategies.values((n, c))), draw(strategies.indices((t,), n))


_sums: list[Any] = []


def accumulating(dy: Any, x: Any, ids: Any) -> Any:
    """The buffer of the last call is not cleared."""
    dx = _sums.pop() if _sums and _sums[-1].shape == x.shape else np.zeros_like(x)
    np.add.at(dx, ids, dy)
    _sums[:] = [dx.copy()]
    return dx


def lookup_bwd(dy: Any, x: Any, ids: Any) -> Any:
    dx = np.zeros_like(x)
    np.add.at(dx, ids, dy)
    return dx


_shapes: list[tuple[int, ...]] = []


def planned(dy: Any, x: Any) -> Any:
    """A plan made for the first shape it saw: longer rows are cut there."""
    if not _shapes:
        _shapes.append(x.shape)
    dx = 2 * dy * x
    dx[..., _shapes[0][-1] :] = 0
    return dx


def in_single(dy: Any, x: Any) -> Any:
    return (dy.astype(np.float32) * (1 - np.tanh(x.astype(np.float32)) ** 2)).astype(x.dtype)


def normalised(x: Any, eps: float) -> Any:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def normalised_bwd(dy: Any, x: Any, eps: float) -> Any:
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return r * (dy - x * r * r * (dy * x).mean(-1, keepdims=True))


def moments(x: Any) -> Any:
    m = x.mean(0)
    return m, ((x - m) ** 2).mean(0)


def moments_bwd(d: Any, x: Any) -> Any:
    return (d[0] + 2 * d[1] * (x - x.mean(0))) / len(x)


def split(x: Any) -> Any:
    return {"even": 2 * x[..., ::2], "odd": x[..., 1::2] ** 2}


def split_bwd(d: Any, x: Any) -> Any:
    dx = np.zeros_like(x)
    dx[..., ::2], dx[..., 1::2] = 2 * d["even"], 2 * d["odd"] * x[..., 1::2]
    return dx


def split_if_used(d: Any, x: Any) -> Any:
    """Forgets the one output where the other has no cotangent."""
    return split_bwd(d, x) if d["even"].any() else np.zeros_like(x)


def quantile(y: Any, t: Any, q: float) -> Any:
    return np.maximum(q * (t - y), (q - 1) * (t - y))


def quantile_bwd(dy: Any, y: Any, t: Any, q: float) -> Any:
    g = dy * np.where(t > y, -q, 1 - q)
    return g, -g


def quantiles(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(1))
    return (draw(strategies.values(shape)), draw(strategies.values(shape)),
            draw(st.sampled_from([0.5, 0.1, 0.9])))  # fmt: skip


def triplet(a: Any, p: Any, n: Any) -> Any:
    return np.maximum(((a - p) ** 2).sum(-1) - ((a - n) ** 2).sum(-1) + 1, 0)


def triplet_bwd(dy: Any, a: Any, p: Any, n: Any, only: bool = True) -> Any:
    on = (dy * (triplet(a, p, n) > 0) if only else dy)[..., None]
    return 2 * on * (n - p), 2 * on * (p - a), 2 * on * (a - n)


def three(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    return tuple(draw(strategies.values(shape)) for _ in range(3))


def no_quantile(dy: Any, y: Any, t: Any, q: float) -> Any:
    g = dy * np.where(t > y, -0.5, 0.5)
    return g, -g


KNOWN = (
    Known(
        "ignored labels are counted",
        cross,
        cross_bwd,
        lambda d, x, i: cross_bwd(d, x, i, len(x)),
        (_X, _IDS),
        drawn(labelled),
    ),
    Known(
        "ignored labels are learned",
        cross,
        cross_bwd,
        lambda d, x, i: cross_bwd(d, x, i, 0, False),
        (_X, _IDS),
        drawn(labelled),
    ),
    Known(
        "class weights: the mean",
        weighted,
        weighted_bwd,
        lambda d, x, i, w: weighted_bwd(d, x, i, w, False),
        (_X, _IDS, np.ones(4)),
        drawn(with_weights),
    ),
    Known(
        "smoothing of ignored labels",
        smoothed,
        smoothed_bwd,
        lambda d, x, i, s: smoothed_bwd(d, x, i, s, False),
        (_X, _IDS, 0.1),
        drawn(smoothing),
    ),
    Known(
        "reduction",
        reduced,
        reduced_bwd,
        lambda d, x, t, how: reduced_bwd(d, x, t, "mean" if how == "batchmean" else how),
        (_X, numbers(3, 4, seed=1), "mean"),
        drawn(reductions),
    ),
    Known(
        "weight of the positive",
        with_logits,
        with_logits_bwd,
        lambda d, x, t, m: d * (special.expit(x) - t),
        (_X, _X > 0.3, 1.0),
        drawn(binary),
    ),
    Known(
        "hinge past its margin",
        hinge,
        lambda d, x, s: -d * s * (x * s < 1),
        lambda d, x, s: -d * s,
        (np.tanh(_X), np.where(_X > 0.3, 1, -1)),
        drawn(signed),
    ),
    Known(
        "a variance that is held",
        gaussian,
        gaussian_bwd,
        lambda d, m, t, v: gaussian_bwd(d, m, t, v, False),
        (numbers(4), numbers(4, seed=1), np.abs(numbers(4, seed=2)) + 0.1),
        drawn(variances),
    ),
    Known(
        "divergence from nothing",
        divergence,
        lambda d, q, p: (-d[..., None] * p, d[..., None] * (np.log(p) + 1 - q)),
        lambda d, q, p: (-d[..., None] * p, d[..., None] * (np.log(p) - q)),
        (_X, np.abs(numbers(3, 4, seed=1)) + 0.1),
        drawn(lambda draw: (lambda a: (a[0], np.abs(a[1]) + 0.05))(three(draw))),
    ),
    Known(
        "a buffer that is not cleared",
        lambda x, i: x[i],
        lookup_bwd,
        accumulating,
        (_X, np.array([0, 2])),
        drawn(lookup),
    ),
    Known(
        "a plan for another shape", lambda x: x * x, lambda d, x: 2 * d * x, planned, (_X,), _ROWS
    ),
    Known(
        "float32 inside", np.tanh, lambda d, x: d * (1 - np.tanh(x) ** 2), in_single, (_X,), _ROWS
    ),
    Known(
        "eps of the default",
        normalised,
        normalised_bwd,
        lambda d, x, e: normalised_bwd(d, x, 1e-6),
        (_X, 1e-6),
        drawn(
            lambda draw: (
                draw(strategies.values(draw(strategies.shapes(2)))),
                draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
            )
        ),
    ),
    Known(
        "the second moment's mean",
        moments,
        moments_bwd,
        lambda d, x: (d[0] + 2 * d[1] * x) / len(x),
        (_X,),
        _ROWS,
    ),
    Known("an output without cotangent", split, split_bwd, split_if_used, (_X,), _ROWS),
    Known(
        "quantile",
        quantile,
        quantile_bwd,
        no_quantile,
        (numbers(4), numbers(4, seed=1), 0.5),
        drawn(quantiles),
    ),
    Known(
        "inside the margin",
        triplet,
        triplet_bwd,
        lambda d, a, p, n: triplet_bwd(d, a, p, n, False),
        (_X / 9, numbers(3, 4, seed=1) / 9, numbers(3, 4, seed=2) / 9),
        drawn(three),
    ),
)
