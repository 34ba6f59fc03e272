"""One gradient against the truth: random full directions see every entry, some are looked at alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.verify.conventions import PLAIN, Convention, symmetric
from mesp_ref.verify.pair import Array, Arrays, Pair, eps
from mesp_ref.verify.result import Finding, misfit
from mesp_ref.verify.slopes import Slope
from mesp_ref.verify.truth import Truth, random_direction

CAP = 1e-3  # of a gradient's own size: a gate wider than that proves nothing
_SHORTER = 2.0**-13  # of steps, where kinks lie close by
_FEW_SEEN = " Many pieces meet here, of which few can be seen."
LEAST_SEEN = 8  # points with ties broken, fewer tell nothing of what was not seen
SUSPECTS = 24  # entries beyond the gate that are looked at again


@dataclass(frozen=True)
class Ruling:
    """What came of a second look: "ok", "unsure" or "fail", the value expected, and why."""

    verdict: str
    expected: float
    why: str = ""


class Hull(NamedTuple):
    """The least and the largest slope seen of the pieces that meet at a point; are these all?

    Where they are not, as much again on either side can be neither passed nor failed.
    """

    low: float
    high: float
    whole: bool
    blind: bool = False  # too few points with a slope to tell anything

    def ruling(self, got: float, blur: float, seen: bool, full: bool) -> Ruling | None:
        """ "ok" inside, "unsure" as far outside as pieces unseen may lie, else None.

        full   a direction that moves all entries, of which a few points tell nothing
        seen   and each of them was judged alone: unseen pieces are no matter
        """
        if self.low - blur <= got <= self.high + blur:
            return Ruling("ok", got, "a kink of several pieces, or a tie as in a median")
        if self.blind and full:
            return Ruling("ok" if seen and self.low < self.high else "unsure", got, _FEW_SEEN)
        more = 0.0 if self.whole else (self.high - self.low) / 2
        if self.low - more <= got <= self.high + more:
            verdict = "ok" if seen else "unsure"
            return Ruling(verdict, self.low if got < self.low else self.high, _FEW_SEEN)
        return None

    def beyond(self, got: float) -> Ruling:
        """What is outside is wrong."""
        why = f" It is a kink: any value from {self.low:.6g} to {self.high:.6g} would do."
        return Ruling("fail", self.low if got < self.low else self.high, why)


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
        wrong = False
        for leaf in self.pair.places:
            found = LeafJudge(self, leaf).finding()
            found = self._by_symmetry(leaf, found) if found.failed else found
            wrong = wrong or not found.passed
            yield found
        if not wrong:
            yield from self._together()

    def _together(self) -> Iterator[Finding]:
        """Arguments that hold equal numbers, moved alike: ties between them stay, as in max(a, b).

        Each gradient alone may be any slope of a kink, their sum along this direction is one number.
        """
        places, pair, truth = self.pair.places, self.pair, self.truth
        if len(places) < 2 or self.conventions or not _tied([pair.point[i] for i in places]):
            return
        v = {
            i: np.isfinite(np.asarray(pair.point[i], np.float64)).astype(np.float64) for i in places
        }
        slope, sides = truth.along(v), truth.one_sided(v)
        dense = {i: _or_zeros(self.grads.get(i), pair.point[i]) for i in places}
        if not all(np.isfinite(g[v[i] > 0]).all() for i, g in dense.items()):
            return
        got = sum(float((np.where(v[i] > 0, g, 0) * v[i]).sum()) for i, g in dense.items())
        size = sum(float(np.abs(np.where(v[i] > 0, g, 0)).sum()) for i, g in dense.items())
        unit = max(truth.unit, *(eps(pair.point[i].dtype) for i in places))
        largest = max(float(np.abs(pair.point[i][v[i] > 0]).max(initial=0)) for i in places) or 1.0
        gate = max(1e-6, 64 * unit) * size + 10 * slope.error + 64 * unit * truth.size / largest
        kinked = abs(sides[0].value - sides[1].value) > 4 * (sides[0].error + sides[1].error) + gate
        if gate > CAP * size + abs(slope.value) or abs(got - slope.value) <= gate or kinked:
            return
        meaning = (
            "Expected is the derivative with all arguments moved alike, which keeps their ties."
        )
        yield Finding(truth.name, "your op", "all arguments together", abs(got - slope.value), gate,
                      meaning, (), got, slope.value, failed=True)  # fmt: skip

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
            truth.along({i: np.ones(truth.pair.point[i].shape) for i in truth.pair.places})
            grads = truth.pair.gradients(truth.dys)
            made = {i: np.asarray(g) for i, g in grads.items() if g is not None}
        except Exception:  # float64 may be all that a stranger's function knows
            return None
        fits = all(made[i].dtype == truth.pair.point[i].dtype for i in made)
        return (truth, made) if fits else None


def _or_zeros(grad: Any, like: Array) -> Array:
    return np.zeros(like.shape) if grad is None else np.asarray(grad).astype(np.float64)


def _tied(arrays: list[Array]) -> bool:
    """Do two of the arrays hold the same number?"""
    sets = [np.unique(np.asarray(a, np.float64)) for a in arrays]
    return len(np.unique(np.concatenate(sets))) < sum(map(len, sets))


def _either_way(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Between half and three halves, of either sign: never close to 0, where the kink is."""
    return rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)


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

    def slope(self, v: Array, finer: float = 1.0) -> Slope:
        """The truth along v, as the convention has it."""
        found, factor = self.judge.truth.along({self.leaf: v}, finer), self.convention.factor
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
                "unsure" if self.judge.pair.overflows() else "fail",
                math.inf,
                0.0,
                meaning,
                index,
                float(self.got[index]),
                expected,
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
        dtype, truth = self.x.dtype, self.judge.truth
        self.at = [tuple(int(i) for i in np.unravel_index(k, self.x.shape)) for k in flat]
        self.units = [self.slope(self.unit(at)) for at in self.at]
        self.full = [(v, self.slope(v)) for v in self._directions()]
        if truth.name != "complex step":
            self.units = [
                self._finer(self.unit(a), s) for a, s in zip(self.at, self.units, strict=True)
            ]
            self.full = [(v, self._finer(v, s)) for v, s in self.full]
        slopes = [*self.units, *(s for _, s in self.full)]
        norms = [1.0] * len(self.units) + [
            float(np.sqrt((v * v).sum())) or 1.0 for v, _ in self.full
        ]
        finite = [(s, n) for s, n in zip(slopes, norms, strict=True) if np.isfinite(s.value)]
        known = [(s, n) for s, n in finite if s.known and s.value] or finite
        self.size = max((abs(s.value) / n for s, n in known), default=0.0)
        exact = truth.name == "complex step"
        mags = [s.mag for s in self.units if np.isfinite(s.mag) and (exact or s.known)]
        self.mag = max([*mags, self.size])
        self.error = max((s.error / n for s, n in known), default=math.inf)
        low = eps(dtype) > eps(np.float32)
        default = 4 * eps(dtype) if low else 1e-5 if dtype == np.float32 else 1e-10
        self.relative = default if self.judge.rtol is None else self.judge.rtol
        self.share = max(CAP, 16 * eps(dtype) if low else 0, self.judge.rtol or 0)
        self.cap = self.share * self.size
        largest = np.abs(np.where(self.fit, np.asarray(self.x, np.float64), 0)).max(initial=0)
        homogeneous = truth.size / (float(largest) or 1.0)
        self.floor = 16 * max(eps(dtype), truth.unit) * max(self.mag, homogeneous)

    def _finer(self, v: Array, found: Slope) -> Slope:
        """Asked once more with shorter steps where differences resolve nothing: kinks lie close by."""
        if found.known or not found.value:
            return found
        shorter = self.slope(v, _SHORTER)
        return shorter if shorter.value and shorter.error < found.error else found

    def _directions(self) -> Iterator[Array]:
        """Two random ones, one past zeros and ties (where kinks are), one with ties kept, all alike."""
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
            yield self.convention.directions(self._keeping_ties() * usable)
            yield self.convention.directions(usable)

    def _keeping_ties(self) -> Array:
        """What is equal moves alike, −x against x; zeros stay: max, sort and relu are smooth there."""
        size = np.abs(np.where(self.fit, np.asarray(self.x, np.float64), 0))
        values, back = np.unique(size, return_inverse=True)
        rng = self.judge.rng
        steps = values * rng.uniform(0.5, 1.5, len(values)) * rng.choice([-1.0, 1.0], len(values))
        return np.sign(np.where(self.fit, self.x, 0)) * steps[back].reshape(self.x.shape)

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
            got, cap = self.along(v), self._cap_along(v, truth)
            gate = min(self._gate(truth, 4 * root), cap)
            if self._off(got, truth) <= gate:
                continue
            at = self._traced(v)
            found = self._entry(at, self.slope(self.unit(at)))
            if found is None:
                ruling = self._again(v, got, truth, 4 * root, cap)
                if ruling.verdict != "ok":
                    meaning = f"Along a random direction through all entries. {self._where()}"
                    found = self._made(ruling.verdict, abs(got - ruling.expected), gate,
                                       meaning + ruling.why, (), got, ruling.expected,
                                       f"{self.judge.truth.name}, full directions")  # fmt: skip
            if found is not None and found.failed:
                return found
            unsure = unsure or found
        return unsure

    def _cap_along(self, v: Array, truth: Slope) -> float:
        """The widest gate along v: of what the gradient gives there, were its terms to add at random.

        A few large entries among many must not widen it by the root of how many there are.
        """
        typical = float(np.sqrt(((np.where(self.fit, self.got, 0) * v) ** 2).sum()))
        slope = abs(truth.value) if math.isfinite(truth.value) else 0.0
        root = float(np.sqrt((v * v).sum()))
        return self.share * min(self.size * root, max(typical, slope))

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

    def _again(
        self, v: Array, got: float, truth: Slope, entries: float, cap: float | None = None
    ) -> Ruling:
        """Is it a kink, an infinite slope, a blind spot of the truth, or rounding? Else it is wrong.

        cap   of a direction through all entries; without it v is one entry
        """
        factor, whole = self.convention.factor, cap is not None
        cap = self.cap if cap is None else cap
        sides = self.judge.truth.one_sided({self.leaf: v})
        if not all(s.known or math.isinf(s.value) for s in sides):
            shorter = self.judge.truth.one_sided({self.leaf: v}, _SHORTER)
            sides = min(sides, shorter, key=lambda pair: max(s.error for s in pair))
        ahead, behind = (Slope(factor * s.value, abs(factor) * s.error) for s in sides)
        seen = whole and len(self.at) == int(self.fit.sum())
        rounding = min(self.relative * self.mag * entries, cap)
        slack = rounding + 1e-6 * self.size * entries
        known = [s for s in (ahead, behind) if math.isfinite(s.value)]
        if any(math.isinf(s.value) for s in (ahead, behind)):
            return Ruling("unsure", truth.value, " The slope is infinite there.")
        if known and all(s.error <= 1e-3 * max(abs(s.value), self.size) for s in known):
            low, high = min(s.value for s in known), max(s.value for s in known)
            blur = 4 * sum(s.error for s in known) + slack
            if high - low > blur or (len(known) == 1 and not truth.known):
                if low - blur <= got <= high + blur:
                    return Ruling("ok", truth.value, "a kink")
                hull = self._hull(v, [low, high])
                return hull.ruling(got, blur, seen, whole) or hull.beyond(got)
        for finer in (1.0, _SHORTER):
            real = self._real(v, finer)
            if real.known and abs(got - real.value) <= real.error + rounding:
                return Ruling("ok", real.value, "differences see what the truth did not")
        ruling = self._hull(v, []).ruling(got, slack, seen, whole)
        if ruling is not None:
            return ruling
        if not whole and self._many_pieces(v):
            return Ruling("unsure", truth.value, _FEW_SEEN)
        ruling = self._rounded(v, got, truth, entries, cap)
        nothing = 64 * eps(self.x.dtype) * entries  # of the slopes around
        if ruling.verdict == "fail" and self._off(got, truth) <= nothing * self._typical():
            return Ruling("unsure", truth.value, " Next to the slopes around it is rounding.")
        return ruling

    def _closer(self, v: Array) -> Slope | None:
        """The slope by a shorter complex step, where the usual one leads past a tiny number."""
        near = self.judge.truth.closer(np.abs(self.x[(v != 0) & (self.x != 0)]))
        if near is None:
            return None
        factor = self.convention.factor
        found = near.along({self.leaf: v})
        return Slope(factor * found.value, abs(factor) * found.error, abs(factor) * found.mag)

    def _many_pieces(self, v: Array) -> bool:
        """Is this one of many equal numbers, and the function kinked where they are?"""
        equal = int((self.x == self.x[np.nonzero(v)][0]).sum()) if v.any() else 0
        if equal < 8:
            return False
        along = self.full[0][0]
        hull = self._hull(along, [])
        return (
            hull.low < hull.high or len(list(self._nearby(along, 1.0))) < 4
        )  # kinks wherever one looks

    def _hull(self, v: Array, sides: list[float]) -> "Hull":
        """The slopes of the pieces that meet here, seen where ties are broken at random.

        Pieces stay as far apart as they are on a finer scale; a steep function is told by that.
        Without any, an empty hull. It is whole when each piece was seen more than once (the share of
        what was not seen is that of what was seen once: Good 1953).
        """
        near, closer = list(self._nearby(v, 1.0)), list(self._nearby(v, 2.0**-4))
        few = min(len(near), len(closer)) < LEAST_SEEN // 2
        if not sides and (few or np.ptp(closer) < 0.3 * np.ptp(near)):
            return Hull(math.inf, -math.inf, True, few)
        found = np.sort([*near, *closer])
        same = 1e-3 * float(np.ptp([*found, *sides])) if len(found) else 0.0
        first = np.concatenate([[True], np.diff(found) > same]) if len(found) else np.zeros(0, bool)
        counts = np.diff([*np.flatnonzero(first), len(found)])
        if len(counts) < 2 and not sides:
            return Hull(math.inf, -math.inf, True)
        ends = [*sides, *found]
        return Hull(min(ends), max(ends), not few and bool((counts > 1).all()), few)

    def _nearby(self, v: Array, closer: float) -> Iterator[float]:
        """Slopes along v at points close by, where ties are broken."""
        truth, moves = self.judge.truth, {self.leaf: v}
        x, scale = truth.pair.point[self.leaf], truth.scale(self.leaf)
        exact = truth.name == "complex step"
        near, finer = (2.0**-34, 1.0) if exact else (2.0**-17, closer * 2.0**-19)
        tries = int(np.clip(400_000 // max(x.size, 1), 8, 32))
        for _ in range(tries):
            off = closer * near * scale * _either_way(self.judge.rng, x.shape)
            moved = (x + np.where(np.isfinite(x), off, 0)).astype(x.dtype)
            try:
                found = replace(truth, pair=truth.pair.at({self.leaf: moved})).along(moves, finer)
            except Exception:  # outside of the domain
                continue
            if found.error <= 1e-3 * max(abs(found.value), self.size):
                yield found.value * self.convention.factor

    def _real(self, v: Array, finer: float) -> Slope:
        """Differences, where the truth was complex step, and with shorter steps."""
        found = replace(self.judge.truth, name="richardson").along({self.leaf: v}, finer)
        factor = self.convention.factor
        return Slope(factor * found.value, abs(factor) * found.error, abs(factor) * found.mag)

    def _rounded(self, v: Array, got: float, truth: Slope, entries: float, cap: float) -> Ruling:
        """Right in longer arithmetic: rounding, then; else the error stands or cannot be judged."""
        closer = self._closer(v)
        if closer is not None and self._off(got, closer) <= min(self._gate(closer, entries), cap):
            return Ruling("ok", closer.value, "closer than the step")
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
                small = abs(got - found) <= cap
                return Ruling("ok" if small else "unsure", found, why)
            blur = self.floor * entries * longer[0].unit / eps(self.x.dtype)
            if abs(there - found) > near + blur + 10 * truth.error + abs(got - there):
                return Ruling("fail", truth.value)
        if error <= self._gate(truth, entries) + 16 * self._noise(v):
            small = error <= cap
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

    def _largest_dy(self) -> float:
        return max(
            float(np.abs(np.asarray(dy, np.float64)).max(initial=0)) for dy in self.judge.dys
        )

    def _typical(self) -> float:
        """The size of slopes at points around: a gradient that is 0 here errs by rounding of such."""
        truth, seen = self.judge.truth, [0.0]
        x, scale = truth.pair.point[self.leaf], truth.scale(self.leaf)
        for side in (0.25, -0.25):
            moved = (x + side * scale * self.judge.rng.random(x.shape)).astype(x.dtype)
            there = replace(truth, pair=truth.pair.at({self.leaf: moved}))
            for v, _ in self.full[:1]:
                try:
                    seen.append(abs(there.along({self.leaf: v}).value) / np.sqrt((v * v).sum()))
                except Exception:  # outside of the domain
                    continue
        return max((s for s in seen if math.isfinite(s)), default=0.0)

    def _of_nothing(self) -> Finding:
        """No slope is known to three digits: zero for certain, or not to be judged."""
        zero = self.error <= 2.0**-370 and self.size <= 2.0**-380
        zero = zero or self.judge.truth.is_constant(self.leaf)
        gate = 16 * self.floor + self.relative * self.mag + (0 if zero else self.error)
        gate += 64 * eps(self.x.dtype) * self._typical() if zero else 0
        worst: tuple[float, float, float, tuple[int, ...]] = (0.0, 0.0, 0.0, ())
        unsure: Finding | None = None
        kinked = False
        for at, truth in zip(self.at, self.units, strict=True):
            got, expected = self.along(self.unit(at)), 0.0 if zero else truth.value
            if not math.isfinite(expected):
                continue
            error = abs(got - expected)
            again = self._entry(at, Slope(expected, 0.0)) if error > max(gate, worst[0]) else None
            if error > max(gate, worst[0]) and (again is None or not again.failed):
                unsure, kinked = unsure or again, True  # a kink, or rounding
                continue
            worst = max(worst, (error, got, expected, at), key=lambda w: w[0])
        error, got, expected, at = worst
        unmoved = self.size == 0 and error == 0  # no step moved the forward, and 0 is what came
        verdict = "fail" if error > gate else "ok" if zero or unmoved else "unsure"
        if verdict == "fail" and error <= 64 * eps(self.x.dtype) * self._largest_dy():
            verdict = "unsure"  # less than the forward's own numbers can tell
        if verdict == "ok" and kinked:
            unsure = self._full_directions() or unsure
        if verdict == "ok" and unsure is not None:
            return unsure
        meaning = f"Expected is the derivative by {self.judge.truth.name}; {self._where()}"
        if verdict == "unsure":
            meaning = f"The truth is known to {self.error:.2g} only, its size is {self.size:.2g}."
        return self._made(verdict, error, gate, meaning, at, got, expected)
