"""Mistakes at special values: zeros, ties, borders, infinities, a parameter other than the usual one."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from known_bugs import Known, drawn, numbers, quiet, soft
from scipy import special

from mesp_ref.verify import strategies
from mesp_ref.verify.drawn import arguments

_ROWS = arguments("n c")
_X = numbers(3, 4)


def sigmoid(x: Any) -> Any:
    return special.expit(x) if np.isrealobj(x) else 1 / (1 + np.exp(-x))


def length(x: Any) -> Any:
    return np.sqrt((x * x).sum(-1, keepdims=True))


def unit(x: Any) -> Any:
    return x / np.maximum(length(x), 1e-8)


def unit_bwd(dy: Any, x: Any) -> Any:
    n = length(x)
    along = (dy * x).sum(-1, keepdims=True)
    safe = np.maximum(n, 1e-8)
    return dy / safe - np.where(n > 1e-8, x * along / safe**2 / np.where(n == 0, 1, n), 0)


def running_max(x: Any) -> Any:
    return np.maximum.accumulate(x, -1)


def first_best(x: Any) -> Any:
    """The place of the first largest so far."""
    best = np.zeros(x.shape, int)
    for i in range(1, x.shape[-1]):
        last = np.take_along_axis(x, best[..., i - 1 : i], -1)[..., 0]
        best[..., i] = np.where(x[..., i] > last, i, best[..., i - 1])
    return best


def running_max_bwd(dy: Any, x: Any) -> Any:
    dx, best = np.zeros_like(x), first_best(x)
    for i in range(x.shape[-1]):
        at = best[..., i : i + 1]
        np.put_along_axis(dx, at, np.take_along_axis(dx, at, -1) + dy[..., i : i + 1], -1)
    return dx


def running_max_of_equals(dy: Any, x: Any) -> Any:
    y, dx = running_max(x), np.zeros_like(x)
    for i in range(x.shape[-1]):
        dx[..., : i + 1] += dy[..., i : i + 1] * (x[..., : i + 1] == y[..., i : i + 1])
    return dx


def larger_bwd(dy: Any, a: Any, b: Any) -> Any:
    half = 0.5 * (a == b)
    return dy * ((a > b) + half), dy * ((b > a) + half)


def couple(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    return draw(strategies.values(shape)), draw(strategies.values(shape))


def with_number(*choices: float, axes: int = 1) -> Any:
    return drawn(
        lambda d: (d(strategies.values(d(strategies.shapes(axes)))), d(st.sampled_from(choices)))
    )


def softplus(x: Any, beta: float) -> Any:
    return np.logaddexp(0, beta * x) / beta


def elu(x: Any, alpha: float) -> Any:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def hard_swish(x: Any) -> Any:
    return x * np.clip(x + 3, 0, 6) / 6


def hard_swish_bwd(dy: Any, x: Any) -> Any:
    return dy * np.where(x < -3, 0, np.where(x > 3, 1, (2 * x + 3) / 6))


def huber(x: Any, beta: float) -> Any:
    n = np.abs(x)
    return np.where(n < beta, 0.5 * n * n / (beta or 1), n - 0.5 * beta)


def huber_bwd(dy: Any, x: Any, beta: float) -> Any:
    return dy * np.where(np.abs(x) < beta, x / (beta or 1), np.sign(x))


def huber_divides(dy: Any, x: Any, beta: float) -> Any:
    return dy * np.clip(x / beta, -1, 1)


def log_sum(x: Any) -> Any:
    return special.logsumexp(x, axis=-1)


def masked_scores(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(2))
    return draw(strategies.values(shape)), draw(strategies.masks(shape))


def masked_softmax(x: Any, keep: Any) -> Any:
    e = np.where(keep, np.exp(x - np.where(keep, x, x.min()).max(-1, keepdims=True)), 0)
    total = e.sum(-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def masked_softmax_bwd(dy: Any, x: Any, keep: Any) -> Any:
    p = masked_softmax(x, keep)
    return p * (dy - (dy * p).sum(-1, keepdims=True))


def masked_softmax_nan(dy: Any, x: Any, keep: Any) -> Any:
    e = np.where(keep, np.exp(x - x.max(-1, keepdims=True)), 0)
    p = e / e.sum(-1, keepdims=True)
    return p * (dy - (dy * p).sum(-1, keepdims=True))


def distance(a: Any, b: Any) -> Any:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


def distance_bwd(dy: Any, a: Any, b: Any, safe: bool = True) -> Any:
    far = a[:, None] - b[None]
    d = distance(a, b)
    g = (dy / (np.where(d == 0, 1, d) if safe else d))[..., None] * far
    return g.sum(1), -g.sum(0)


def two_sets(draw: st.DrawFn) -> tuple[Any, ...]:
    n, m, c = draw(strategies.shapes(3, 5, ()))
    return draw(strategies.values((n, c), (1.0,))), draw(strategies.values((m, c), (1.0,)))


def p_norm(x: Any, p: float) -> Any:
    return (np.abs(x) ** p).sum(-1) ** (1 / p)


def p_norm_bwd(dy: Any, x: Any, p: float) -> Any:
    n = p_norm(x, p)[..., None]
    return dy[..., None] * np.sign(x) * (np.abs(x) / np.where(n == 0, 1, n)) ** (p - 1)


def clipped_to(x: Any, most: float) -> Any:
    """A vector no longer than `most`."""
    n = np.sqrt((x * x).sum())
    return x * (most / n) if n > most else 1 * x


def clipped_to_bwd(dy: Any, x: Any, most: float, always: bool = False) -> Any:
    n = np.sqrt((x * x).sum())
    if n <= most and not always:
        return 1 * dy
    return most / n * (dy - x * ((dy * x).sum() / n**2))


def remainder_bwd(dy: Any, x: Any, y: Any) -> Any:
    return dy, -dy * np.floor(x / y)


def divisors(draw: st.DrawFn) -> tuple[Any, ...]:
    n = draw(strategies.shapes(1))
    x, y = draw(strategies.values(n, (1.0,))), draw(strategies.values(n, (1.0,)))
    return x + 0.3, np.sign(y + 0.01) * (np.abs(y) + 0.7)


def spread_of(x: Any, off: int) -> Any:
    return ((x - x.mean(-1, keepdims=True)) ** 2).sum(-1) / max(x.shape[-1] - off, 1)


def spread_of_bwd(dy: Any, x: Any, off: int) -> Any:
    return dy[..., None] * 2 * (x - x.mean(-1, keepdims=True)) / max(x.shape[-1] - off, 1)


def middle(x: Any) -> Any:
    s = np.sort(x, -1)
    n = x.shape[-1]
    return (s[..., (n - 1) // 2] + s[..., n // 2]) / 2


def middle_bwd(dy: Any, x: Any, even: bool = True) -> Any:
    order, n = np.argsort(x, -1, "stable"), x.shape[-1]
    dx = np.zeros_like(x)
    for k in ((n - 1) // 2, n // 2) if even else (n // 2, n // 2):
        at = order[..., k : k + 1]
        np.put_along_axis(dx, at, np.take_along_axis(dx, at, -1) + dy[..., None] / 2, -1)
    return dx


def dice(p: Any, keep: Any) -> Any:
    """1 − 2Σpt/(Σp² + Σt), and 1 where both are empty."""
    below = (p * p).sum(-1) + keep.sum(-1)
    return np.where(below == 0, 1, 1 - 2 * (p * keep).sum(-1) / np.where(below == 0, 1, below))


def dice_bwd(dy: Any, p: Any, keep: Any, safe: bool = True) -> Any:
    below = (p * p).sum(-1) + keep.sum(-1)
    d = np.where(below == 0, 1, below) if safe else below
    g = -2 * keep / d[..., None] + (4 * (p * keep).sum(-1) / d**2)[..., None] * p
    return dy[..., None] * (np.where(below == 0, 0, 1)[..., None] * g if safe else g)


def focal(x: Any, gamma: float) -> Any:
    """−(1 − p)^γ·log p of p = σ(x)."""
    return sigmoid(-x) ** gamma * np.logaddexp(0, -x)


def focal_bwd(dy: Any, x: Any, gamma: float) -> Any:
    p, q = sigmoid(x), sigmoid(-x)
    return dy * (-gamma * p * q**gamma * np.logaddexp(0, -x) - q ** (gamma + 1))


def focal_by_power(dy: Any, x: Any, gamma: float) -> Any:
    p = sigmoid(x)
    return -dy * (
        gamma * (1 - p) ** (gamma - 1) * p * (1 - p) * -np.log(p) + (1 - p) ** (gamma + 1)
    )


def sampled_at(table: Any, at: Any) -> Any:
    """Linear interpolation of a table at positions, its ends beyond them."""
    low = np.clip(np.floor(at).astype(int), 0, len(table) - 1)
    high = np.minimum(low + 1, len(table) - 1)
    part = np.clip(at, 0, len(table) - 1) - low
    return table[low] * (1 - part) + table[high] * part


def sampled_at_bwd(dy: Any, table: Any, at: Any, inside: bool = True) -> Any:
    n = len(table)
    low = np.clip(np.floor(at).astype(int), 0, n - 1)
    high = np.minimum(low + 1, n - 1)
    part = np.clip(at, 0, n - 1) - low
    dt = np.zeros_like(table)
    np.add.at(dt, low, dy * (1 - part))
    np.add.at(dt, high, dy * part)
    within = (at > 0) & (at < n - 1) if inside else True
    slope = table[np.minimum(low + 1, n - 1)] - table[low] if inside else np.where(
        high == low, table[low] - table[np.maximum(low - 1, 0)], table[high] - table[low])  # fmt: skip
    return dt, dy * slope * within


def positions(draw: st.DrawFn) -> tuple[Any, ...]:
    n, t = draw(strategies.shapes(2))
    return draw(strategies.values((n,))), n / 2 + draw(strategies.values((t,), (1.0, 30.0)))


def cosine(a: Any, b: Any) -> Any:
    return (unit(a) * unit(b)).sum(-1)


def cosine_bwd(dy: Any, a: Any, b: Any) -> Any:
    up = dy[..., None]
    return unit_bwd(up * unit(b), a), unit_bwd(up * unit(a), b)


def cosine_nan(dy: Any, a: Any, b: Any) -> Any:
    na, nb = length(a), length(b)
    c, up = (a * b).sum(-1, keepdims=True) / (na * nb), dy[..., None]
    return up * (b / (na * nb) - c * a / na**2), up * (a / (na * nb) - c * b / nb**2)


KNOWN = (
    Known(
        "a running maximum's ties",
        running_max,
        running_max_bwd,
        running_max_of_equals,
        (_X,),
        _ROWS,
    ),
    Known(
        "the larger of equals twice",
        np.maximum,
        larger_bwd,
        lambda d, a, b: (d * (a >= b), d * (b >= a)),
        (_X, numbers(3, 4, seed=1)),
        drawn(couple),
    ),
    Known(
        "softplus: beta",
        softplus,
        lambda d, x, b: d * sigmoid(b * x),
        lambda d, x, b: d * sigmoid(x),
        (_X, 1.0),
        with_number(1.0, 0.5, 3.0),
    ),
    Known(
        "sigmoid by exp(x)",
        sigmoid,
        lambda d, x: d * sigmoid(x) * sigmoid(-x),
        quiet(lambda d, x: d * np.exp(x) / (1 + np.exp(x)) ** 2),
        (_X,),
        _ROWS,
    ),
    Known(
        "elu: alpha",
        elu,
        lambda d, x, a: d * np.where(x > 0, 1, a * np.exp(np.minimum(x, 0))),
        lambda d, x, a: d * np.where(x > 0, 1, elu(x, a) + 1),
        (_X, 1.0),
        with_number(1.0, 0.5, 2.0),
    ),
    Known(
        "hard swish past 3",
        hard_swish,
        hard_swish_bwd,
        lambda d, x: d * np.where(x < -3, 0, (2 * x + 3) / 6),
        (np.tanh(_X),),
        _ROWS,
    ),
    Known(
        "clip: the upper end",
        lambda x: np.clip(x, -2, 2),
        lambda d, x: d * ((x > -2) & (x < 2)),
        lambda d, x: d * (x > -2),
        (np.tanh(_X),),
        _ROWS,
    ),
    Known(
        "huber of width 0",
        huber,
        huber_bwd,
        quiet(huber_divides),
        (_X, 1.0),
        with_number(1.0, 0.0, 0.5),
    ),
    Known(
        "sinc at 0",
        np.sinc,
        lambda d, x: (
            d * np.where(x == 0, 0, (np.cos(np.pi * x) - np.sinc(x)) / np.where(x == 0, 1, x))
        ),
        quiet(lambda d, x: d * (np.cos(np.pi * x) - np.sinc(x)) / x),
        (numbers(5),),
        arguments("n").map(lambda a: (np.where(np.abs(a[0]) < 1e-3, 0, a[0] % 3),)),
    ),
    Known(
        "abs by division",
        np.abs,
        lambda d, x: d * np.sign(x),
        quiet(lambda d, x: d * x / np.abs(x)),
        (_X,),
        _ROWS,
    ),
    Known(
        "hypot of nothing",
        np.hypot,
        lambda d, a, b: tuple(
            d * np.divide(v, np.hypot(a, b), where=np.hypot(a, b) > 0, out=0 * v) for v in (a, b)
        ),
        quiet(lambda d, a, b: (d * a / np.hypot(a, b), d * b / np.hypot(a, b))),
        (_X, numbers(3, 4, seed=1)),
        drawn(couple),
    ),
    Known(
        "a zero row to unit length",
        unit,
        unit_bwd,
        quiet(lambda d, x: d / length(x) - x * (d * x).sum(-1, keepdims=True) / length(x) ** 3),
        (_X,),
        _ROWS,
    ),
    Known(
        "cosine with nothing",
        cosine,
        cosine_bwd,
        quiet(cosine_nan),
        (_X, numbers(3, 4, seed=1)),
        drawn(couple),
    ),
    Known(
        "distance of a point to itself",
        distance,
        distance_bwd,
        quiet(lambda d, a, b: distance_bwd(d, a, b, False)),
        (_X, numbers(2, 4, seed=1)),
        drawn(two_sets),
    ),
    Known(
        "power 0 of 0",
        lambda x, p: x**p,
        lambda d, x, p: d * p * x ** max(p - 1, 0),
        quiet(lambda d, x, p: d * p * x**p / x),
        (_X, 2),
        with_number(2, 0, 1, 3),
    ),
    Known(
        "p-norm without signs",
        p_norm,
        p_norm_bwd,
        lambda d, x, p: np.abs(p_norm_bwd(np.abs(d), x, p)) * np.sign(d)[..., None],
        (np.abs(_X), 3.0),
        with_number(2.0, 3.0, axes=2),
    ),
    Known(
        "clip by norm below it",
        clipped_to,
        clipped_to_bwd,
        lambda d, x, m: clipped_to_bwd(d, x, m, True),
        (_X, 1.0),
        with_number(1.0, 0.1, 100.0),
    ),
    Known(
        "remainder of negatives",
        np.remainder,
        remainder_bwd,
        lambda d, x, y: (d, -d * np.trunc(x / y)),
        (np.abs(numbers(4)) + 1, np.full(4, 0.7)),
        drawn(divisors),
    ),
    Known(
        "variance: one off",
        spread_of,
        spread_of_bwd,
        lambda d, x, k: spread_of_bwd(d, x, 0),
        (_X, 0),
        with_number(0, 1, axes=2),
    ),
    Known(
        "median of an even number",
        middle,
        middle_bwd,
        lambda d, x: middle_bwd(d, x, False),
        (numbers(3, 5),),
        _ROWS,
    ),
    Known(
        "softmax of a masked row",
        masked_softmax,
        masked_softmax_bwd,
        quiet(masked_softmax_nan),
        (_X, np.ones((3, 4), bool)),
        drawn(masked_scores),
    ),
    Known(
        "logsumexp not shifted",
        log_sum,
        lambda d, x: d[..., None] * soft(x),
        quiet(lambda d, x: d[..., None] * np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
        (_X,),
        _ROWS,
    ),
    Known(
        "dice of nothing",
        dice,
        dice_bwd,
        quiet(lambda d, p, t: dice_bwd(d, p, t, False)),
        (_X, numbers(3, 4, seed=1) > 0),
        drawn(masked_scores),
    ),
    Known(
        "focal loss: 0 to the power −1",
        focal,
        focal_bwd,
        quiet(focal_by_power),
        (_X, 2.0),
        with_number(2.0, 0.0, 0.5),
    ),
    Known(
        "interpolation past the ends",
        sampled_at,
        sampled_at_bwd,
        lambda d, t, at: sampled_at_bwd(d, t, at, False),
        (numbers(6), np.array([0.3, 2.6, 3.1])),
        drawn(positions),
    ),
    Known(
        "log of the sigmoid",
        lambda x: -np.logaddexp(0, -x),
        lambda d, x: d * sigmoid(-x),
        quiet(lambda d, x: d * np.exp(-x) / (1 + np.exp(-x))),
        (_X,),
        _ROWS,
    ),
    Known(
        "threshold of a square root",
        lambda x: np.sqrt(np.maximum(x, 0) + 1e-4),
        lambda d, x: d * (x > 0) / 2 / np.sqrt(np.maximum(x, 0) + 1e-4),
        lambda d, x: d / 2 / np.sqrt(np.maximum(x, 0) + 1e-4),
        (np.abs(_X),),
        _ROWS,
    ),
    Known(
        "where's other branch",
        lambda x: np.where(x > 1, np.log(np.where(x > 1, x, 1)), x - 1),
        lambda d, x: d * np.where(x > 1, 1 / np.where(x > 1, x, 1), 1),
        quiet(lambda d, x: d * ((x > 1) / x + (x <= 1))),
        (_X,),
        _ROWS,
    ),
)
