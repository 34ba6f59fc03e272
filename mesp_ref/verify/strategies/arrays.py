"""Numbers: ordinary ones, and those at which gradients break."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

TINY, ORDINARY, LARGE = 1e-6, 1.0, 30.0  # scales of activations
IGNORED = -100  # the label that counts for nothing
MANY = 2**15  # entries from which on ties are likelier: what counts them overflows there
Array = np.ndarray
Shape = tuple[int, ...]

seeds = st.integers(0, 2**32 - 1)


def generators() -> st.SearchStrategy[np.random.Generator]:
    """A generator from a drawn seed."""
    return seeds.map(np.random.default_rng)


def _ordinary(rng: np.random.Generator, shape: Shape) -> Array:
    return rng.standard_normal(shape)


def _some_zeros(rng: np.random.Generator, shape: Shape) -> Array:
    """A drawn share of exact zeros, one of them negative."""
    x = np.where(rng.random(shape) < rng.choice([0.1, 0.4, 0.8]), 0.0, rng.standard_normal(shape))
    if x.size:
        x.reshape(-1)[rng.integers(x.size)] = rng.choice([0.0, -0.0])
    return x


def _rows(shape: Shape) -> Shape:
    return (*shape[:-1], 1) if shape else ()


def _zero_rows(rng: np.random.Generator, shape: Shape) -> Array:
    """Rows that are all zero, at least one."""
    gone = rng.random(_rows(shape)) < 0.5
    if gone.size:
        gone.reshape(-1)[rng.integers(gone.size)] = True
    return np.where(gone, 0.0, rng.standard_normal(shape))


def _constant_rows(rng: np.random.Generator, shape: Shape) -> Array:
    """Every row one number."""
    return np.broadcast_to(rng.standard_normal(_rows(shape)), shape).copy()


def _ties(rng: np.random.Generator, shape: Shape) -> Array:
    """Small whole numbers: many are equal, some are zero."""
    return rng.integers(-2, 3, shape).astype(np.float64)


def _zeros(rng: np.random.Generator, shape: Shape) -> Array:
    return np.zeros(shape)


def _ones(rng: np.random.Generator, shape: Shape) -> Array:
    """The same number everywhere, within what float16 can hold well."""
    return np.full(shape, rng.choice([1.0, -1.0, 0.5]))


def _mixed(rng: np.random.Generator, shape: Shape) -> Array:
    """Magnitudes from 1e-8 to 1e3 side by side, a subnormal number among them."""
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-8, 3, shape)
    if x.size > 1:
        x.reshape(-1)[rng.integers(x.size)] = 1e-310
    return x


def _far(rng: np.random.Generator, shape: Shape) -> Array:
    """Some numbers a thousand times the others: exp overflows there, and what divides by it."""
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.3, 1000.0, 1.0)


def _patchwork(rng: np.random.Generator, shape: Shape, far: bool = False) -> Array:
    """Each row of another kind; of a single row, each number."""
    single = len(shape) == 1
    rows = rng.integers(
        0, 6 if far else 5, (*shape[:-1], shape[-1] if single else 1) if shape else ()
    )
    kinds = [_ordinary, _ordinary, _zeros, _constant_rows, _ties, _far]
    made = _ordinary(rng, shape)
    for k, kind in enumerate(kinds):
        made = np.where(rows == k, kind(rng, shape), made)
    return made


def _patchwork_far(rng: np.random.Generator, shape: Shape) -> Array:
    """The same, some rows of them far off."""
    return _patchwork(rng, shape, far=True)


Kind = Callable[[np.random.Generator, Shape], Array]
_TAME: tuple[Kind, ...] = (_ordinary,) * 6 + (
    _some_zeros, _patchwork, _patchwork, _zero_rows, _constant_rows, _ties, _zeros, _ones,
)  # fmt: skip


@st.composite
def values(
    draw: st.DrawFn,
    shape: Shape | st.SearchStrategy[Shape],
    scales: Sequence[float] = (ORDINARY, TINY, LARGE),
    dtype: Any = "float64",
    special: bool = True,
) -> Array:
    """Numbers of one drawn scale: the first shrinks first; pass (1.0,) for tame ones only.

    Half of the draws are normal. The others have what gradients break at: exact zeros, rows of
    zeros, constant rows, ties, one number everywhere and, where `scales` has more than one,
    magnitudes from subnormal to large side by side, some so large that exp overflows.
    special=False draws normal numbers only.
    """
    size = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    kinds = _TAME if len(scales) == 1 else (*_TAME, _mixed, _patchwork_far, _patchwork_far, _far)
    if int(np.prod(size)) >= MANY:
        kinds = (_ordinary, _ordinary, _ones, _constant_rows, _ones, _ties)
    numbers = (
        draw(seeds),
        draw(seeds),
    )  # two: Hypothesis draws the same few low ones again and again
    rng = np.random.default_rng([*numbers, *size])
    # Kind and scale by the seeds, each as often as it stands there; a drawn index would be low mostly.
    kind, scale = kinds[int(rng.integers(len(kinds)))], scales[int(rng.integers(len(scales)))]
    if numbers == (0, 0):
        kind, scale = _ordinary, scales[0]
    return np.asarray((kind if special else _ordinary)(rng, size) * scale, dtype)


@st.composite
def labels(draw: st.DrawFn, shape: Shape, vocabulary: int) -> Array:
    """Labels in [0, vocabulary) of which a drawn share, none to all, is −100."""
    rng, share = draw(generators()), draw(st.sampled_from([0.3, 0.0, 1.0]))
    drawn = rng.integers(0, vocabulary, shape)
    return np.where(rng.random(shape) < share, IGNORED, drawn)


@st.composite
def indices(draw: st.DrawFn, shape: Shape, length: int) -> Array:
    """Indices into an axis: drawn ones, all the same, only the first and the last."""
    rng, kind = draw(generators()), draw(st.sampled_from(["any", "same", "ends"]))
    if kind == "same":
        return np.full(shape, rng.integers(0, length))
    if kind == "ends":
        return np.where(rng.random(shape) < 0.5, 0, length - 1)
    return rng.integers(0, length, shape)


@st.composite
def masks(draw: st.DrawFn, shape: Shape) -> Array:
    """True and False; often rows that are all False, sometimes everything."""
    rng, share = draw(generators()), draw(st.sampled_from([0.5, 0.9, 0.1, 0.0, 1.0]))
    mask = rng.random(shape) < share
    if draw(st.booleans()):
        mask &= rng.random(_rows(shape)) < 0.5
    return mask


def additive_masks(shape: Shape) -> st.SearchStrategy[Array]:
    """0 where a mask is True, −inf where it is not."""
    return masks(shape).map(lambda mask: np.where(mask, 0.0, -np.inf))
