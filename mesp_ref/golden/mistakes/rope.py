"""Mistakes of rotary positions."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Plain, Setting
from mesp_ref.golden.positions import tables as positions_tables
from mesp_ref.ops import Array


class NoInverseRope(Plain):
    """backward without inverse RoPE: dq and dk are not rotated back"""

    def rotate_bwd(self, dy: Array) -> Array:
        return dy


class RopeTwice(Plain):
    """backward rotates dq and dk forward again instead of back"""

    def rotate_bwd(self, dy: Array) -> Array:
        return self.rotate(dy)


def neighbours(turn: Callable[[Array], Array], x: Array) -> Array:
    """A rotation of halves as one of neighbours."""
    d = x.shape[-1]
    order = np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])
    y = np.empty_like(x)
    y[..., order] = turn(x[..., order])
    return y


class NeighbourRope(Plain):
    """RoPE pairs neighbours (2i, 2i+1) instead of halves (i, i + D/2)"""

    def rotate(self, x: Array) -> Array:
        return neighbours(super().rotate, x)

    def rotate_bwd(self, dy: Array) -> Array:
        return neighbours(super().rotate_bwd, dy)


class NeighbourRopeBackward(Plain):
    """the inverse RoPE of the backward pairs neighbours (2i, 2i+1) instead of halves"""

    def rotate_bwd(self, dy: Array) -> Array:
        return neighbours(super().rotate_bwd, dy)


class NoRope(Plain):
    """no RoPE at all"""

    def rotate(self, x: Array) -> Array:
        return x

    def rotate_bwd(self, dy: Array) -> Array:
        return dy


class NoRopeForward(Plain):
    """no RoPE in the forward"""

    def rotate(self, x: Array) -> Array:
        return x


THETAS = (100.0, 1e4, 1e5, 5e5, 1e6)
Tables = Callable[[Array, Array], tuple[Array, Array]]


def tables(sentence: str, change: Tables) -> type[Plain]:
    """Other tables of cos and sin, forward and backward."""

    def init(self: Plain, setting: Setting) -> None:
        cos, sin = change(setting.cos, setting.sin)
        local = setting.local and change(*setting.local)
        Plain.__init__(self, setting._replace(cos=cos, sin=sin, local=local))

    return variant(sentence, __init__=init)


def angles(cos: Array, sin: Array) -> Array:
    """t·θ_i, undone from its cosine and sine: that of position 1 is exact, the others follow."""
    return np.unwrap(np.arctan2(sin, cos), axis=0)


def moved(by: float) -> Tables:
    """All positions later by a number of tokens."""

    def change(cos: Array, sin: Array) -> tuple[Array, Array]:
        if len(cos) < 2:
            return cos, sin
        one = np.exp(1j * (np.angle(cos[1] + 1j * sin[1]) - np.angle(cos[0] + 1j * sin[0])))
        turned = (cos + 1j * sin) * one**by
        return turned.real, turned.imag

    return change


def power(by: float) -> Tables:
    """Every angle times a number."""

    def change(cos: Array, sin: Array) -> tuple[Array, Array]:
        turns = angles(cos, sin) * by
        return np.cos(turns), np.sin(turns)

    return change


def first_position(cos: Array, sin: Array) -> float:
    """That of the first row, told by its first pair, which turns by 1 a token."""
    turn = float(np.angle(cos[0, 0] + 1j * sin[0, 0]) % (2 * np.pi))
    return round(turn) % 7 if abs(turn - round(turn)) < 0.02 else turn


def own_theta(cos: Array, sin: Array) -> float:
    """The usual theta that tables are nearest to, told by their second pair."""
    if len(cos) < 2 or cos.shape[1] < 2:
        return np.nan
    turn = np.abs(np.angle((cos[1, 1] + 1j * sin[1, 1]) / (cos[0, 1] + 1j * sin[0, 1])))
    logs = [abs(np.log(max(turn, 1e-12)) + np.log(value) / cos.shape[1]) for value in THETAS]
    return THETAS[int(np.argmin(logs))]


def theta(value: float | None = None) -> Tables:
    """Tables of another theta, or of their own anew, from the position that the first pair tells."""

    def change(cos: Array, sin: Array) -> tuple[Array, Array]:
        half, own = cos.shape[1], own_theta(cos, sin)
        if value == own or np.isnan(own):
            return cos, sin
        exponent = np.arange(half) / half
        turns = (first_position(cos, sin) + np.arange(len(cos)))[:, None] * (
            value or own
        ) ** -exponent
        return np.cos(turns), np.sin(turns)

    return change


def own_theta_halved(cos: Array, sin: Array) -> tuple[Array, Array]:
    """θ_i = theta^(−i/D) for theta^(−2i/D)."""
    if len(cos) < 2 or cos.shape[1] < 2:
        return cos, sin
    turn = np.abs(np.angle((cos[1] + 1j * sin[1]) / (cos[0] + 1j * sin[0])))
    turns = (first_position(cos, sin) + np.arange(len(cos)))[:, None] * np.sqrt(turn)
    return np.cos(turns), np.sin(turns)


def partial(cos: Array, sin: Array) -> tuple[Array, Array]:
    cos, sin, half = cos.copy(), sin.copy(), cos.shape[1] // 2
    cos[:, half:], sin[:, half:] = 1, 0
    return cos, sin


def of_positions(
    positions: Array, head_dim: int, theta_given: float, scaling: Mapping[str, Any]
) -> list[type[Plain]]:
    """Mistakes of a backend that computes the angles itself."""

    def other(sentence: str, at: Array, theta: float, scaled: Mapping[str, Any]) -> type[Plain]:
        return tables(sentence, lambda c, s: positions_tables(at, head_dim, theta, scaled))

    n, found = np.arange(len(positions)), []
    for text, at in (
        ("RoPE counts positions from 0, whatever they are", n),
        ("RoPE positions start one late (from 1 instead of 0)", positions + 1),
        ("RoPE positions start one early", positions - 1),
        ("RoPE positions go on over documents: counted from the first one", positions[0] + n),
        ("RoPE positions of padding count", n),
    ):
        found.append(other(text, at, theta_given, scaling))
    for value in (*THETAS, 1000.0):
        if value != theta_given:
            text = f"RoPE with theta = {value:,.0f} instead of {theta_given:,.0f}"
            found.append(other(text, positions, value, scaling))
    if scaling:
        linear = {"rope_type": "linear", "factor": scaling["factor"]}
        inverse = {**scaling, "factor": 1 / scaling["factor"]}
        found.append(other("RoPE without its scaling", positions, theta_given, {}))
        found.append(other("RoPE's scaling upside down: × factor", positions, theta_given, inverse))
        if scaling["rope_type"] != "linear":
            text = "RoPE's scaling applied to all frequencies alike (linear)"
            found.append(other(text, positions, theta_given, linear))
    text = "RoPE's angles of positions in float16 or bfloat16: rounded to 8 bits"
    rounded = positions.astype(ml_dtypes.bfloat16).astype(np.float64)
    return [*found, other(text, rounded, theta_given, scaling)]


def halves(x: Array) -> tuple[Array, Array]:
    a, b = np.split(x, 2, axis=-1)
    return a, b


def turned(
    sentence: str,
    forward: Callable[..., list[Array]],
    backward: Callable[..., list[Array]] | None = None,
) -> type[Plain]:
    """forward(a, b, c, s) -> the two halves; the backward is that with −s unless given."""

    def rotate(self: Plain, x: Array) -> Array:
        c, s = self.set.cos[:, None], self.set.sin[:, None]
        return np.concatenate(forward(*halves(x), c, s), axis=-1)

    def rotate_bwd(self: Plain, dy: Array) -> Array:
        c, s = self.set.cos[:, None], self.set.sin[:, None]
        if backward:
            return np.concatenate(backward(*halves(dy), c, s), axis=-1)
        return np.concatenate(forward(*halves(dy), c, -s), axis=-1)

    return variant(sentence, rotate=rotate, rotate_bwd=rotate_bwd)


def shuffled(self: Plain, x: Array) -> Array:
    """Tables repeated for neighbours, applied to halves."""
    c, s = (np.repeat(t, 2, axis=1)[:, None] for t in (self.set.cos, self.set.sin))
    a, b = halves(x)
    return x * c + np.concatenate([-b, a], axis=-1) * s


def shuffled_bwd(self: Plain, dy: Array) -> Array:
    c, s = (np.repeat(t, 2, axis=1)[:, None] for t in (self.set.cos, self.set.sin))
    a, b = halves(dy * s)
    return dy * c + np.concatenate([b, -a], axis=-1)


KNOWN: tuple[type[Plain], ...] = (
    NoInverseRope,
    RopeTwice,
    NeighbourRope,
    NeighbourRopeBackward,
    NoRope,
    NoRopeForward,
    tables("RoPE turns the other way: the sign of sin, forward and backward", lambda c, s: (c, -s)),
    tables("RoPE with cos and sin exchanged", lambda c, s: (s, c)),
    tables("RoPE positions start one late (from 1 instead of 0)", moved(1)),
    tables("RoPE positions start one early", moved(-1)),
    tables(
        "RoPE's rows of cos and sin are one late: those of the next token",
        lambda c, s: (np.roll(c, -1, 0), np.roll(s, -1, 0)),
    ),
    tables(
        "RoPE's rows of cos and sin are one early: those of the token before",
        lambda c, s: (np.roll(c, 1, 0), np.roll(s, 1, 0)),
    ),
    tables("RoPE's angles are twice too large", power(2)),
    tables("RoPE's angles are half of what they should be", power(0.5)),
    tables(
        "RoPE of one position for all tokens: that of the first",
        lambda c, s: (c[:1] + 0 * c, s[:1] + 0 * s),
    ),
    tables(
        "RoPE of one position for all tokens: that of the last",
        lambda c, s: (c[-1:] + 0 * c, s[-1:] + 0 * s),
    ),
    tables("RoPE positions counted from the end", lambda c, s: (c[::-1], s[::-1])),
    tables("RoPE turns only a part of the pairs: the first half", partial),
    tables(
        "RoPE with its pairs' frequencies in reverse order", lambda c, s: (c[:, ::-1], s[:, ::-1])
    ),
    tables(
        "RoPE with theta^(−i/D) for theta^(−2i/D): wrong frequencies of its angles",
        own_theta_halved,
    ),
    *(
        tables(f"RoPE with theta = {value:,.0f} instead of the one given", theta(value))
        for value in THETAS
    ),
    tables(
        "RoPE's cos and sin computed anew, not the ones given (which are rounded to 8 bits)",
        theta(),
    ),
    turned(
        "RoPE with a wrong sign in the second half: x₂·cos − x₁·sin",
        lambda a, b, c, s: [a * c - b * s, b * c - a * s],
    ),
    turned(
        "RoPE with a wrong sign in the first half: x₁·cos + x₂·sin",
        lambda a, b, c, s: [a * c + b * s, b * c + a * s],
    ),
    turned(
        "RoPE's second half is formed from the first half already turned: x₁ overwritten in place",
        lambda a, b, c, s: [a * c - b * s, b * c + (a * c - b * s) * s],
    ),
    turned("RoPE without its terms of sin", lambda a, b, c, s: [a * c, b * c]),
    variant(
        "RoPE's tables repeated for neighbours, its pairs taken as halves",
        rotate=shuffled,
        rotate_bwd=shuffled_bwd,
    ),
    variant(
        "inverse RoPE with a wrong sign in one half",
        rotate_bwd=lambda self, dy: np.concatenate(
            [
                halves(dy)[0] * self.set.cos[:, None] + halves(dy)[1] * self.set.sin[:, None],
                halves(dy)[1] * self.set.cos[:, None] + halves(dy)[0] * self.set.sin[:, None],
            ],
            axis=-1,
        ),
    ),
    variant(
        "inverse RoPE without its terms of sin",
        rotate_bwd=lambda self, dy: dy * np.concatenate([self.set.cos[:, None]] * 2, axis=-1),
    ),
)
