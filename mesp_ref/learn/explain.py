"""What a wrong answer looks like: the mistakes of an exercise, each computed and compared.

A mistake is named only when its formula gives the student's values in every case and no other
mistake does. First one mistake for all results, then two at once, then each wrong result by itself.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from mesp_ref.learn.compare import Seen
from mesp_ref.learn.exercise import Case, Exercise, Given, Outputs
from mesp_ref.ops import Array

EXACT, ROUGH = 1e-8, 1e-3  # relative distance of a prediction; ROUGH for what came in float32
Keys = tuple[str, ...]


class Predictions:
    """What the formula gives with some mistakes in it: computed once."""

    def __init__(self, exercise: Exercise, every: Sequence[Seen], broken: Sequence[Case] = ()):
        self.exercise, self.every = exercise, every
        self.broken = [exercise.pool(case) for case in broken]
        self._known: dict[tuple[Keys, int], Outputs | None] = {}

    def of(self, keys: Keys, number: int) -> Outputs | None:
        """None where a formula cannot be computed with these mistakes."""
        if (keys, number) not in self._known:
            try:
                found = self.exercise.predict(self.every[number].given, keys)
            except (ValueError, IndexError, TypeError):
                found = None
            self._known[keys, number] = found
        return self._known[keys, number]

    def fits(self, keys: Keys, names: Iterable[str], near: float) -> bool:
        """Whether the student's values of some outputs are those of these mistakes, in every case."""
        for number, seen in enumerate(self.every):
            predicted = self.of(keys, number)
            if predicted is None:
                return False
            if not all(_same(seen.got.get(n), predicted.get(n), seen.mag[n] if n in seen.mag else None, near) for n in names):  # fmt: skip
                return False
        return all(self._raises(given, keys) for given in self.broken)

    def _raises(self, given: Given, keys: Keys) -> bool:
        """Whether the formula cannot be computed, either, where the student's code stopped."""
        try:
            self.exercise.predict(given, keys)
        except (ValueError, IndexError, TypeError):
            return True
        return False


def _same(got: Array | None, predicted: Array | None, mag: Array | None, near: float) -> bool:
    if got is None or predicted is None:
        return got is None and predicted is None
    predicted = np.asarray(predicted)
    if got.shape != predicted.shape or got.dtype.kind not in "fiu":
        return False
    a, b = got.astype(np.float64), predicted.astype(np.float64)
    if (np.isfinite(a) != np.isfinite(b)).any():
        return False
    a, b = np.nan_to_num(a, posinf=0, neginf=0), np.nan_to_num(b, posinf=0, neginf=0)
    size = max(float(np.abs(b).max(initial=0)), 0.0 if mag is None else float(np.max(mag, initial=0)))
    return bool(np.abs(a - b).max(initial=0) <= near * size)


def explain(
    exercise: Exercise, every: Sequence[Seen], wrong: Sequence[str], broken: Sequence[Case] = ()
) -> list[str]:
    """Sentences, none when nothing known fits; `broken` are the cases in which the code stopped."""
    predictions = Predictions(exercise, every, broken)
    for near in (EXACT, ROUGH):
        for found in (_one, _two, _each):
            if sentences := found(exercise, predictions, wrong, near):
                return sentences
    return []


def _one(exercise: Exercise, p: Predictions, wrong: Sequence[str], near: float) -> list[str]:
    names = list(p.every[0].want)
    fit = [(key,) for key in exercise.mistakes if p.fits((key,), names, near)]
    return _said(exercise, p, fit, names)


def _two(exercise: Exercise, p: Predictions, wrong: Sequence[str], near: float) -> list[str]:
    keys = exercise.mistakes if exercise.paired is None else exercise.paired
    groups = exercise.keys(p.every[0].given)
    pairs = [
        (a, b) for a, b in itertools.combinations(keys, 2) if groups.get(a, a) != groups.get(b, b)
    ]  # fmt: skip
    names = list(p.every[0].want)
    fit = [pair for pair in pairs if p.fits(pair, names, near)]
    return _said(exercise, p, fit, names)


def _each(exercise: Exercise, p: Predictions, wrong: Sequence[str], near: float) -> list[str]:
    """A mistake for each wrong output by itself; nothing where one of them stays unexplained twice."""
    sentences = []
    for name in wrong:
        fit = [(key,) for key in exercise.mistakes if p.fits((key,), [name], near)]
        best = _least(p, fit, name)
        if text := _said(exercise, p, best, [name]):
            sentences.append(f"{name}: {text[0]}")
    return sentences


def _least(p: Predictions, fit: list[Keys], name: str) -> list[Keys]:
    """Of mistakes that give one output alike, those that leave most of the others right."""

    def touched(keys: Keys) -> int:
        others = [n for n in p.every[0].want if n != name]
        return sum(not _is_right(p, keys, n) for n in others)

    fewest = min(map(touched, fit), default=0)
    return [keys for keys in fit if touched(keys) == fewest]


def _is_right(p: Predictions, keys: Keys, name: str) -> bool:
    for number, seen in enumerate(p.every):
        predicted = p.of(keys, number)
        if predicted is None or not _same(
            predicted.get(name), seen.want[name], seen.mag.get(name), EXACT
        ):
            return False
    return True


def _said(exercise: Exercise, p: Predictions, fit: list[Keys], names: Sequence[str]) -> list[str]:
    """The sentence of what fits, if it is one thing: mistakes that are the same here are one."""
    texts = list(dict.fromkeys(" And ".join(exercise.mistakes[k] for k in keys) for keys in fit))
    if len(texts) != 1:
        return []
    return texts
