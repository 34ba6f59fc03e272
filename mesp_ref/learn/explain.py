"""What a wrong answer looks like: the mistakes of an exercise, each computed and compared.

A mistake is named only when its formula gives the student's values in every case and no other
mistake does. First one mistake for all results, then two at once, then for each wrong result.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from mesp_ref.learn.compare import Seen, same
from mesp_ref.learn.elsewhere import golden_names, seeded_names
from mesp_ref.learn.exercise import Case, Exercise, Outputs

EXACT, ROUGH = 1e-8, 1e-3  # relative distance of a prediction; ROUGH for what came in float32
Keys = tuple[str, ...]


class Predictions:
    """What the formula gives with some mistakes in it, computed once, against what a student gave."""

    def __init__(
        self, exercise: Exercise, every: Sequence[Seen], broken: Sequence[Case], near: float
    ):
        self.exercise, self.every, self.near = exercise, every, near
        self.names = list(every[0].want)
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

    def agrees(self, keys: Keys, name: str, number: int, truth: bool = False) -> bool:
        """Whether these mistakes give what the student has in a case, or what is right."""
        seen, predicted = self.every[number], self.of(keys, number)
        if predicted is None:
            return False
        got = seen.want[name] if truth else seen.got.get(name)
        return same(got, predicted.get(name), seen.mag.get(name), EXACT if truth else self.near)

    def fits(self, keys: Keys, names: Iterable[str]) -> bool:
        """Whether the student's values of some outputs are those of these mistakes, in every case."""
        names = list(names)
        everywhere = all(
            self.agrees(keys, name, number) for number in range(len(self.every)) for name in names
        )
        return everywhere and all(self._raises(given, keys) for given in self.broken)

    def touched(self, keys: Keys, number: int) -> set[str]:
        """The outputs that mistakes change in a case."""
        return {name for name in self.names if not self.agrees(keys, name, number, truth=True)}

    def _raises(self, given: Mapping[str, object], keys: Keys) -> bool:
        """Whether the formula cannot be computed, either, where the student's code stopped."""
        try:
            self.exercise.predict(given, keys)  # type: ignore[arg-type]
        except (ValueError, IndexError, TypeError):
            return True
        return False


def explain(
    exercise: Exercise, every: Sequence[Seen], wrong: Sequence[str], broken: Sequence[Case] = ()
) -> list[str]:
    """Sentences, none when nothing known fits; `broken` are the cases in which the code stopped."""
    for near in (EXACT, ROUGH):
        p = Predictions(exercise, every, broken, near)
        one = [(key,) for key in exercise.mistakes if p.fits((key,), p.names)]
        elsewhere = [] if broken else golden_names(exercise, every, near)
        if found := _said(exercise, one):
            seeded = [] if broken else seeded_names(exercise, every, near)
            return [found + _also(elsewhere, seeded)]
        if not one:
            if found := _said(exercise, _pairs(exercise, p)):
                return [found]
            if len(elsewhere) == 1:
                return [f"{elsewhere[0]}."]
            if sentences := _each(exercise, p, wrong):
                return sentences
    return []


def _also(golden: Sequence[str], seeded: Sequence[str]) -> str:
    """What golden check and the kill table call it."""
    places = [("In golden check", golden), ("In the kill table", seeded)]
    known = [f"{place}: {' or '.join(names)}." for place, names in places if 0 < len(names) <= 2]
    return f" ({' '.join(known)})" if known else ""


def _said(exercise: Exercise, fit: Sequence[Keys]) -> str:
    """The sentence of what fits, if it is one thing."""
    texts = {" And ".join(exercise.mistakes[k] for k in keys) for keys in fit}
    return texts.pop() if len(texts) == 1 else ""


def _pairs(exercise: Exercise, p: Predictions) -> list[Keys]:
    """Two mistakes at once: those that can be, seen from what each does alone in the first case."""
    picks = exercise.keys(p.every[0].given)
    keys = exercise.mistakes if exercise.paired is None else exercise.paired
    touched = {key: p.touched((key,), 0) for key in keys}
    alike = {key: {n for n in p.names if p.agrees((key,), n, 0)} for key in keys}
    right = {n for n in p.names if p.agrees((), n, 0)}
    return [
        (a, b)
        for a, b in itertools.combinations(keys, 2)
        if picks[a] != picks[b]
        and set(p.names) - touched[a] - touched[b] <= right
        and touched[a] - touched[b] <= alike[a]
        and touched[b] - touched[a] <= alike[b]
        and p.fits((a, b), p.names)
    ]


def _each(exercise: Exercise, p: Predictions, wrong: Sequence[str]) -> list[str]:
    """Mistakes that explain some wrong outputs: first the one that explains the most of them."""
    fit = {n: {key for key in exercise.mistakes if p.fits((key,), [n])} for n in wrong}
    sentences = []
    while left := [n for n in fit if fit[n]]:
        count = {key: sum(key in fit[n] for n in left) for n in left for key in fit[n]}
        most = max(count.values())
        best = _least(p, [key for key in count if count[key] == most])
        names = [n for n in left if best[0] in fit[n]]
        if text := _said(exercise, [(key,) for key in best if all(key in fit[n] for n in names)]):
            sentences.append(f"{', '.join(names)}: {text}")
        for name in names:
            del fit[name]
    return sentences


def _least(p: Predictions, keys: Sequence[str]) -> list[str]:
    """Of mistakes that give some outputs alike, those that leave most of the others right."""
    touched = {key: len(p.touched((key,), len(p.every) // 2)) for key in keys}
    fewest = min(touched.values())
    return [key for key in keys if touched[key] == fewest]
