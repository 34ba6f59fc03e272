"""One gradient against the truth: random full directions see every entry, some are looked at alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mesp_ref.verify.conventions import PLAIN, Convention, symmetric
from mesp_ref.verify.pair import Array, Arrays, Pair, eps
from mesp_ref.verify.result import Finding, misfit
from mesp_ref.verify.slopes import Slope
from mesp_ref.verify.truth import Truth, random_direction

CAP = 1e-3  # of a gradient's own size: a gate wider than that proves nothing
SUSPECTS = 24  # entries beyond the gate that are looked at again


@dataclass(frozen=True)
class Ruling:
    """What came of a second look: "ok", "unsure" or "fail", the value expected, and why."""

    verdict: str
    expected: float
    why: str = ""


@dataclass
class Judge:
    """The gradients of a pair at a point, and the truth they are held against.

    grads        one per leaf, as the backward returned them
    rtol         of Σ|dy·∂y/∂x|; by default 1e-10 in float64, 1e-5 in float32, 4 units below
    entries      how many entries of each leaf may be looked at one by one
    looked       filled in: how many were
    """

    truth: Truth
    pair: Pair
    dys: Arrays
    grads: dict[int, Any]
    rng: np.random.Generator
    rtol: float | None
    entries: int
    conventions: dict[int, Convention]
    looked: dict[int, tuple[int, int]] = field(default_factory=dict)

    def findings(self) -> Iterator[Finding]:
        """One per leaf: the first defect, or how close it came."""
        for leaf in self.pair.places:
            found = LeafJudge(self, leaf).finding()
            yield self._by_symmetry(leaf, found) if found.failed else found

    def _by_symmetry(self, leaf: int, found: Finding) -> Finding:
        """A failure at a symmetric matrix that holds along symmetric directions may be meant so."""
        x = self.pair.point[leaf]
        square = x.ndim >= 2 and x.shape[-1] == x.shape[-2] > 1
        if leaf in self.conventions or not square or not np.array_equal(x, np.swapaxes(x, -1, -2)):
            return found
        said = replace(self, conventions=self.conventions | {leaf: symmetric})
        if not LeafJudge(said, leaf).finding().passed:
            return found
        name = self.pair.names[leaf]
        hint = (
            f" Right along symmetric directions: if so meant, conventions={{{name!r}: symmetric}}."
        )
        return replace(found, judged=False, failed=False, meaning=found.meaning + hint)

    @cached_property
    def longer(self) -> tuple[Truth, dict[int, Array]] | None:
        """Truth and gradients in a longer arithmetic, where both run in it."""
        own = max(eps(self.pair.point[i].dtype) for i in self.pair.places)
        truth = self.truth.extended() if own <= eps(np.float64) else self.truth
        if truth is None or truth.pair is self.pair:
            return None
        try:
            grads = truth.pair.gradients(truth.dys)
            made = {i: np.asarray(g) for i, g in grads.items() if g is not None}
        except Exception:  # float64 may be all that a stranger's function knows
            return None
        fits = all(made[i].dtype == truth.pair.point[i].dtype for i in made)
        return (truth, made) if fits else None


@dataclass
class LeafJudge:
    """The judgement of one leaf."""

    judge: Judge
    leaf: int

    def finding(self) -> Finding:
        """Shape and dtype first, then NaN and infinity, single entries, full directions."""
        x, got = self.x, self.judge.grads.get(self.leaf)
        got = np.zeros_like(x) if got is None else got
        wrong = misfit(got, x, finite=False)
        if wrong is not None:
            return self._made("fail", math.inf, 0.0, wrong + ".")
        self.got = np.asarray(got).astype(np.float64)
        self.fit = np.isfinite(self.got) & np.isfinite(np.asarray(x, np.float64))
        for step in (self._held, self._non_finite):
            failed = step()
            if failed is not None:
                return failed
        self._measure()
        return self._verdict()

    @property
    def x(self) -> Array:
        return self.judge.pair.point[self.leaf]

    @property
    def convention(self) -> Convention:
        return self.judge.conventions.get(self.leaf, PLAIN)

    def slope(self, v: Array) -> Slope:
        """The truth along v, as the convention has it."""
        found, factor = self.judge.truth.along({self.leaf: v}), self.convention.factor
        return Slope(factor * found.value, abs(factor) * found.error, abs(factor) * found.mag)

    def unit(self, at: tuple[int, ...]) -> Array:
        """The direction of one entry."""
        v = np.zeros(self.x.shape)
        v[at] = 1.0
        return self.convention.directions(v)

    def along(self, v: Array, of: Array | None = None) -> float:
        """⟨gradient, v⟩ over what is finite."""
        return float((np.where(self.fit, self.got if of is None else of, 0) * v).sum())

    def _made(
        self, verdict: str, error: float, gate: float, meaning: str, index: tuple[int, ...] = (),
        got: Any = None, expected: Any = None, by: str = "",
    ) -> Finding:  # fmt: skip
        name = self.judge.pair.names[self.leaf]
        by = by or self.judge.truth.name
        return Finding(by, "your op", name, error, gate, meaning, index, got, expected,
                       judged=verdict != "unsure", failed=verdict == "fail")  # fmt: skip

    def _held(self) -> Finding | None:
        if self.convention.held is None:
            return None
        off = np.where(self.convention.held(self.x), np.abs(self.got), 0)
        if not off.size or off.max() == 0:
            return None
        at = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
        meaning = f"By convention: {self.convention.says}."
        return self._made("fail", float(off[at]), 0.0, meaning, at, float(self.got[at]), 0.0)

    def _non_finite(self) -> Finding | None:
        """NaN or infinity is a failure where a one-sided slope of the forward is finite."""
        for at in map(tuple, np.argwhere(~np.isfinite(self.got))[:SUSPECTS]):
            index = tuple(int(i) for i in at)
            if not np.isfinite(np.asarray(self.x[index], np.float64)):
                expected = 0.0
            else:
                sides = self.judge.truth.one_sided({self.leaf: self.unit(index)})
                known = [s.value for s in sides if s.is_finite]
                if not known:
                    continue
                expected = known[0]
            meaning = f"found NaN or infinity, where the forward's slope is finite. {self._where()}"
            return self._made(
                "fail", math.inf, 0.0, meaning, index, float(self.got[index]), expected
            )
        return None

    def _where(self) -> str:
        looked, total = self.judge.looked.get(self.leaf, (0, self.x.size))
        seen = "" if looked in (0, total) else f", {looked} of its {total} entries seen one by one"
        said = "" if self.convention is PLAIN else f" By convention: {self.convention.says}."
        name = self.judge.pair.names[self.leaf]
        return f"{name} is {list(self.x.shape)}{seen}.{said}"

    def _measure(self) -> None:
        """The truth at some entries and along some directions, and the gates that follow."""
        flat = np.flatnonzero(self.fit)
        if len(flat) > self.judge.entries:
            flat = np.sort(self.judge.rng.choice(flat, self.judge.entries, replace=False))
        self.judge.looked[self.leaf] = len(flat), self.x.size
        self.at = [tuple(int(i) for i in np.unravel_index(k, self.x.shape)) for k in flat]
        self.units = [self.slope(self.unit(at)) for at in self.at]
        self.full = [(v, self.slope(v)) for v in self._directions()]
        slopes = [*self.units, *(s for _, s in self.full)]
        norms = [1.0] * len(self.units) + [
            float(np.sqrt((v * v).sum())) or 1.0 for v, _ in self.full
        ]
        known = [(s, n) for s, n in zip(slopes, norms, strict=True) if np.isfinite(s.value)]
        self.size = max((abs(s.value) / n for s, n in known), default=0.0)
        self.mag = max([s.mag for s in self.units if np.isfinite(s.mag)] + [self.size])
        self.error = max((s.error / n for s, n in known), default=math.inf)
        dtype, truth = self.x.dtype, self.judge.truth
        low = eps(dtype) > eps(np.float32)
        default = 4 * eps(dtype) if low else 1e-5 if dtype == np.float32 else 1e-10
        self.relative = default if self.judge.rtol is None else self.judge.rtol
        self.cap = max(CAP, 16 * eps(dtype) if low else 0, self.judge.rtol or 0) * self.size
        finite = np.abs(np.asarray(self.x, np.float64)[np.isfinite(np.asarray(self.x, np.float64))])
        homogeneous = truth.size / (float(finite.max(initial=0)) or 1.0)
        self.floor = 16 * max(eps(dtype), truth.unit) * max(self.mag, homogeneous)

    def _directions(self) -> Iterator[Array]:
        """Two random ones through all entries, one past zeros and ties (where kinks are), all alike."""
        rng, truth = self.judge.rng, self.judge.truth
        usable = self.fit.astype(np.float64)
        for _ in range(2):
            yield self.convention.directions(random_direction(truth, self.leaf, rng) * usable)
        _, back, counts = np.unique(self.x, return_inverse=True, return_counts=True)
        lone = (counts[back.reshape(self.x.shape)] == 1) & (self.x != 0)
        if not lone.all() and lone.any():
            yield self.convention.directions(
                random_direction(truth, self.leaf, rng) * usable * lone
            )
        if not lone.all() and self.x.size > 1:
            yield self.convention.directions(usable)

    def _verdict(self) -> Finding:
        if self.error > CAP * self.size or self.size == 0:
            return self._of_nothing()
        worst, unsure = (0.0, self._gate(Slope(0.0, 0.0), 1)), None
        where: tuple[int, ...] = ()
        beyond = []
        for at, truth in zip(self.at, self.units, strict=True):
            error = self._off(self.along(self.unit(at)), truth)
            gate = min(self._gate(truth, 1), self.cap)
            if error > gate:
                beyond.append((error, at, truth))
            elif error >= worst[0]:
                worst, where = (error, gate), at
        beyond.sort(key=lambda b: -b[0])
        for _, at, truth in beyond[:SUSPECTS]:
            found = self._entry(at, truth)
            if found is not None and found.failed:
                return found
            unsure = unsure or found
        found = self._full_directions()
        if found is not None and (found.failed or unsure is None):
            return found
        if unsure is not None:
            return unsure
        return self._made("ok", worst[0], worst[1], self._where(), where)

    def _off(self, got: float, truth: Slope) -> float:
        error = abs(got - truth.value)
        return error if math.isfinite(error) else math.inf

    def _gate(self, truth: Slope, entries: float) -> float:
        """What rounding and the error of the truth can explain."""
        near = truth.error if math.isfinite(truth.error) else 0.0
        return self.relative * self.mag * entries + self.floor * entries + near

    def _entry(self, at: tuple[int, ...], truth: Slope) -> Finding | None:
        """A second look at an entry beyond its gate."""
        v = self.unit(at)
        ruling = self._again(v, self.along(v), truth, 1.0)
        if ruling.verdict == "ok":
            return None
        name = self.judge.truth.name
        meaning = (
            f"Expected is the derivative by {name} of ⟨dy, forward⟩; {self._where()}{ruling.why}"
        )
        error = abs(self.along(v) - ruling.expected)
        return self._made(ruling.verdict, error, min(self._gate(truth, 1), self.cap), meaning, at,
                          self.along(v), ruling.expected)  # fmt: skip

    def _full_directions(self) -> Finding | None:
        """The first direction that does not fit, traced to an entry where that can be."""
        unsure = None
        for v, truth in self.full:
            root = float(np.sqrt((v * v).sum()))
            got = self.along(v)
            gate = min(self._gate(truth, 4 * root), self.cap * root)
            if self._off(got, truth) <= gate:
                continue
            at = self._traced(v)
            found = self._entry(at, self.slope(self.unit(at)))
            if found is None:
                ruling = self._again(v, got, truth, 4 * root)
                if ruling.verdict != "ok":
                    meaning = f"Along a random direction through all entries. {self._where()}"
                    found = self._made(ruling.verdict, abs(got - ruling.expected), gate,
                                       meaning + ruling.why, (), got, ruling.expected,
                                       f"{self.judge.truth.name}, full directions")  # fmt: skip
            if found is not None and found.failed:
                return found
            unsure = unsure or found
        return unsure

    def _traced(self, v: Array) -> tuple[int, ...]:
        """The entry that a direction's error comes from, by halving."""
        inside = np.flatnonzero(v)
        while len(inside) > 1:
            halves = inside[: len(inside) // 2], inside[len(inside) // 2 :]
            errors = []
            for half in halves:
                part = np.zeros(v.size)
                part[half] = v.reshape(-1)[half]
                part = part.reshape(v.shape)
                errors.append(self._off(self.along(part), self.slope(part)))
            inside = halves[int(errors[1] > errors[0])]
        return tuple(int(i) for i in np.unravel_index(int(inside[0]), v.shape))

    def _again(self, v: Array, got: float, truth: Slope, entries: float) -> Ruling:
        """Is it a kink, an infinite slope, a blind spot of the truth, or rounding? Else it is wrong."""
        factor = self.convention.factor
        sides = self.judge.truth.one_sided({self.leaf: v})
        ahead, behind = (Slope(factor * s.value, abs(factor) * s.error) for s in sides)
        slack = self.relative * self.mag * entries + 1e-6 * self.size * entries
        known = [s for s in (ahead, behind) if math.isfinite(s.value)]
        if any(math.isinf(s.value) for s in (ahead, behind)):
            return Ruling("unsure", truth.value, " The slope is infinite there.")
        if known and all(s.error <= 1e-3 * max(abs(s.value), self.size) for s in known):
            low, high = min(s.value for s in known), max(s.value for s in known)
            blur = 4 * sum(s.error for s in known) + slack
            if high - low > blur or (len(known) == 1 and not truth.known):
                if low - blur <= got <= high + blur:
                    return Ruling("ok", truth.value, "a kink")
                near = [low, high, *self._nearby(v)]
                low, high = min(near), max(near)
                blur += 1e-2 * (high - low)
                if low - blur <= got <= high + blur:
                    return Ruling("ok", truth.value, "a kink of several pieces")
                if len(known) == 2 and entries > 1:
                    return Ruling("ok", truth.value, "kinked along this direction")
                why = f" It is a kink: any value from {low:.6g} to {high:.6g} would do."
                return Ruling("fail", low if got < low else high, why)
        real = self._real(v)
        if real.known and abs(got - real.value) <= real.error + self.relative * self.mag * entries:
            return Ruling("ok", real.value, "differences see what complex step does not")
        return self._rounded(v, got, truth, entries)

    def _nearby(self, v: Array) -> Iterator[float]:
        """Slopes along v at points close by, where ties are broken: their hull is what a kink allows."""
        truth = self.judge.truth
        x, scale = truth.pair.point[self.leaf], truth.scale(self.leaf)
        for _ in range(16):
            off = 1e-3 * scale * self.judge.rng.standard_normal(x.shape)
            moved = (x + np.where(np.isfinite(x), off, 0)).astype(x.dtype)
            try:
                found = replace(truth, pair=truth.pair.at({self.leaf: moved})).along({self.leaf: v})
            except Exception:  # outside of the domain
                continue
            if found.error <= 1e-3 * max(abs(found.value), self.size):
                yield found.value * self.convention.factor

    def _real(self, v: Array) -> Slope:
        """Differences, where the truth was complex step."""
        found = replace(self.judge.truth, name="richardson").along({self.leaf: v})
        factor = self.convention.factor
        return Slope(factor * found.value, abs(factor) * found.error, abs(factor) * found.mag)

    def _rounded(self, v: Array, got: float, truth: Slope, entries: float) -> Ruling:
        """Right in longer arithmetic: rounding, then; else the error stands or cannot be judged."""
        error = self._off(got, truth)
        if not math.isfinite(truth.value):
            return Ruling("unsure", truth.value, " No truth could be had there.")
        longer = self.judge.longer
        if longer is not None and self.leaf in longer[1]:
            found = longer[0].along({self.leaf: v}).value * self.convention.factor
            there = float((np.where(self.fit, longer[1][self.leaf], 0) * v).sum())
            near = 1e-10 * (self.mag + self.size) * entries + 1e-13 * abs(found)
            if abs(there - found) <= max(near, abs(got - there) / 16):
                why = " In longer arithmetic the formula is right; here rounding eats it."
                small = abs(got - found) <= self.cap * entries
                return Ruling("ok" if small else "unsure", found, why)
            blur = self.floor * entries * longer[0].unit / eps(self.x.dtype)
            if abs(there - found) > near + blur + 10 * truth.error + abs(got - there):
                return Ruling("fail", truth.value)
        if error <= self._gate(truth, entries) + 16 * self._noise(v):
            small = error <= self.cap * entries
            return Ruling("ok" if small else "unsure", truth.value, " Rounding could explain it.")
        return Ruling("fail", truth.value)

    def _noise(self, v: Array) -> float:
        """How far ⟨gradient, v⟩ moves when every input is scaled by some units; zeros and ties stay."""
        pair, seen = self.judge.pair, [0.0]
        for k in (1, -1, 3, -5):
            factor = 1 + k * eps(self.x.dtype)
            moved = {i: (pair.point[i] * factor).astype(pair.point[i].dtype) for i in pair.places}
            try:
                other = pair.at(moved).gradients(self.judge.dys)[self.leaf]
                seen.append(abs(self.along(v, np.asarray(other, np.float64)) - self.along(v)))
            except Exception:  # next to the end of its domain
                continue
        return max(s for s in seen if math.isfinite(s))

    def _of_nothing(self) -> Finding:
        """No slope is known to three digits: zero for certain, or not to be judged."""
        zero = self.error <= 2.0**-370 and self.size <= 2.0**-380
        zero = zero or self.judge.truth.is_constant(self.leaf)
        gate = 16 * self.floor + self.relative * self.mag + (0 if zero else self.error)
        worst: tuple[float, float, float, tuple[int, ...]] = (0.0, 0.0, 0.0, ())
        for at, truth in zip(self.at, self.units, strict=True):
            got, expected = self.along(self.unit(at)), 0.0 if zero else truth.value
            if not math.isfinite(expected):
                continue
            error = abs(got - expected)
            if error > max(gate, worst[0]) and self._entry(at, Slope(expected, 0.0)) is None:
                continue  # a kink
            worst = max(worst, (error, got, expected, at), key=lambda w: w[0])
        error, got, expected, at = worst
        verdict = "fail" if error > gate else "ok" if zero else "unsure"
        meaning = f"Expected is the derivative by {self.judge.truth.name}; {self._where()}"
        if verdict == "unsure":
            meaning = f"The truth is known to {self.error:.2g} only, its size is {self.size:.2g}."
        return self._made(verdict, error, gate, meaning, at, got, expected)
