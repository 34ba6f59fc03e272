"""How a pair must behave, whatever it computes: pure, repeatable, linear, blind to memory layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesp_ref.verify.layouts import LAYOUTS, expanded
from mesp_ref.verify.pair import Array, Arrays, Pair, eps, is_float
from mesp_ref.verify.result import Finding, misfit
from mesp_ref.verify.tree import leaves

Grads = dict[int, Any]
LARGE = 4096  # entries in all, from which on layouts are tried together


def finding(check: str, ok: bool, meaning: str, argument: str = "all", **more: Any) -> Finding:
    """A check that holds or does not."""
    return Finding(check, "your op", argument, 0.0 if ok else np.inf, 0.0, meaning, **more)


def unchanged(before: Arrays, after: Any) -> list[bool]:
    """Which arrays are still what they were, bit for bit."""
    now = [leaf for _, leaf in leaves(after)]
    return [
        not isinstance(a, np.ndarray) or a.tobytes() == np.asarray(b).tobytes()
        for a, b in zip(before, now, strict=True)
    ]


def forward_is_pure(pair: Pair) -> Iterator[Finding]:
    """Its arguments stay as they were, and a second call gives the same."""
    arguments = pair.arguments()
    first = [np.array(y) for _, y in leaves(pair.forward(*arguments))]
    for name, same in zip(pair.names, unchanged(pair.point, arguments), strict=True):
        if not same:
            yield finding("the forward leaves its inputs alone", False,
                          "The forward wrote into its argument.", name)  # fmt: skip
    again = pair.outputs()
    same = len(first) == len(again) and all(map(_alike, first, again))
    meaning = "The forward is not repeatable: two calls with the same inputs differ."
    yield finding("the forward is repeatable", same, meaning, "y")


def _alike(a: Array, b: Array) -> bool:
    """Equal up to the order of sums in a parallel library."""
    if a.shape != b.shape or not is_float(a):
        return a.shape == b.shape and bool(np.array_equal(a, b))
    a, b = np.asarray(a, np.longdouble), np.asarray(b, np.longdouble)
    size = float(np.abs(a[np.isfinite(a)]).max(initial=0))
    return bool(np.allclose(a, b, 0, 16 * 2.0**-52 * size, equal_nan=True))


@dataclass(frozen=True)
class Behaviour:
    """Checks of the backward of a pair against its own gradients at the same point.

    grads   at `dys`, already found right
    floors  per leaf: what rounding may do to the gradient
    """

    pair: Pair
    dys: Arrays
    grads: Grads
    floors: dict[int, float]

    def check(self, rng: np.random.Generator) -> Iterator[Finding]:
        """Every behaviour in turn."""
        yield from self.pure()
        yield from self.linear(rng)
        yield from self.one_output_alone()
        yield from self.layouts()

    def compared(self, check: str, got: Grads, expected: Grads, meaning: str, slack: float = 1.0,
                 sizes: dict[int, float] | None = None) -> Iterator[Finding]:  # fmt: skip
        """Gradients that must agree up to rounding; where the expected is not finite, nothing is."""
        for leaf, name in ((i, self.pair.names[i]) for i in self.pair.places):
            a, b = (
                _dense(got.get(leaf), self.pair, leaf),
                _dense(expected.get(leaf), self.pair, leaf),
            )
            wrong = misfit(a, self.pair.point[leaf], finite=False)
            if wrong is not None:
                yield finding(check, False, f"{wrong}.", name)
                continue
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            keep = np.isfinite(b)
            size = max(float(np.abs(b[keep]).max(initial=0)), (sizes or {}).get(leaf, 0.0))
            size = max(size, max(float(np.abs(dy).max(initial=0)) for dy in self.dys))
            unit = eps(self.pair.point[leaf].dtype)
            gate = slack * (4096 * unit * size + self.floors.get(leaf, 0.0))
            error = np.where(keep, np.abs(a - b), 0)
            error = np.where(np.isfinite(error), error, np.inf)
            if error.size and error.max() > gate:
                gate += 16 * self.noise(leaf)
            if not error.size or error.max() <= gate:
                yield Finding(check, "your op", name, float(error.max(initial=0)), gate, meaning)
                continue
            at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
            yield Finding(check, "your op", name, float(error[at]), gate, meaning, at,
                          float(a[at]), float(b[at]))  # fmt: skip

    def noise(self, leaf: int) -> float:
        """How far a gradient moves when every input is scaled by some units: its own rounding."""
        here, seen = np.asarray(_dense(self.grads.get(leaf), self.pair, leaf), np.float64), [0.0]
        for k in (1, -1, 3):
            moved = {
                i: (self.pair.point[i] * (1 + k * eps(self.pair.point[i].dtype))).astype(
                    self.pair.point[i].dtype
                )
                for i in self.pair.places
            }
            try:
                there = self.pair.at(moved).gradients(self.dys).get(leaf)
                off = np.abs(np.asarray(_dense(there, self.pair, leaf), np.float64) - here)
                seen.append(float(off[np.isfinite(off)].max(initial=0)))
            except Exception:  # next to the end of its domain
                continue
        return max(seen)

    def pure(self) -> Iterator[Finding]:
        """Inputs and cotangents stay as they were, and a second call gives the same."""
        arguments, dys = self.pair.arguments(), tuple(dy.copy() for dy in self.dys)
        again = self.pair.call_backward(dys, arguments)
        again = {i: None if g is None else np.array(g) for i, g in again.items()}
        for name, same in zip(self.pair.names, unchanged(self.pair.point, arguments), strict=True):
            if not same:
                yield finding("inputs unchanged", False, "The backward wrote into its input.", name)
        if not all(unchanged(self.dys, list(dys))):
            yield finding("inputs unchanged", False, "The backward wrote into the cotangent.", "dy")
        yield from self.compared(
            "repeatable", again, self.grads, "Two calls with the same inputs differ."
        )
        yield from self.lasting()

    def lasting(self) -> Iterator[Finding]:
        """What a call returned is still that after another call: no buffer is used again."""
        first = self.pair.gradients(self.dys)
        before = {i: None if g is None else np.array(g) for i, g in first.items()}
        self.pair.gradients(tuple(-2 * dy for dy in self.dys))
        for leaf, was in before.items():
            if was is not None and was.tobytes() != np.asarray(first[leaf]).tobytes():
                meaning = "The next call wrote into the gradient that this one returned."
                yield finding("a gradient of its own", False, meaning, self.pair.names[leaf])

    def linear(self, rng: np.random.Generator) -> Iterator[Finding]:
        """backward(2·dy₁ − dy₂) = 2·backward(dy₁) − backward(dy₂), and backward(0) = 0"""
        others = tuple(
            (dy != 0) * rng.standard_normal(dy.shape).astype(dy.dtype) for dy in self.dys
        )
        others = tuple(np.asarray(o, dy.dtype) for o, dy in zip(others, self.dys, strict=True))
        mixed = tuple(np.asarray(2 * a - b, a.dtype) for a, b in zip(self.dys, others, strict=True))
        two, both = self.pair.gradients(others), self.pair.gradients(mixed)
        expected, sizes = {}, {}
        for leaf in self.pair.places:
            a, b = (np.asarray(_dense(g.get(leaf), self.pair, leaf), np.float64)
                    for g in (self.grads, two))  # fmt: skip
            expected[leaf] = 2 * a - b
            sizes[leaf] = max(float(np.abs(g[np.isfinite(g)]).max(initial=0)) for g in (a, b))
        meaning = "A vector-Jacobian product is linear in dy; expected 2·g(dy₁) − g(dy₂)."
        yield from self.compared("linear in dy", both, expected, meaning, 16, sizes)
        none = self.pair.gradients(tuple(np.zeros_like(dy) for dy in self.dys))
        zero = {i: np.where(np.isfinite(_dense(g, self.pair, i)), 0.0, np.nan)
                for i, g in self.grads.items()}  # fmt: skip
        yield from self.compared("zero for dy = 0", none, zero, "Expected 0: nothing flows back.")

    def one_output_alone(self) -> Iterator[Finding]:
        """Of several outputs only one is used: the others' cotangents are zero."""
        if len(self.dys) < 2:
            return
        total: dict[int, Any] = dict.fromkeys(self.pair.places, 0.0)
        for k in range(len(self.dys)):
            alone = tuple(dy if j == k else np.zeros_like(dy) for j, dy in enumerate(self.dys))
            for leaf, grad in self.pair.gradients(alone).items():
                total[leaf] = total[leaf] + np.asarray(_dense(grad, self.pair, leaf), np.float64)
        meaning = "One output at a time, the others' dy zero: expected the sum of the gradients."
        shaped = {i: np.asarray(t).astype(self.pair.point[i].dtype) for i, t in total.items()}
        yield from self.compared("one output alone", shaped, self.grads, meaning, 16)

    def layouts(self) -> Iterator[Finding]:
        """Arrays in other memory give the same gradients: of the inputs, of dy; of both if large."""
        large = sum(p.size for p in self.pair.point if isinstance(p, np.ndarray)) > LARGE
        for what, laid in LAYOUTS.items():
            point = {i: laid(p) for i, p in enumerate(self.pair.point) if isinstance(p, np.ndarray)}
            arguments, dys = self.pair.at(point).laid_out(), tuple(laid(dy) for dy in self.dys)
            if large:
                yield from self._laid(f"{what} inputs and dy", dys, arguments, self.grads)
                continue
            yield from self._laid(f"{what} inputs", self.dys, arguments, self.grads)
            yield from self._laid(f"{what} dy", dys, self.pair.arguments(), self.grads)
        if len(self.dys) == 1:
            for view, dense in list(expanded(self.dys[0]))[: 1 if large else None]:
                wanted = self.pair.gradients((dense,))
                yield from self._laid("expanded dy", (view,), self.pair.arguments(), wanted)

    def _laid(self, what: str, dys: Arrays, arguments: Any, expected: Grads) -> Iterator[Finding]:
        try:
            got = self.pair.call_backward(dys, arguments)
        except Exception as error:  # whatever a stranger's function raises
            yield finding(what, False, f"{type(error).__name__}: {error}".splitlines()[0])
            return
        yield from self.compared(what, got, expected, "The gradient depends on the memory layout.")


def _dense(grad: Any, pair: Pair, leaf: int) -> Any:
    """None stands for zeros."""
    return np.zeros_like(pair.point[leaf]) if grad is None else grad
