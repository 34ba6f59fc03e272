"""The check of an exercise: call, compare, explain."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.learn import facts
from mesp_ref.learn.call import Call, Told, answer, bound
from mesp_ref.learn.compare import (
    DOUBLE,
    SINGLE,
    Seen,
    first_wrong,
    misfit,
    not_finite,
    seen,
    wrong_names,
)
from mesp_ref.learn.exercise import Exercise
from mesp_ref.learn.exercises import find
from mesp_ref.learn.explain import explain
from mesp_ref.learn.result import Result
from mesp_ref.learn.statement import hints

LEVELS = 3


def check(name: str, function: Any, hint: int = 0) -> Result:
    """Hold a student's function against the truth of an exercise.

    function    has the signature that `show(name)` states; arrays of NumPy, torch or JAX, or lists;
                float32 is accepted and held to float32's tolerance
    hint        0 none, 1 where to look, 2 how to begin, 3 the equation of the backward

    Raises MespRefError for an exercise or a level that there is not. What the student's code does
    wrong, exceptions too, is told in the result.
    """
    exercise = find(name)
    if hint not in range(LEVELS + 1):
        raise MespRefError(f"hint: found {hint!r}, expected 0 to {LEVELS}")
    passed, sentences, named = _judged(exercise, function)
    if not passed:
        sentences += hints(exercise, hint)
        if not hint:
            sentences.append("For a hint: hint=1.")
    return Result(exercise.name, passed, tuple(sentences), tuple(named))


Judged = tuple[bool, list[str], list[str]]


def _judged(exercise: Exercise, function: Any) -> Judged:
    """The verdict, sentences, and what the mistake was called."""
    ran, stopped, changed = list[Seen](), dict[str, str](), dict[str, None]()
    try:
        call = bound(exercise, function)
    except Told as told:
        return False, [str(told)], []
    for case in exercise.cases:
        try:
            got, inputs = answer(exercise, call, case, function)
        except Told as told:
            stopped[case.name] = str(told)
            continue
        ran.append(seen(exercise, case, got))
        changed |= dict.fromkeys(inputs)
    if stopped:
        return _stopped(exercise, ran, stopped)
    if told_shape := _shapes(every := ran):
        named = explain(exercise, every, wrong_names(every, SINGLE))
        about = [] if named else _about_shapes(every)
        return False, told_shape + _like(named) + about, named
    wrong, repeated = wrong_names(every, SINGLE), _repeats(exercise, call, function, every[0])
    if changed and not wrong:
        return False, [_in_place(list(changed)) + " Otherwise the results are right."], []
    if wrong or not repeated:
        _, sentences, named = _wrong(exercise, every, wrong, repeated)
        return False, sentences + ([_in_place(list(changed))] if changed else []), named
    return True, [_praise(every)], []


def _stopped(exercise: Exercise, ran: list[Seen], stopped: dict[str, str]) -> Judged:
    """The code raised in some cases: that, and what can be seen in the others."""
    sentences = [next(iter(stopped.values()))]
    if not ran:
        return False, sentences, []
    wrong = wrong_names(ran, SINGLE)
    where = ", ".join(f"“{s.case.name}”" for s in ran)
    if not wrong:
        return False, [*sentences, f"Where it runs ({where}) the results are right."], []
    named = explain(exercise, ran, wrong, [c for c in exercise.cases if c.name in stopped])
    seen_there = _shapes(ran) or _values(exercise, ran, wrong)
    return False, [*sentences, *seen_there, *_like(named)], named


def _like(named: Sequence[str]) -> list[str]:
    return [f"It looks like this: {text}" for text in named]


def _repeats(exercise: Exercise, call: Call, function: Any, first: Seen) -> bool:
    """Whether a second call with the same inputs gives the same."""
    again, _ = answer(exercise, call, first.case, function)
    return all(
        (a is None) == (again.get(n) is None)
        and (a is None or np.array_equal(a, again[n], equal_nan=a.dtype.kind == "f"))
        for n, a in first.got.items()
    )


def _shapes(every: Sequence[Seen]) -> list[str]:
    """Shapes and types first: nothing else is said until they are right."""
    for each in every:
        if texts := [text for name in each.want if (text := misfit(each, name))]:
            return [f"{text} (case “{each.case.name}”: {each.case.note})." for text in texts]
    return []


def _about_shapes(every: Sequence[Seen]) -> list[str]:
    """What results of the wrong shape are."""
    wrong = [n for n in every[0].want if any(misfit(each, n) for each in every)]
    about = [(name, facts.about_shape(every, name)) for name in wrong]
    return [f"{n}: {text}{'' if text.endswith('?') else '.'}" for n, text in about if text]


def _in_place(changed: list[str]) -> str:
    """Inputs that were written into."""
    names = ", ".join(changed)
    return f"It changes {names} in place: whoever handed it over still needs it as it was."


def _values(exercise: Exercise, every: Sequence[Seen], wrong: Sequence[str]) -> list[str]:
    """The first value that is wrong, and which results are right."""
    right = [name for name in every[0].want if name not in wrong]
    sentences = [not_finite(every, wrong) or first_wrong(every, wrong[0], SINGLE)]
    if right:
        sentences.append(_list(right, "is right", "are right"))
    if len(wrong) > 1:
        sentences.append(_list(wrong, "is wrong", "are wrong"))
    return sentences


def _wrong(exercise: Exercise, every: Sequence[Seen], wrong: list[str], repeated: bool) -> Judged:
    again = (
        [] if repeated else ["It gives other values when it is called again with the same inputs."]
    )
    if not wrong:
        return False, again, []
    named = explain(exercise, every, wrong)
    about = _like(named)
    if not named and not_finite(every, wrong):
        about = ["An overflow, or a division by 0: which number becomes too large or 0 there?"]
    elif not named:
        about = [text for name in wrong for text in facts.about(exercise, every, name)][:MOST_FACTS]
    return False, [*_values(exercise, every, wrong), *again, *about], named


MOST, MOST_FACTS = 8, 4


def _list(names: Sequence[str], one: str, several: str) -> str:
    """Names in a sentence, not all of them where they are many."""
    if len(names) == 1:
        return f"{names[0]} {one}."
    if len(names) > MOST:
        return f"{', '.join(names[:MOST])} and {len(names) - MOST} more {several}."
    return f"{', '.join(names[:-1])} and {names[-1]} {several}."


def _praise(every: Sequence[Seen]) -> str:
    cases = len(every)
    text = f"Every result agrees with the reference in all {cases} cases"
    if wrong_names(every, DOUBLE):
        pairs = [(s, name) for s in every for name in s.want if s.want[name] is not None]
        worst = max(float(s.error(name).max(initial=0)) for s, name in pairs)
        return f"{text}, to {-np.log10(worst):.0f} digits: computed in float32, which is accepted."
    return f"{text}."
