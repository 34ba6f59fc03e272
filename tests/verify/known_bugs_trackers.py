"""Twenty-five more kinds from public trackers, written before the checker was asked about any."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from known_bugs import Known, numbers, quiet, soft

from mesp_ref.verify import strategies

_X = numbers(3, 4)


def distances(x: Any, y: Any, p: int) -> Any:
    return (np.abs(x[:, None] - y[None]) ** p).sum(-1) ** (1 / p)


def distances_bwd(d: Any, x: Any, y: Any, p: int, used: int | None = None) -> Any:
    """FlagGems issue 5023: the gradient is that of p = 2 for every p."""
    q = used or p
    off, far = x[:, None] - y[None], distances(x, y, p)[..., None]
    near = np.where(far == 0, 1, far)
    each = np.where(far == 0, 0, d[..., None] * np.sign(off) * (np.abs(off) / near) ** (q - 1))
    return each.sum(1), -each.sum(0)


@st.composite
def two_clouds(draw: st.DrawFn) -> tuple[Any, ...]:
    n, m, c = draw(strategies.shapes(3, largest=4))
    ordinary = [draw(strategies.values(s, scales=(1.0,))) for s in ((n, c), (m, c))]
    return (*ordinary, draw(st.sampled_from([2, 1, 3])))


def sampled(image: Any, at: Any) -> Any:
    """Linear interpolation, the border repeated; at in −1…1."""
    where = np.clip((at + 1) / 2 * (len(image) - 1), 0, len(image) - 1)
    low = np.minimum(np.floor(where.real).astype(int), max(len(image) - 2, 0))
    part = where - low
    return image[low] * (1 - part) + image[np.minimum(low + 1, len(image) - 1)] * part


def sampled_bwd(d: Any, image: Any, at: Any, beyond: bool = False) -> Any:
    """PyTorch issue 23925: on the far border the next pixel counts as 0."""
    n, di = len(image), np.zeros_like(image)
    raw = (at + 1) / 2 * (n - 1)
    where = np.clip(raw, 0, n - 1)
    low = np.minimum(np.floor(where).astype(int), max(n - 2, 0))
    high = np.minimum(low + 1, n - 1)
    np.add.at(di, low, d * (1 - (where - low)))
    np.add.at(di, high, d * (where - low))
    slope = image[high] - image[low]
    if beyond:
        slope = np.where(raw == n - 1, -image[n - 1], slope)
    return di, d * slope * (n - 1) / 2 * ((raw >= 0) & (raw <= n - 1))


@st.composite
def image_and_places(draw: st.DrawFn) -> tuple[Any, ...]:
    n, t = draw(strategies.shapes(2))
    image = draw(strategies.values((n + 1,), scales=(1.0,)))
    return image, np.clip(draw(strategies.values((t,), scales=(1.0,))), -1, 1)


def clipped_rows_bwd(d: Any, w: Any, ids: Any, wrap: bool = False) -> Any:
    """MXNet issue 19817: indices out of range are clipped forward and not backward."""
    dw = np.zeros_like(w)
    np.add.at(dw, ids % len(w) if wrap else np.clip(ids, 0, len(w) - 1), d)
    return dw


@st.composite
def rows_out_of_range(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c, t = draw(strategies.shapes(3))
    ids = draw(strategies.generators()).integers(-2, n + 2, t)
    return draw(strategies.values((n, c))), ids


def dilated(x: Any, w: Any, gap: int) -> Any:
    wide = np.pad(x, gap)
    return sum(w[k] * wide[k * gap : k * gap + len(x)] for k in range(3))


def dilated_bwd(d: Any, x: Any, w: Any, gap: int, racing: bool = False) -> Any:
    """cherimoya issue 25: lanes load, add and store the same dx; the last store wins."""
    n, wide = len(x), np.pad(x, gap)
    dw = np.array([(d * wide[k * gap : k * gap + n]).sum() for k in range(3)])
    dx = np.zeros(n + 2 * gap, x.dtype)
    places = np.concatenate([np.arange(n) + k * gap for k in range(3)])
    terms = np.concatenate([d * w[k] for k in range(3)])
    if racing:
        dx[places] += terms
    else:
        np.add.at(dx, places, terms)
    return dx[gap : gap + n], dw.astype(w.dtype)


@st.composite
def signal_and_gap(draw: st.DrawFn) -> tuple[Any, ...]:
    (n,) = draw(strategies.shapes(1))
    return draw(strategies.values((n,))), draw(strategies.values((3,))), draw(st.integers(1, 3))


def flagged(q: Any, k: Any, v: Any, causal: bool) -> Any:
    s = q @ k.T / q.shape[1] ** 0.5
    return soft(np.where(np.tri(len(q), dtype=bool), s, -np.inf) if causal else s) @ v


def flagged_bwd(do: Any, q: Any, k: Any, v: Any, causal: bool, always: bool = False) -> Any:
    """Triton issue 5660: the backward begins at the diagonal though the forward is not causal."""
    scale = q.shape[1] ** -0.5
    s = q @ k.T * scale
    p = soft(np.where(np.tri(len(q), dtype=bool), s, -np.inf) if causal else s)
    p = p * np.tri(len(q)) if always else p
    dp = do @ v.T
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, p.T @ do


@st.composite
def heads_and_flag(draw: st.DrawFn) -> tuple[Any, ...]:
    t, c = draw(strategies.shapes(2, largest=4))
    qkv = [draw(strategies.values((t, c), scales=(1.0,))) for _ in range(3)]
    return (*qkv, draw(st.booleans()))


def soft_targets(x: Any, p: Any) -> Any:
    top = x.max(-1, keepdims=True)
    return (p * (np.log(np.exp(x - top).sum(-1, keepdims=True)) + top - x)).sum(-1)


def soft_targets_bwd(d: Any, x: Any, p: Any, summed: bool = False) -> Any:
    """NeMo Automodel pull request 2428: the gradient takes for granted that targets sum to 1."""
    top = x.max(-1, keepdims=True)
    log = x - np.log(np.exp(x - top).sum(-1, keepdims=True)) - top
    total = 1 if summed else p.sum(-1, keepdims=True)
    return d[..., None] * (total * soft(x) - p), -d[..., None] * log


@st.composite
def logits_and_targets(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    return draw(strategies.values(shape)), np.abs(draw(strategies.values(shape, scales=(1.0,))))


def tanh_by_exp(d: Any, x: Any) -> Any:
    """JAX issue 764: the slope of tanh as a quotient of exponentials is NaN from 355 on."""
    e = np.exp(2 * x)
    return d * 4 * e / (e + 1) ** 2


def softplus_by_abs(d: Any, x: Any) -> Any:
    """JAX issue 2107: max(x, 0) + log1p(exp(−|x|)) differentiated term by term gives 0 at 0."""
    return d * ((x > 0) - np.sign(x) * np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def kept_rows_bwd(d: Any, x: Any, keep: Any, first: bool = False) -> Any:
    """MXNet pull request 15175: the rows of a boolean mask get the gradients of others."""
    dx = np.zeros_like(x)
    if first:
        dx[: len(d)] = d
    else:
        dx[keep] = d
    return dx


@st.composite
def rows_and_keep(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c = draw(strategies.shapes(2))
    return draw(strategies.values((n, c))), draw(strategies.masks((n,)))


def batched(a: Any, b: Any) -> Any:
    return np.einsum("bij,bjc->bic", a, b)


def batched_bwd(d: Any, a: Any, b: Any, squeezed: bool = False) -> Any:
    """MXNet issue 18102: axes of length 1 are dropped on the way back, and others take their place."""
    da, db = np.einsum("bic,bjc->bij", d, b), np.einsum("bij,bic->bjc", a, d)
    if squeezed and 1 in a.shape and a.shape[1] > 1:
        da = np.broadcast_to(da.mean(axis=1, keepdims=True), da.shape).copy()
    return da, db


@st.composite
def two_batches(draw: st.DrawFn) -> tuple[Any, ...]:
    b, i, j, c = draw(strategies.shapes(4))
    return draw(strategies.values((b, i, j))), draw(strategies.values((b, j, c)))


def variance_of_known(x: Any) -> Any:
    seen = ~np.isnan(x.real)
    n = np.maximum(seen.sum(-1, keepdims=True), 1)
    centred = np.where(seen, x, 0) - np.where(seen, x, 0).sum(-1, keepdims=True) / n
    return (np.where(seen, centred * centred, 0).sum(-1, keepdims=True) / n)[..., 0]


def variance_of_known_bwd(d: Any, x: Any, every: bool = False) -> Any:
    """JAX pull request 8140: nanvar divides by the length, missing numbers counted in."""
    seen = ~np.isnan(x)
    n = np.maximum(seen.sum(-1, keepdims=True), 1)
    centred = np.where(seen, x, 0) - np.where(seen, x, 0).sum(-1, keepdims=True) / n
    return 2 * d[..., None] * np.where(seen, centred, 0) / (x.shape[-1] if every else n)


@st.composite
def some_missing(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    x = draw(strategies.values(shape, scales=(1.0,)))
    return (np.where(draw(strategies.masks(shape)), x, np.nan),)


def bags(w: Any, ids: Any) -> Any:
    """The mean of a bag's rows; id 0 is padding."""
    real = ids != 0
    n = np.maximum(real.sum(1), 1)
    return (w[ids] * real[..., None]).sum(1) / n[:, None]


def bags_bwd(d: Any, w: Any, ids: Any, padded: bool = False) -> Any:
    """PyTorch's embedding_bag with padding_idx: the mean is over the padded length."""
    real, dw = ids != 0, np.zeros_like(w)
    n = np.full(len(ids), ids.shape[1]) if padded else np.maximum(real.sum(1), 1)
    np.add.at(dw, ids, (d / n[:, None])[:, None] * real[..., None])
    return dw


@st.composite
def table_and_bags(draw: st.DrawFn) -> tuple[Any, ...]:
    v, c, n, length = draw(strategies.shapes(4))
    ids = draw(strategies.generators()).integers(0, v + 1, (n, length))
    return draw(strategies.values((v + 1, c))), ids


def running_lse(x: Any) -> Any:
    return np.logaddexp.accumulate(x, -1)


def running_lse_bwd(d: Any, x: Any, bare: bool = False) -> Any:
    """PyTorch's logcumsumexp: sums of dy·exp(−y) leave the range that exp(x) brings back."""
    y = running_lse(x)
    if bare:
        return np.exp(x) * (d * np.exp(-y))[..., ::-1].cumsum(-1)[..., ::-1]
    dx = np.zeros_like(x)
    for i in range(x.shape[-1]):
        dx[..., i] = (d[..., i:] * np.exp(x[..., i : i + 1] - y[..., i:])).sum(-1)
    return dx


def rolled_bwd(d: Any, x: Any, axis: int, start: int, early: bool = False) -> Any:
    """Chainer's rollaxis: the way back is one off where the axis moved to the right."""
    if early:
        return np.rollaxis(d, start, axis).copy()
    if start > axis:
        return np.rollaxis(d, start - 1, axis).copy()
    return np.rollaxis(d, start, axis + 1).copy()


@st.composite
def axis_and_start(draw: st.DrawFn) -> tuple[Any, ...]:
    x = draw(strategies.values(draw(strategies.shapes(3, largest=3))))
    return x, draw(st.integers(0, 2)), draw(st.integers(0, 3))


def padded_bwd(d: Any, x: Any, before: int, after: int, negative: bool = False) -> Any:
    """Of many: dy[before:-after] is empty where nothing was padded after."""
    if negative:
        dx = d[..., before:-after]
        return np.resize(dx, x.shape) if dx.size else np.zeros_like(x)
    return d[..., before : before + x.shape[-1]].copy()


@st.composite
def padding(draw: st.DrawFn) -> tuple[Any, ...]:
    x = draw(strategies.values(draw(strategies.shapes(2))))
    return x, draw(st.integers(0, 3)), draw(st.integers(0, 3))


def turned(x: Any, lengths: Any) -> Any:
    out = x.copy()
    for row, n in zip(out, lengths, strict=True):
        row[:n] = row[:n][::-1]
    return out


@st.composite
def rows_and_lengths(draw: st.DrawFn) -> tuple[Any, ...]:
    n, t = draw(strategies.shapes(2))
    return draw(strategies.values((n, t))), draw(strategies.generators()).integers(0, t + 1, n)


def unit(x: Any, least: float = 1e-3) -> Any:
    n = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / np.where(n.real > least, n, least)


def unit_bwd(d: Any, x: Any, always: bool = False, least: float = 1e-3) -> Any:
    """Of F.normalize: below eps the norm is a constant, the gradient still projects."""
    n = np.sqrt((x * x).sum(-1, keepdims=True))
    safe = np.maximum(n, least)
    inside = np.ones_like(n, bool) if always else n > least
    return d / safe - inside * x * (d * x).sum(-1, keepdims=True) / safe / safe**2


def dropped(x: Any, keep: Any, p: float) -> Any:
    return x * keep / (1 - p) if p < 1 else 0 * x


@st.composite
def chances(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    p = draw(st.sampled_from([0.5, 0.0, 1.0, 0.9]))
    keep = draw(strategies.generators()).random(shape) >= p
    return draw(strategies.values(shape)), keep, p


def arc(x: Any, edge: float = 1 - 1e-6) -> Any:
    return np.arccos(np.where(np.abs(x.real) > edge, np.sign(x.real) * edge, x))


def arc_bwd(d: Any, x: Any, all_of_it: bool = False, edge: float = 1 - 1e-6) -> Any:
    """Of angles between unit vectors: the cosine is clipped, its gradient is not."""
    cut = np.clip(x, -edge, edge)
    return -d / np.sqrt(1 - cut * cut) * (all_of_it | (np.abs(x) <= edge))


def masked_by(x: Any, seed: int) -> Any:
    return x * (np.random.default_rng(seed).random(x.shape) < 0.5) * 2


def masked_anew(d: Any, x: Any, seed: int) -> Any:
    """Checkpointing that does not restore the generator: another mask than the forward's."""
    return d * (np.random.default_rng().random(x.shape) < 0.5) * 2


@st.composite
def numbers_and_seed(draw: st.DrawFn) -> tuple[Any, ...]:
    return draw(strategies.values(draw(strategies.shapes(2)))), draw(st.integers(0, 9))


_WORKSPACE: dict[Any, Any] = {}


def into_workspace(d: Any, x: Any) -> Any:
    """A result in a buffer that the next call of this shape writes over."""
    buffer = _WORKSPACE.setdefault((x.shape, x.dtype), np.empty_like(x))
    buffer[...] = d * (1 - np.tanh(x) ** 2)
    return buffer


def nll(x: Any, labels: Any, ignored: int) -> Any:
    top = x.max(-1, keepdims=True)
    counted = labels != ignored
    log = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
    picked = np.take_along_axis(log, np.where(counted, labels, 0)[:, None], 1)[:, 0]
    return -np.where(counted, picked, 0)


def nll_bwd(d: Any, x: Any, labels: Any, ignored: int) -> Any:
    counted = (labels != ignored)[:, None]
    hot = np.arange(x.shape[1]) == np.where(counted, labels[:, None], 0)
    return d[:, None] * counted * (soft(x) - hot)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Any, ...]:
    n, v = draw(strategies.shapes(2))
    labels, ignored = draw(strategies.labels((n,), v)), draw(st.sampled_from([-100, -1]))
    return draw(strategies.values((n, v))), np.where(labels < 0, ignored, labels), ignored


def soft_along(x: Any, axis: int) -> Any:
    return np.moveaxis(soft(np.moveaxis(x, axis, -1)), -1, axis)


def soft_along_bwd(d: Any, x: Any, axis: int, summed: int | None = None) -> Any:
    """An attribute that the backward forgets: the sum is over the last axis whatever was asked."""
    y, at = soft_along(x, axis), axis if summed is None else summed
    return y * (d - (d * y).sum(axis=at, keepdims=True))


@st.composite
def numbers_and_axis(draw: st.DrawFn) -> tuple[Any, ...]:
    return draw(strategies.values(draw(strategies.shapes(2)))), draw(st.sampled_from([1, 0, -1]))


def leaky(x: Any, slope: float) -> Any:
    return np.where(x.real > 0, x, slope * x)


@st.composite
def numbers_and_slope(draw: st.DrawFn) -> tuple[Any, ...]:
    x = draw(strategies.values(draw(strategies.shapes(2))))
    return x, draw(st.sampled_from([0.01, 0.2, -0.5, 0.0]))


def product_bwd(d: Any, x: Any, one: bool = False) -> Any:
    """PyTorch's prod once: a zero gets the product of what is not zero, however many zeros there are."""
    if one:
        rest = np.where(x == 0, 1, x).prod(-1, keepdims=True)
        some = (x == 0).any(-1, keepdims=True)
        each = np.where(x == 0, rest, x.prod(-1, keepdims=True) / np.where(x == 0, 1, x))
        return d[..., None] * np.where(some & (x != 0), 0, each)
    dx = np.empty_like(x)
    for i in range(x.shape[-1]):
        dx[..., i] = d * np.delete(x, i, -1).prod(-1)
    return dx


def _rows(scales: tuple[float, ...] | None = None) -> Any:
    more = {} if scales is None else {"scales": scales}
    return strategies.values(strategies.shapes(2), **more).map(lambda x: (x,))


def _flag(function: Any, **set_wrong: Any) -> Any:
    return quiet(lambda *args: function(*args, **set_wrong))


KNOWN = (
    Known("distance: p forgotten", distances, distances_bwd, _flag(distances_bwd, used=2),
          (_X, numbers(2, 4, seed=1), 2), two_clouds()),
    Known("interpolation on the far border", sampled, sampled_bwd, _flag(sampled_bwd, beyond=True),
          (numbers(5), np.array([-0.7, 0.1, 0.64])), image_and_places()),
    Known("indices clipped forward only", lambda w, ids: w[np.clip(ids, 0, len(w) - 1)],
          clipped_rows_bwd, _flag(clipped_rows_bwd, wrap=True), (_X, np.array([0, 2, 1, 2])),
          rows_out_of_range()),
    Known("stores that race", dilated, dilated_bwd, _flag(dilated_bwd, racing=True),
          (numbers(7), numbers(3, seed=1), 2), signal_and_gap()),
    Known("causal though not asked", flagged, flagged_bwd, _flag(flagged_bwd, always=True),
          (numbers(4, 3), numbers(4, 3, seed=1), numbers(4, 3, seed=2), True), heads_and_flag()),
    Known("targets that do not sum to 1", soft_targets, soft_targets_bwd,
          _flag(soft_targets_bwd, summed=True), (_X, soft(numbers(3, 4, seed=1))),
          logits_and_targets()),
    Known("tanh by exponentials", np.tanh, lambda d, x: d * (1 - np.tanh(x) ** 2),
          quiet(tanh_by_exp), (_X,), _rows()),
    Known("softplus term by term", lambda x: np.logaddexp(x, 0),
          lambda d, x: d / (1 + np.exp(-np.clip(x, -700, 700))), quiet(softplus_by_abs), (_X,), _rows()),
    Known("rows of a mask", lambda x, keep: x[keep], kept_rows_bwd, _flag(kept_rows_bwd, first=True),
          (_X, np.array([True, True, False])), rows_and_keep()),
    Known("an axis of length 1", batched, batched_bwd, _flag(batched_bwd, squeezed=True),
          (numbers(2, 3, 4), numbers(2, 4, 2, seed=1)), two_batches()),
    Known("missing numbers counted", variance_of_known, variance_of_known_bwd,
          _flag(variance_of_known_bwd, every=True), (_X,), some_missing()),
    Known("the mean of a padded bag", bags, bags_bwd, _flag(bags_bwd, padded=True),
          (numbers(5, 3), np.array([[1, 2], [4, 3]])), table_and_bags()),
    Known("a running logsumexp", running_lse, running_lse_bwd, _flag(running_lse_bwd, bare=True),
          (_X,), _rows()),
    Known("an axis rolled to the right", lambda x, a, s: np.rollaxis(x, a, s).copy(), rolled_bwd,
          _flag(rolled_bwd, early=True), (numbers(2, 3, 4), 2, 0), axis_and_start()),
    Known("nothing padded after", lambda x, b, a: np.pad(x, ((0, 0), (b, a))), padded_bwd,
          _flag(padded_bwd, negative=True), (_X, 1, 2), padding()),
    Known("sequences of different lengths", turned, lambda d, x, n: turned(d, n),
          lambda d, x, n: d[:, ::-1].copy(), (_X, np.full(3, 4)), rows_and_lengths()),
    Known("a norm below its least", unit, unit_bwd, _flag(unit_bwd, always=True), (_X,), _rows()),
    Known("everything dropped", dropped, lambda d, x, k, p: dropped(d, k, p),
          quiet(lambda d, x, k, p: d * k / np.float64(1 - p)), (_X, _X > 0, 0.5), chances()),
    Known("an angle past its clip", arc, arc_bwd, _flag(arc_bwd, all_of_it=True), (np.tanh(_X),),
          _rows()),
    Known("another mask", masked_by, lambda d, x, s: masked_by(d, s), masked_anew, (_X, 3),
          numbers_and_seed()),
    Known("a buffer used again", np.tanh, lambda d, x: d * (1 - np.tanh(x) ** 2), into_workspace,
          (_X,), _rows()),
    Known("another label is ignored", nll, nll_bwd, lambda d, x, y, i: nll_bwd(d, x, y, -100),
          (_X, np.array([1, -100, 3]), -100), labelled()),
    Known("axis forgotten", soft_along, soft_along_bwd, _flag(soft_along_bwd, summed=-1), (_X, 1),
          numbers_and_axis()),
    Known("the sign of the result", leaky, lambda d, x, a: d * np.where(x > 0, 1, a),
          lambda d, x, a: d * np.where(leaky(x, a) > 0, 1, a), (_X, 0.01), numbers_and_slope()),
    Known("two zeros in a product", lambda x: x.prod(-1), product_bwd, _flag(product_bwd, one=True),
          (_X,), _rows((1.0,))),
)  # fmt: skip
