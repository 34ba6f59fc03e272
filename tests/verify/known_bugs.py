"""Small pairs with the kinds of mistakes that real backwards had: right and wrong, with a sample.

Kinds are known from public trackers; everything here is written anew and small. `wrong` is to be
rejected from the sample or from drawn examples, `right` never.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mesp_ref.verify import strategies
from mesp_ref.verify.drawn import arguments

Pairs = Callable[..., Any]


@dataclass(frozen=True)
class Known:
    """One kind of mistake."""

    kind: str
    forward: Pairs
    right: Pairs
    wrong: Pairs
    sample: tuple[Any, ...]
    examples: st.SearchStrategy[tuple[Any, ...]]
    wrong_forward: Pairs | None = None


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def quiet(function: Pairs) -> Pairs:
    """A wrong backward may divide by zero: its value is judged, not its warning."""

    def run(*args: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args)

    return run


def total(dy: Any, shape: tuple[int, ...]) -> Any:
    """Sum over whatever broadcasting had spread."""
    extra = dy.ndim - len(shape)
    dy = dy.sum(axis=tuple(range(extra))) if extra else dy
    ones = tuple(i for i, n in enumerate(shape) if n == 1 and dy.shape[i] != 1)
    return dy.sum(axis=ones, keepdims=True) if ones else dy


def others_product(x: Any) -> Any:
    """∏ of all others of the row, without dividing."""
    ones = np.ones_like(x[..., :1])
    before = np.cumprod(np.concatenate([ones, x[..., :-1]], -1), -1)
    after = np.cumprod(np.concatenate([ones, x[..., :0:-1]], -1), -1)[..., ::-1]
    return before * after


def cumprod_bwd(dy: Any, x: Any) -> Any:
    dx = np.zeros_like(x)
    for i in range(x.shape[-1]):
        rest = np.concatenate([x[..., :i], np.ones_like(x[..., :1]), x[..., i + 1 :]], -1)
        dx[..., i] = (dy * np.cumprod(rest, -1))[..., i:].sum(-1)
    return dx


def cumprod_by_division(dy: Any, x: Any) -> Any:
    flowing = (dy * np.cumprod(x, -1))[..., ::-1].cumsum(-1)[..., ::-1]
    return flowing / x


def soft(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def masked_mean(x: Any, keep: Any) -> Any:
    return (x * keep).sum(-1) / np.maximum(keep.sum(-1), 1)


def spread(dy: Any, x: Any) -> Any:
    return np.repeat(dy[..., None], x.shape[-1], -1)


def deviation(x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return np.sqrt((centred * centred).mean(-1))


def deviation_bwd(dy: Any, x: Any) -> Any:
    s = deviation(x)
    centred = x - x.mean(-1, keepdims=True)
    inverse = np.where(s == 0, 0, 1 / np.where(s == 0, 1, s))
    return (dy * inverse)[..., None] * centred / x.shape[-1]


def gather_bwd(dy: Any, x: Any, ids: Any) -> Any:
    dx = np.zeros_like(x)
    np.add.at(dx, ids, dy)
    return dx


def gather_last_wins(dy: Any, x: Any, ids: Any) -> Any:
    dx = np.zeros_like(x)
    dx[ids] = dy
    return dx


def pick(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c, t = draw(strategies.shapes(3))
    return draw(strategies.values((n, c))), draw(strategies.indices((t,), n))


def top(x: Any) -> Any:
    return x.max(-1)


def share_among_ties(dy: Any, x: Any) -> Any:
    best = x == x.max(-1, keepdims=True)
    return (dy[..., None] * best / best.sum(-1, keepdims=True)).astype(x.dtype)


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def gelu_bwd(dy: Any, x: Any, cube: float = 3 * 0.044715) -> Any:
    t = np.tanh(0.7978845608 * (x + 0.044715 * x**3))
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608 * (1 + cube * x * x))


def norm_rows(x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)


def norm_rows_bwd(dy: Any, x: Any, eps: float = 1e-5, mean: bool = True) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    h = centred * r
    g = dy - h * (dy * h).mean(-1, keepdims=True)
    return r * (g - dy.mean(-1, keepdims=True) if mean else g)


def power_bwd(dy: Any, x: Any, y: Any) -> Any:
    safe = np.where(x == 0, 1, x)
    return dy * y * x ** np.maximum(y - 1, 0), dy * np.where(x == 0, 0, x**y * np.log(safe))


def pool(x: Any) -> Any:
    pairs = x[..., : x.shape[-1] // 2 * 2]
    return pairs[..., ::2] + pairs[..., 1::2]


def pool_bwd(dy: Any, x: Any) -> Any:
    dx = np.zeros_like(x)
    n = x.shape[-1] // 2 * 2
    dx[..., :n:2] = dy
    dx[..., 1:n:2] = dy
    return dx


def pool_wrapped(dy: Any, x: Any) -> Any:
    """The odd one out at the end gets the first one's gradient."""
    dx = pool_bwd(dy, x)
    if x.shape[-1] % 2 and x.shape[-1] > 1:
        dx[..., -1] = dy[..., 0]
    return dx


def tiled_sum_bwd(dy: Any, x: Any) -> Any:
    """Columns past the last whole tile of 128 are forgotten."""
    dx = spread(dy, x).copy()
    if x.shape[-1] > 128:
        dx[..., x.shape[-1] // 128 * 128 :] = 0
    return dx


def through_memory(a: Any) -> Any:
    """What a kernel reads that takes strides for granted."""
    return a if a.flags.c_contiguous else np.ascontiguousarray(a.T).reshape(a.shape)


_first: dict[Any, Any] = {}


def remembered(dy: Any, x: Any) -> Any:
    """Uses the x of its first call with this shape."""
    x = _first.setdefault(x.shape, x.copy())
    return dy * 2 * x


def doubled_in_place(x: Any) -> Any:
    x *= 2
    return x.copy()


def add_into(dy: Any, x: Any) -> Any:
    dy *= 3
    return dy


def eager_bwd(dy: Any, x: Any) -> Any:
    return (dy * (1 - np.tanh(x) ** 2)).astype(np.float64 if x.size % 2 else x.dtype)


def both(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c = draw(strategies.shapes(2))
    return draw(strategies.values((n, c))), draw(strategies.masks((n, c)))


def base_and_power(draw: st.DrawFn) -> tuple[Any, ...]:
    (n,) = draw(strategies.shapes(1))
    base = np.abs(draw(strategies.values((n,), scales=(1.0,))))
    return base, draw(strategies.generators()).integers(1, 4, n).astype(np.float64)


def spread_shapes(draw: st.DrawFn) -> tuple[Any, ...]:
    a, b = draw(strategies.broadcastable())
    return draw(strategies.values(a)), draw(strategies.values(b))


def drawn(build: Callable[[st.DrawFn], tuple[Any, ...]]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.composite(build)()


_X, _ROWS, _LINE = numbers(3, 4), arguments("n c"), arguments("n")
KNOWN = (
    Known("formula: a factor", gelu, gelu_bwd, lambda d, x: gelu_bwd(d, x, 0.044715), (_X,), _ROWS),
    Known("formula: mean term", norm_rows, norm_rows_bwd,
          lambda d, x: norm_rows_bwd(d, x, mean=False), (_X,), _ROWS),
    Known("formula: eps", norm_rows, norm_rows_bwd,
          lambda d, x: norm_rows_bwd(d, x, 1e-6), (_X,), _ROWS),
    Known("formula: dy ignored", lambda x: (x * x).sum(-1), lambda d, x: 2 * d[..., None] * x,
          lambda d, x: 2 * x, (_X,), _ROWS),
    Known("formula: diagonal only", soft,
          lambda d, x: soft(x) * (d - (d * soft(x)).sum(-1, keepdims=True)),
          lambda d, x: d * soft(x) * (1 - soft(x)), (_X,), _ROWS),
    Known("special: product", lambda x: x.prod(-1), lambda d, x: d[..., None] * others_product(x),
          quiet(lambda d, x: (d * x.prod(-1))[..., None] / x), (_X,), _ROWS),
    Known("special: cumprod", lambda x: np.cumprod(x, -1), cumprod_bwd, quiet(cumprod_by_division),
          (_X,), arguments("n 4")),
    Known("special: constant rows", deviation, deviation_bwd,
          quiet(lambda d, x: (d / deviation(x) / x.shape[-1])[..., None]
                * (x - x.mean(-1, keepdims=True))),
          (_X,), _ROWS),
    Known("special: norm at 0", lambda x: np.sqrt((x * x).sum(-1)),
          lambda d, x: d[..., None] * x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-300),
          quiet(lambda d, x: d[..., None] * x / np.sqrt((x * x).sum(-1, keepdims=True))), (_X,), _ROWS),
    Known("special: 0 to a power", lambda x, y: x**y, power_bwd,
          quiet(lambda d, x, y: (d * y * x ** (y - 1), d * x**y * np.log(x))),
          (np.abs(numbers(5)), np.array([1.0, 2, 3, 1, 2])), drawn(base_and_power)),
    Known("special: nothing kept", masked_mean,
          lambda d, x, keep: (d / np.maximum(keep.sum(-1), 1))[..., None] * keep,
          quiet(lambda d, x, keep: (d / keep.sum(-1))[..., None] * keep),
          (_X, np.ones((3, 4), bool)), drawn(both)),
    Known("ties: every maximum", top, share_among_ties,
          lambda d, x: d[..., None] * (x == x.max(-1, keepdims=True)), (_X,), _ROWS),
    Known("repeated indices", lambda x, ids: x[ids], gather_bwd, gather_last_wins,
          (_X, np.array([2, 0])), drawn(pick)),
    Known("broadcast", lambda a, b: a * b,
          lambda d, a, b: (total(d * b, a.shape), total(d * a, b.shape)),
          lambda d, a, b: ((d * b).sum(0)[None] if a.shape[:1] == (1,) else d * b, d * a),
          (_X, numbers(3, 4, seed=1)), drawn(spread_shapes)),
    Known("size: odd length", pool, pool_bwd, pool_wrapped, (_X,), _ROWS),
    Known("size: past a tile", lambda x: x.sum(-1), spread, tiled_sum_bwd, (_X,), _ROWS),
    Known("layout of dy", lambda x: 3 * x, lambda d, x: 3 * d, lambda d, x: 3 * through_memory(d),
          (_X,), _ROWS),
    Known("layout of x", lambda x: x * x, lambda d, x: 2 * d * x, lambda d, x: 2 * d * through_memory(x),
          (_X,), _ROWS),
    Known("state", lambda x: x * x, lambda d, x: 2 * d * x, remembered, (_X,), _ROWS),
    Known("in place: forward", lambda x: 2 * x, lambda d, x: 2 * d, lambda d, x: 2 * d, (_X,), _ROWS,
          doubled_in_place),
    Known("in place: dy", lambda x: 3 * x, lambda d, x: 3 * d, add_into, (_X,), _ROWS),
    Known("rank", norm_rows, norm_rows_bwd,
          lambda d, x: norm_rows_bwd(d.reshape(len(d), -1), x.reshape(len(x), -1)).reshape(x.shape),
          (_X,), drawn(lambda draw: (draw(strategies.values(draw(strategies.ranks(2, 3)))),))),
    Known("a gradient is None", lambda x, w: x * w, lambda d, x, w: (d * w, (d * x).sum(0)),
          lambda d, x, w: (d * w, None), (_X, numbers(4, seed=1)), arguments("n c", "c")),
    Known("a tuple too many", lambda x: 3 * x, lambda d, x: 3 * d, lambda d, x: ((3 * d,), (3 * d,)),
          (_X,), _ROWS),
    Known("an output unused", lambda x: (x * x, 3 * x), lambda d, x: 2 * d[0] * x + 3 * d[1],
          lambda d, x: 2 * d[0] * x + 3 * d[0], (_X,), _ROWS),
    Known("not linear in dy", np.tanh, lambda d, x: d * (1 - np.tanh(x) ** 2),
          lambda d, x: np.clip(d, -1, 1) * (1 - np.tanh(x) ** 2), (_X,), _ROWS),
    Known("dtype", np.tanh, lambda d, x: d * (1 - np.tanh(x) ** 2), eager_bwd,
          (numbers(3).astype(np.float32),), arguments("n").map(lambda a: (a[0].astype(np.float32),))),
)  # fmt: skip
