"""What an exercise is: one row, of the function to be written, its cases and its usual mistakes."""

import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import OPS, Args, OpSpec, Sizes, again
from mesp_ref.registry.row import parameters

Outputs = dict[str, Any]  # gradients by name; None where there is none
Draw = Callable[[np.random.Generator], Args]


class Case(NamedTuple):
    """Inputs of one kind: `draw` gives the arguments of the function anew at every call."""

    name: str
    note: str
    draw: Draw
    forward: Draw | None = None  # of an op: the arguments of its forward, and "dy"


class Given(dict[str, Any]):
    """Arguments by name, and the fields of `res` beside them: `g.x` for `g["x"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Wrong:
    """The mistakes that a formula is to make this time.

    `pick(right, key=other, …)` is where a formula can go wrong: `right`, or what stands under the
    key of a mistake that was asked for. What is expensive, or may not have the right shape, may be
    a function. `met` remembers every key and the pick it belongs to.
    """

    def __init__(self, keys: Iterable[str] = ()):
        self.keys = frozenset(keys)
        self.met: dict[str, int] = {}
        self._picks = 0

    def pick(self, right: Any, **others: Any) -> Any:
        self._picks += 1
        self.met |= dict.fromkeys(others, self._picks)
        for key in others.keys() & self.keys:
            return others[key]() if callable(others[key]) else others[key]
        return right

    def __contains__(self, key: str) -> bool:
        """A mistake that no pick can hold."""
        self._picks += 1
        self.met[key] = self._picks
        return key in self.keys


Formula = Callable[[Given, Wrong], Outputs]


def no_places(g: Given, want: Outputs) -> dict[str, dict[str, Array]]:
    """No entries of any output have a name of their own."""
    return {}


def named_outputs(names: tuple[str, ...]) -> Callable[[Any], Outputs]:
    """What a function returned, by name. Raises ValueError, in a student's words."""

    def named(returned: Any) -> Outputs:
        if isinstance(returned, dict) and set(names) <= set(returned):
            return {name: returned[name] for name in names}
        if len(names) == 1:
            single = isinstance(returned, tuple) and len(returned) == 1
            return {names[0]: returned[0] if single else returned}
        if not isinstance(returned, tuple | list):
            what = "None: is a `return` missing?" if returned is None else "one value"
            raise ValueError(f"expected {len(names)} results, {', '.join(names)}; found {what}")
        if len(returned) != len(names):
            raise ValueError(
                f"expected {len(names)} results, {', '.join(names)}; found {len(returned)}"
            )
        return dict(zip(names, returned, strict=True))

    return named


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise.

    function    the truth: what the student writes has its signature; proven elsewhere
    title       what it is about, in a few words
    about       functions whose docstrings state the exercise: equation and shapes are read from them
    named       what a function returns, as gradients by name
    formula     the function once more, with every usual mistake in it (see Wrong)
    mistakes    by key: what the tutor says
    hints       of levels 1 and 2; level 3 is the line "Backward" of the docstring
    numbers     by name: sizes and constants that a wrong factor may be made of
    places      by output: entries that have a name of their own, such as ignored rows
    magnitudes  how large the terms are that each output is summed from
    op          the row of the registry that it is about, where it is about one op
    paired      the mistakes that are also looked for two at a time; None for all
    """

    name: str
    title: str
    function: Callable[..., Any]
    about: tuple[Callable[..., Any], ...]
    named: Callable[[Any], Outputs]
    cases: tuple[Case, ...]
    formula: Formula
    mistakes: Mapping[str, str]
    hints: tuple[str, str]
    numbers: Callable[[Given], Mapping[str, float]]
    places: Callable[[Given, Outputs], dict[str, dict[str, Array]]] = no_places
    magnitudes: Callable[[Args, Outputs], Outputs] | None = None
    given: str = ""
    op: str = ""
    paired: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()
    extra: Callable[[Given], Mapping[str, Any]] = field(default=lambda g: {})

    def draw(self, case: Case) -> Args:
        """The arguments of a case, the same at every call, in arrays of their own."""
        return case.draw(self._rng(case))

    def forward(self, case: Case) -> Args:
        """The arguments of the op's forward in a case, and "dy"."""
        assert case.forward is not None
        return case.forward(self._rng(case))

    def _rng(self, case: Case) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.name}/{case.name}".encode()))

    def truth(self, case: Case) -> Outputs:
        found = self.named(self.function(**self.draw(case)))
        return {n: None if value is None else np.asarray(value) for n, value in found.items()}

    def pool(self, case: Case) -> Given:
        """Arguments, and the fields of the residuals."""
        args = self.draw(case)
        fields: Args = getattr(args.get("res"), "_asdict", dict)()
        return Given(fields | args)

    def predict(self, given: Given, keys: Iterable[str]) -> Outputs:
        """What the formula gives with some mistakes in it."""
        with np.errstate(all="ignore"):
            return self.formula(given, Wrong(keys))

    def keys(self, given: Given) -> dict[str, int]:
        """Every mistake that the formula can make, and the pick it belongs to."""
        wrong = Wrong()
        with np.errstate(all="ignore"):
            self.formula(given, wrong)
        return wrong.met

    @property
    def parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())


# -- exercises about one op of the registry ---------------------------------------------------

SMALL = Sizes(n=1, t=2, past=0, c=3, g=1, share=1, d=2, f=2, v=5, r=1)
UNEVEN = Sizes(n=3, t=5, past=2, c=7, g=2, share=3, d=4, f=9, v=11, r=2)
ONE_TOKEN = Sizes(n=2, t=1, past=0, c=5, g=3, share=2, d=6, f=4, v=7, r=3)
LARGE = Sizes(n=2, t=4, past=0, c=6, g=3, share=2, d=8, f=5, v=13, r=4)


def same(args: Args) -> Args:
    return args


def op_case(
    row: OpSpec,
    backward: Callable[..., Any],
    name: str,
    note: str,
    sizes: Sizes,
    change: Callable[[Args], Args] = same,
) -> Case:
    """A case of an op: its own sample, run forward, and a random cotangent."""
    first = parameters(backward).names[0]

    def forward(rng: np.random.Generator) -> Args:
        args = change(row.sample(rng, sizes, np.float64))
        y, _ = row.forward(**args)
        return args | {"dy": rng.standard_normal(np.shape(y)) if np.shape(y) else 0.7}

    def draw(rng: np.random.Generator) -> Args:
        args = forward(rng)
        dy = args.pop("dy")
        _, res = row.forward(**args)
        return {first: dy, "res": res, **again(backward, args)}

    return Case(name, note, draw, forward)


def op_magnitudes(row: OpSpec, params: bool, names: tuple[str, ...]) -> Callable[..., Outputs]:
    """The row's own rule of how large the terms of a backward are."""
    rule = row.magnitude_params if params else row.magnitude
    assert rule is not None

    def magnitudes(args: Args, want: Outputs) -> Outputs:
        values = list(args.values())
        found = rule(np.abs(values[0]), values[1], **again(rule, args))
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    return magnitudes


def of_op(
    op: str,
    *,
    params: bool = False,
    cases: Iterable[tuple[Any, ...]],
    outputs: str,
    **more: Any,
) -> Exercise:
    """The row of an exercise about one op: what the registry knows is not said again.

    cases   (name, note, sizes[, change]) each
    """
    row = OPS[op]
    function = row.backward_params if params else row.backward
    function = more.pop("function", function)
    assert function is not None
    names = tuple(outputs.split())
    return Exercise(
        **{
            "op": op,
            "name": function.__name__,
            "function": function,
            "about": (row.forward, row.backward_params if params else row.backward),
            "named": named_outputs(names),
            "cases": tuple(op_case(row, function, *case) for case in cases),
            "magnitudes": op_magnitudes(row, params, names),
            **more,
        }
    )
