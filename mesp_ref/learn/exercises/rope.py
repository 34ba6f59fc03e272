"""Exercise: rotary position embedding."""

from typing import Any

import numpy as np

from mesp_ref.learn.exercise import LARGE, ONE_TOKEN, SMALL, UNEVEN, Given, Outputs, Wrong, of_op
from mesp_ref.ops import Array
from mesp_ref.registry.cases import times

_CASES = (
    ("small", "one head of two entries", SMALL._replace(past=1)),
    ("uneven", "all lengths differ, positions from 2", UNEVEN),
    ("one token", "T = 1 at position 3", ONE_TOKEN._replace(past=3)),
    ("wide head", "D = 8", LARGE, times(x=100.0)),
)


def _numbers(g: Given) -> dict[str, float]:
    n, t, h, d = g.dy.shape
    return {
        "D": d,
        "D/2": d / 2,
        "the number of tokens T": t,
        "the number of heads H": h,
        "the batch size N": n,
    }


def _pairs(x: Array, m: Wrong) -> tuple[Array, Array]:
    half = x.shape[-1] // 2
    found: tuple[Array, Array] = m.pick(
        (x[..., :half], x[..., half:]), neighbours=(x[..., ::2], x[..., 1::2]),
        halves_swapped=(x[..., half:], x[..., :half]), neighbours_read=(x[..., ::2], x[..., 1::2]),
    )  # fmt: skip
    return found


def _rope(g: Given, m: Wrong) -> Outputs:
    c, s = g.cos, g.sin
    c, s = m.pick(
        (c, s), swapped_tables=(s, c), first_position=(c[:1] + 0 * c, s[:1] + 0 * s),
        reversed_positions=(c[::-1], s[::-1]), next_position=(np.roll(c, -1, 0), np.roll(s, -1, 0)),
        last_position=(c[-1:] + 0 * c, s[-1:] + 0 * s), cos_alone=(c, 0 * s), sin_alone=(0 * c, s),
        first_frequency=(c[:, :1] + 0 * c, s[:, :1] + 0 * s), twice=(c * c - s * s, 2 * s * c),
        size_of_sin=(c, np.abs(s)),
    )  # fmt: skip
    c, s = c[..., None, :], s[..., None, :]
    d1, d2 = _pairs(g.dy, m)
    forward = d1 * c - d2 * s, d2 * c + d1 * s
    dx1, dx2 = m.pick(
        (d1 * c + d2 * s, d2 * c - d1 * s), forward=forward, first_half=(forward[0], d2 * c - d1 * s),
        second_half=(d1 * c + d2 * s, forward[1]), cos_negated=(-d1 * c + d2 * s, -d2 * c - d1 * s),
        not_rotated=(d1, d2), crossed=(d1 * c + d2 * s, d1 * c - d2 * s),
        crossed_first=(d2 * c + d1 * s, d2 * c - d1 * s), mixed=(d1 * c + d1 * s, d2 * c - d2 * s),
        divided=((d1 * c + d2 * s) / 2, (d2 * c - d1 * s) / 2),
        first_kept=(d1, d2 * c - d1 * s), second_kept=(d1 * c + d2 * s, d2),
        updated_first=(d1 * c + d2 * s, d2 * c - (d1 * c + d2 * s) * s),
    )  # fmt: skip
    return {"dx": _joined(dx1, dx2, m)}


def _joined(dx1: Array, dx2: Array, m: Wrong) -> Any:
    first, second = m.pick(
        (dx1, dx2), results_exchanged=(dx2, dx1), first_twice=(dx1, dx1), second_twice=(dx2, dx2)
    )
    if "neighbours" in m.keys:
        return np.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
    joined = np.concatenate([first, second], axis=-1)
    return m.pick(
        joined, interleaved=np.stack([first, second], axis=-1).reshape(joined.shape),
        interleaved_back=_deal(joined),
    )  # fmt: skip


def _deal(x: Array) -> Array:
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


ROPE = of_op(
    "rope",
    title="rotary position embedding, half-split",
    outputs="dx",
    cases=_CASES,
    formula=_rope,
    aliases=("rope",),
    numbers=_numbers,
    hints=(
        "For one pair and one angle the forward is a 2×2 matrix. What does the backward multiply by?",
        "The transpose of a rotation by θ is the rotation by −θ: which signs change?",
    ),
    mistakes={
        "neighbours": "it pairs neighbours (2i, 2i+1), interleaved; this model pairs the two halves (i, i + D/2).",
        "neighbours_read": "it reads neighbours (2i, 2i+1), interleaved, but writes halves; this model pairs the two halves (i, i + D/2).",
        "first_twice": "the first half of the result stands in the second half, too.",
        "second_twice": "the second half of the result stands in the first half, too.",
        "halves_swapped": "the two halves of the head are exchanged when they are read: x₁ is the first half.",
        "swapped_tables": "cos and sin are exchanged.",
        "first_position": "every token is turned by the angles of the first position.",
        "last_position": "every token is turned by the angles of the last position.",
        "reversed_positions": "the positions are in reverse order: the tables run backwards.",
        "next_position": "every token is turned by the angles of the next position.",
        "cos_alone": "the terms with sin are missing.",
        "sin_alone": "the terms with cos are missing.",
        "first_frequency": "all pairs are turned by the angle of the first pair: each pair has its own frequency.",
        "twice": "it is rotated back twice: by 2θ where θ belongs.",
        "size_of_sin": "the sine stands there without its sign.",
        "forward": "it rotates forward again, in the same direction as the forward, instead of back.",
        "first_half": "the first half is rotated forward: the sign of its sin term is wrong (dx₁).",
        "second_half": "the second half is rotated forward: the sign of its sin term is wrong (dx₂).",
        "cos_negated": "cos has the wrong sign: cos(−θ) = cos θ, only the sine is negated.",
        "not_rotated": "it is not rotated back: the gradient is handed on as it came (dx is dy itself).",
        "crossed": "in the second half dy₁ and dy₂ are exchanged: dx₂ = dy₂ ⊙ cos − dy₁ ⊙ sin.",
        "crossed_first": "in the first half dy₁ and dy₂ are exchanged: dx₁ = dy₁ ⊙ cos + dy₂ ⊙ sin.",
        "mixed": "each half is combined with itself: the sin terms take the other half.",
        "divided": "dx is half of what it must be: a rotation keeps lengths.",
        "first_kept": "the first half is not rotated back.",
        "second_kept": "the second half is not rotated back.",
        "updated_first": "the second half is computed from the first half's new values: both need the old ones.",
        "results_exchanged": "the two halves of the result are exchanged: dx₁ comes first.",
        "interleaved": "the two halves are interleaved when they are put together: they stand one behind the other.",
        "interleaved_back": "the result's entries are in another order: even ones first. The halves stay where they are.",
    },
)  # fmt: skip
