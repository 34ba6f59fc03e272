"""What can be said honestly of a wrong result when no known mistake explains it.

Each fact holds in every case: a constant factor, a sign, an order of axes, another tensor in its
place, what it is too large by, and where the entries are that are wrong.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mesp_ref.learn.compare import Seen
from mesp_ref.learn.exercise import Exercise
from mesp_ref.ops import Array

NEAR = 1e-7
Where = dict[str, Array]


def close(a: Any, b: Any, near: float = NEAR) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    near = 1e-4 if np.float32 in (a.dtype, b.dtype) else near
    if a.shape != b.shape:
        return False
    size = float(np.abs(b).max(initial=0))
    return bool(np.abs(a - b).max(initial=0) <= near * size + 1e-300)


# -- results of another shape ---------------------------------------------------------------------


def about_shape(every: Sequence[Seen], name: str) -> str:
    """What a result of the wrong shape is, when that can be seen from its values."""
    for text, change in _reshaped():
        if all(_becomes(seen, name, change) for seen in every if seen.want[name] is not None):
            return text
    for other in every[0].want:
        there = [s for s in every if s.want[other] is not None]
        if other != name and all(close(s.got[name], s.want[other]) for s in there):
            return f"it holds what {other} should be; are the results returned in another order?"
    return ""


def _reshaped() -> Iterator[tuple[str, Any]]:
    yield "it is transposed: its values are right the other way round", lambda a, want: a.T
    yield "its values are right; only the shape is not", lambda a, want: a.reshape(want.shape)
    yield (
        "it is not summed yet: the sum over its leading axes is right",
        lambda a, want: a.sum(axis=tuple(range(a.ndim - want.ndim))),
    )
    yield (
        "it is not summed yet: the sum over the query heads that share a key/value head is right",
        lambda a, want: a.reshape(*want.shape[:2], want.shape[2], -1, want.shape[3]).sum(axis=3),
    )


def _becomes(seen: Seen, name: str, change: Any) -> bool:
    got, want = seen.got.get(name), seen.want[name]
    if got is None:
        return False
    try:
        return close(change(got, want), want)
    except (ValueError, IndexError, TypeError, np.exceptions.AxisError):
        return False


# -- results of the right shape -------------------------------------------------------------------


def about(exercise: Exercise, every: Sequence[Seen], name: str) -> list[str]:
    """Facts about one wrong output, the most telling first."""
    usable = [s for s in every if s.want[name] is not None and np.size(s.want[name])]
    for fact in (_zero, _rounded, _factor, _other, _reordered, _excess, _product):
        if text := fact(exercise, usable, name):
            return [text]
    return [text for text in (_places(exercise, usable, name), _only_cases(every, name)) if text]


def _zero(exercise: Exercise, every: Sequence[Seen], name: str) -> str:
    return "" if any(np.any(s.got[name]) for s in every) else f"{name} is 0 everywhere."


def _rounded(exercise: Exercise, every: Sequence[Seen], name: str) -> str:
    """Whole numbers beside the right ones, which are none."""
    pairs = [(np.asarray(s.got[name], float), np.asarray(s.want[name], float)) for s in every]
    whole = all(np.array_equal(a, np.round(a)) and (np.abs(a - b) < 1).all() for a, b in pairs)
    if whole and any((b != np.round(b)).any() and (np.abs(b) > 2).all() for _, b in pairs):
        return f"{name} is rounded to whole numbers: hand over what comes out, unrounded."
    return ""


def _ratio(seen: Seen, name: str) -> float | None:
    """The number by which the right output becomes the student's; None where there is none."""
    want, got = seen.want[name], seen.got[name]
    if not np.any(want):
        return math.nan if not np.any(got) else None
    scale = np.abs(want).max()
    factor = float((got / scale * (want / scale)).sum() / np.square(want / scale).sum())
    return factor if close(got, factor * want) else None


def _factor(exercise: Exercise, every: Sequence[Seen], name: str) -> str:
    ratios = [_ratio(seen, name) for seen in every]
    numbers = [exercise.numbers(seen.given) for seen in every]
    if None in ratios or all(math.isnan(r) for r in ratios if r is not None):
        return ""
    found = [(r, n) for r, n in zip(ratios, numbers, strict=True) if r is not None and r == r]
    constant = found[0][0]
    same = all(math.isclose(r, constant, rel_tol=1e-5) for r, _ in found)
    if same and math.isclose(constant, -1, rel_tol=1e-5):
        return f"{name} has the wrong sign; its size is right."
    named = [
        text
        for text, _ in _powers(found[0][1])
        if all(math.isclose(r, _value(n, text), rel_tol=1e-5) for r, n in found)
    ]
    if same and len(found) > 1:
        known = f" ({named[0]})" if named else ""
        return f"{name} is {_often(constant)}the right one{known}, in every case."
    if named:
        return f"{name} is the right one times {named[0]}."
    values = ", ".join(f"{r:.4g}" for r, _ in found[:4])
    return f"{name} is the right one times a number that differs from case to case: {values}."


def _often(factor: float) -> str:
    """How many times, in words where there are any."""
    words = {
        2.0: "twice ", 0.5: "half of ", -2.0: "minus twice ", 1e-6: "a millionth (MB for bytes?) of ",
        2.0**-20: "1/2²⁰ (MiB for bytes?) of ", 8.0: "eight times (bits for bytes?) ",
        0.125: "an eighth of ", 100.0: "a hundred times (per cent?) ",
    }  # fmt: skip
    near = [text for value, text in words.items() if math.isclose(factor, value, rel_tol=1e-4)]
    return near[0] if near else f"{factor:.4g} times "


_SHAPES = ("{}", "1/{}", "√{}", "1/√{}", "{}²", "1/{}²")
_EXPONENTS = (1, -1, 0.5, -0.5, 2, -2)


def _powers(numbers: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Every number that a factor may be, with its name."""
    for sign, label in itertools.product(("", "−"), numbers):
        for shape in _SHAPES:
            text = sign + shape.format(f"({label})" if " " in label else label)
            yield text, _value(numbers, text)


def _value(numbers: Mapping[str, float], text: str) -> float:
    """What a factor of _powers is with the numbers of another case."""
    sign = -1.0 if text.startswith("−") else 1.0
    for label, value in numbers.items():
        for shape, exponent in zip(_SHAPES, _EXPONENTS, strict=True):
            if text.lstrip("−") == shape.format(f"({label})" if " " in label else label):
                return sign * float(value) ** exponent if value > 0 else math.nan
    return math.nan


def _other(exercise: Exercise, every: Sequence[Seen], name: str) -> str:
    """The right value of another output, or an input handed on."""
    for other in every[0].want:
        there = all(s.want[other] is not None for s in every)
        if other != name and there and all(close(s.got[name], s.want[other]) for s in every):
            return (
                f"{name} holds what {other} should be: are the results returned in another order?"
            )
    for key in _arrays(exercise, every[0]):
        if all(close(s.got[name], _arrays(exercise, s).get(key, math.nan)) for s in every):
            return f"{name} is {key} itself."
    return ""


def _arrays(exercise: Exercise, seen: Seen) -> dict[str, Array]:
    """The real arrays that a student may have put in by mistake."""
    found = {**seen.given, **exercise.extra(seen.given)}
    return {k: a for k, a in found.items() if isinstance(a, np.ndarray) and a.dtype.kind == "f"}


def _reordered(exercise: Exercise, every: Sequence[Seen], name: str) -> str:
    """The right entries in another order."""
    dims = every[0].want[name].ndim
    for axis in range(dims):
        for text, change in _orders(axis):
            if all(close(s.got[name], change(s.want[name])) for s in every):
                return f"{name} {text}."
    square = dims >= 2 and all(s.want[name].shape[-1] == s.want[name].shape[-2] for s in every)
    if square and all(close(s.got[name], s.want[name].swapaxes(-1, -2)) for s in every):
        return f"{name} is transposed."
    return ""


def _orders(axis: int) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    where = f"axis {axis}"
    yield f"is the right one with {where} reversed", lambda a: np.flip(a, axis)
    yield f"is the right one, one place late along {where}", lambda a: np.roll(a, 1, axis)
    yield f"is the right one, one place early along {where}", lambda a: np.roll(a, -1, axis)
    yield (
        f"has the two halves of {where} exchanged",
        lambda a: np.roll(a, a.shape[axis] // 2, axis),
    )


def _excess(exercise: Exercise, every: Sequence[Seen], name: str) -> str:
    """got − want is an input, or another output."""
    for key in (*_arrays(exercise, every[0]), *every[0].want):
        terms = [_arrays(exercise, s).get(key, s.want.get(key)) for s in every]
        if any(term is None for term in terms):
            continue
        for sign, text in ((1, "too large"), (-1, "too small")):
            if all(
                close(s.got[name] - s.want[name], sign * np.asarray(term))
                for s, term in zip(every, terms, strict=True)
            ):
                return f"{name} is {text} by exactly {key}."
    return ""


def _product(exercise: Exercise, every: Sequence[Seen], name: str) -> str:
    """got = want ⊙ an input, or want over it, entry by entry."""
    for key in _arrays(exercise, every[0]):
        for text, power in ((f"multiplied by {key}", 1), (f"divided by {key}", -1)):
            by = [_arrays(exercise, s).get(key) for s in every]
            if all(
                _is_product(s.got[name], s.want[name], each, power)
                for s, each in zip(every, by, strict=True)
            ):
                return f"{name} is the right one {text}, entry by entry."
    return ""


def _is_product(got: Array, want: Array, by: Array | None, power: int) -> bool:
    if by is None or not by.size or not np.any(want):
        return False
    try:
        a, b = np.broadcast_arrays(got if power > 0 else got * by, want * by if power > 0 else want)
    except ValueError:
        return False
    return a.shape == want.shape and close(a, b) and np.ptp(by) > 0


def _places(exercise: Exercise, every: Sequence[Seen], name: str) -> str:
    """Where the wrong entries are, when they all lie in one place that has a name."""
    wrong = [s.error(name) > 1e-6 for s in every]
    for text, masks in _masks(exercise, every, name):
        inside = [bool((w & ~m).sum() == 0) for w, m in zip(wrong, masks, strict=True)]
        if text.startswith("except "):  # all the rest must be wrong
            inside += [w[m].mean() > 0.9 for w, m in zip(wrong, masks, strict=True) if m.any()]
        proper = any(m.any() and not m.all() and w.any() for w, m in zip(wrong, masks, strict=True))
        if all(inside) and proper:
            only = text.replace("except ", "")
            return f"{name} is {'wrong' if only == text else 'right'} only {only}."
    return ""


def _masks(
    exercise: Exercise, every: Sequence[Seen], name: str
) -> Iterator[tuple[str, list[Array]]]:
    """Named sets of entries, in every case: the exercise's own, then ends of axes."""
    own = [exercise.places(s.given, s.want).get(name, {}) for s in every]
    for text in own[0]:
        if all(text in masks for masks in own):
            yield text, [masks[text] for masks in own]
    for axis in range(every[0].want[name].ndim):
        for text, index in (("at the first", 0), ("at the last", -1)):
            yield f"{text} place of axis {axis}", [_slab(s.want[name], axis, index) for s in every]
        for text, index in (("except at the first", 0), ("except at the last", -1)):
            yield f"{text} place of axis {axis}", [~_slab(s.want[name], axis, index) for s in every]


def _slab(like: Array, axis: int, index: int) -> Array:
    mask = np.zeros(like.shape, bool)
    np.moveaxis(mask, axis, 0)[index] = True
    return mask


def _only_cases(every: Sequence[Seen], name: str) -> str:
    """In which cases an output is right all the same."""
    wrong = [s for s in every if s.want[name] is not None and (s.error(name) > 1e-6).any()]
    if 2 * len(wrong) > len(every):
        return ""
    notes = "; ".join(f"“{s.case.name}” ({s.case.note})" for s in wrong)
    return f"{name} is wrong only in the case{'s' if len(wrong) > 1 else ''} {notes}."
