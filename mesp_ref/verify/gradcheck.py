"""Check a gradient of anyone's: a forward and a backward as plain functions."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.verify import behaviour, elsewhere, narrower
from mesp_ref.verify.conventions import Convention
from mesp_ref.verify.judge import Judge
from mesp_ref.verify.longer import LONG, graded, many_ties, past_tiles
from mesp_ref.verify.pair import Arrays, Pair, inner, is_float, make_pair
from mesp_ref.verify.result import Finding
from mesp_ref.verify.tree import leaves
from mesp_ref.verify.truth import Truth, choose

_SCOPE = (
    "This proves the backward against the forward that was given; whether that forward is the "
    "function you meant, it cannot see."
)
_ADVICE = (
    "Not judged: rounding, or the error of the truth, is more than a thousandth of this gradient. "
    "Inputs nearer to 1, larger gradients or float64 would be judged."
)
_STREAM = 24  # of random numbers, apart from everyone else's
SMALL = 4096  # entries in all, up to which other shapes are tried
_TALLER = "with an axis in front, which the forward takes and the backward silently gets wrong"
_TIES = f"float16 with {LONG:,} equal entries"
_HINTS = {
    _TALLER: "Meant for as many axes as these only? Then say so: ranks=False.",
    _TIES: "Not meant for float16? Then say so: dtypes=().",
}
ENTRIES = 300  # of each argument that are looked at one by one, fewer where calls are dear


@dataclass(frozen=True)
class GradcheckResult:
    """What gradcheck found.

    verdict    "passed", "failed", or "inconclusive" where no truth was good enough to judge by
    passed     the verdict is "passed": every finding was judged, and passed
    findings   one per argument and check, in the order they were made
    method     "complex step" or "richardson", and `why` it was chosen
    looked     per argument, how many of its entries were looked at one by one, and how many it has;
               the others were seen along random directions
    remarks    what is worth knowing and no defect
    float32    a verdict of its own for a pair that was given float64: "kept" when float32 in gives
               float32 out, "promoted" when it does not, "refused" when it raises
    """

    findings: tuple[Finding, ...]
    method: str
    why: str
    looked: dict[str, tuple[int, int]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    float32: str = ""

    @property
    def verdict(self) -> str:
        wrong = [f for f in self.findings if not f.passed]
        if any(f.judged for f in wrong) or not self.findings:
            return "failed"
        return "inconclusive" if wrong else "passed"

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    @property
    def inconclusive(self) -> bool:
        return self.verdict == "inconclusive"

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.passed)

    def __str__(self) -> str:
        verdict = self.verdict if self.passed else self.verdict.upper()
        lines = [f"gradcheck {verdict}: truth by {self.method}, {self.why}"]
        values = [f for f in self.findings if f.oracle == self.method]
        others = dict.fromkeys(f.oracle for f in self.findings if f.oracle != self.method)
        lines += [f"  {finding}" for finding in (values if self.passed else self.failures)]
        lines += [f"  ok   {', '.join(others)}"] if self.passed else []
        few = {n: seen for n, seen in self.looked.items() if seen[0] < seen[1]}
        lines += [f"  {n}: {a} of {b} entries one by one, all along random directions"
                  for n, (a, b) in few.items()]  # fmt: skip
        lines += [f"  note: {remark}" for remark in self.remarks]
        if self.inconclusive:
            kinds = {f.oracle for f in self.failures}
            known = [said for ends, said in _HINTS.items() if all(k.endswith(ends) for k in kinds)]
            lines.append(*known or [_ADVICE])
        return "\n".join([*lines, _SCOPE])


def gradcheck(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    args: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    differentiable: Sequence[int] | None = None,
    seed: int = 0,
    rtol: float | None = None,
    conventions: Mapping[str, Convention] | None = None,
    surrogate: Callable[..., Any] | None = None,
    ranks: bool = True,
    sizes: bool = True,
    dtypes: Sequence[str] | None = None,
) -> GradcheckResult:
    """Is `backward` the vector-Jacobian product of `forward` at `args`?

    forward(*args) -> y, or outputs in a tuple, list or dictionary; those that are no floating
        numbers (an argmax) have no gradient
    backward(dy, *args) -> the gradients of the differentiable arguments, as a tuple in their order
        (alone when there is one); dy has the containers of the forward's outputs. A gradient for
        every argument is also accepted. An argument may be a list or dictionary of arrays, its
        gradient is one too. None stands for zeros
    names           for messages; default arg0, arg1, …
    differentiable  positions with a gradient; default: every argument that holds a floating array
    rtol            of max Σ|dy·∂y/∂x|; default 1e-10 in float64, 1e-5 in float32, 4 units below
    conventions     by argument, what is meant instead of the derivative (see conventions.py)
    ranks           False: the pair is meant for arrays of as many axes as these
    sizes           False: ask at the sizes of args alone, where others are drawn by who calls
    surrogate       the function whose gradient is meant: a straight-through estimator's
    dtypes          what a float64 pair is held to besides: in "float16" and "bfloat16" tame inputs
                    give no grossly wrong gradient where the forward is well there; "float32" in
                    gives float32 out (without it that is a verdict of its own, result.float32).
                    () asks for none; by default float16 is asked, and where only a count of more
                    ties than float16 holds goes wrong there, the verdict is "inconclusive"

    Truth is complex step where the forward allows it, confirmed by Richardson's differences along
    a random direction of every argument; otherwise those differences, whose own error is part of
    the gate. A gate wider than a thousandth of the gradient's size is never a pass: the verdict is
    then "inconclusive". At a kink every value between the one-sided slopes is right.

    Also checked: the forward pure and repeatable; shape, dtype and finiteness of every gradient;
    inputs and dy unchanged; repeatable, in a buffer of its own; linear in dy; each output alone;
    other memory layouts of inputs and dy; and where the values are right a second point, one row
    fewer, an axis more, where calls are cheap 1,030 entries along each axis (longer.py), and the
    first point again; narrower types.

    Inside a Hypothesis test an example at which the forward is not finite, or whose verdict would
    be "inconclusive", is discarded as by assume().

    Raises MespRefError only for misuse: no floating argument, names or positions that do not fit,
    a forward that is not finite at args.
    """
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = make_pair(forward, backward, args, names, differentiable)
        model = replace(pair, forward=surrogate) if surrogate else pair
        result = _Check(
            pair, model, _by_leaf(pair, conventions or {}), seed, rtol,
            None if dtypes is None else tuple(dtypes), ranks, sizes,
        ).run()  # fmt: skip
    if result.inconclusive and any(f.oracle != _TIES for f in result.failures):
        _discard("gradcheck: inconclusive")
    return result


def gradgradcheck(
    backward: Callable[..., Any],
    double_backward: Callable[..., Any],
    dy: Any,
    args: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    **options: Any,
) -> GradcheckResult:
    """Is `double_backward` the vector-Jacobian product of `backward` at (dy, *args)?

    double_backward(ddargs, dy, *args) -> the gradients of dy and of the differentiable arguments;
    ddargs has the containers of what the backward returns. Options are those of gradcheck.
    """
    labels = None if names is None else ("dy", *names)
    return gradcheck(backward, double_backward, (dy, *args), names=labels, **options)


def _by_leaf(pair: Pair, conventions: Mapping[str, Convention]) -> dict[int, Convention]:
    unknown = [n for n in conventions if n not in pair.names]
    if unknown:
        raise MespRefError(f"conventions: found {unknown}, expected names among {list(pair.names)}")
    return {pair.names.index(name): said for name, said in conventions.items()}


def _shapes(pair: Pair) -> str:
    arrays = zip(pair.names, pair.point, strict=True)
    return ", ".join(f"{name} {list(p.shape)}" for name, p in arrays if isinstance(p, np.ndarray))


def _discard(event: str) -> None:
    """Leave the example if a Hypothesis test is running."""
    hypothesis = sys.modules.get("hypothesis")
    if hypothesis is not None and hypothesis.currently_in_test_context():
        hypothesis.event(event)
        hypothesis.reject()


@dataclass
class _Check:
    """One run of gradcheck; `model` is the pair whose forward the truth comes from."""

    pair: Pair
    model: Pair
    conventions: dict[int, Convention]
    seed: int
    rtol: float | None
    dtypes: tuple[str, ...] | None
    ranks: bool
    sizes: bool
    remarks: list[str] = field(default_factory=list)
    float32: str = ""

    def run(self) -> GradcheckResult:
        self.rng = self._generator()
        pure = list(behaviour.forward_is_pure(self.pair))
        dys = self._cotangents(self.pair)
        self.truth = choose(self.model, dys, self.rng)
        impure = [f for f in pure if not f.passed]
        if impure and "repeatable" in impure[0].oracle:
            return self._result(pure, {})
        try:
            grads = self.pair.gradients(dys)
            judge = self._judge(self.pair, self.truth, dys, grads, self._entries())
            findings = [*judge.findings(), *impure]
            if all(f.judged and np.isfinite(f.error) for f in findings):
                findings += self._behaviour(dys, grads, findings)
        except Exception as error:  # a backward that raises is a wrong backward, not misuse
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            return self._result([behaviour.finding("the backward runs", False, what), *impure], {})
        return self._result(findings, judge.looked)

    def _result(
        self, findings: list[Finding], looked: dict[int, tuple[int, int]]
    ) -> GradcheckResult:
        seen = {self.pair.names[i]: counts for i, counts in looked.items()}
        found = tuple(findings)
        return GradcheckResult(
            found, self.truth.name, self.truth.why, seen, tuple(self.remarks), self.float32
        )

    def _cotangents(self, pair: Pair) -> Arrays:
        """Random, never ones, which hide what sums to zero; 0 for an infinite output."""
        outputs = [np.asarray(y) for _, y in leaves(pair.made)]
        outputs = [y for y in outputs if is_float(y)]
        values = [np.asarray(y, np.float64) for y in outputs]
        if not outputs:
            raise MespRefError("forward: found no floating output, expected at least one")
        wrong = any(np.isnan(v).any() for v in values)
        if wrong or not any(np.isfinite(v).any() or not v.size for v in values):
            _discard("gradcheck: the forward is not finite")
            raise MespRefError("forward: found NaN or infinity at args, expected finite outputs")
        if not all(np.isfinite(v).all() for v in values) and pair.overflows():
            _discard("gradcheck: the forward overflows")
        drawn = [self.rng.standard_normal(y.shape) for y in outputs]
        return tuple(
            np.asarray(np.where(np.isfinite(v), d, 0)).astype(y.dtype)
            for v, d, y in zip(values, drawn, outputs, strict=True)
        )

    def _entries(self) -> int:
        """How many entries are looked at one by one: few where a call is dear."""
        size = sum(p.size for p in self.pair.point if isinstance(p, np.ndarray))
        size += sum(dy.size for dy in self.truth.dys)
        budget = 500_000 if self.truth.name == "complex step" else 50_000
        return int(np.clip(budget // max(size, 1), 2, ENTRIES))

    def _judge(self, pair: Pair, truth: Truth, dys: Arrays, grads: Any, entries: int) -> Judge:
        rng = self._generator()
        return Judge(truth, pair, dys, grads, rng, self.rtol, entries, self.conventions)

    def _generator(self) -> np.random.Generator:
        """Not that of default_rng(seed): the arguments may well have come from there, and dy = x hides
        what is orthogonal to x."""
        return np.random.default_rng([self.seed, _STREAM])

    def _behaviour(self, dys: Arrays, grads: Any, values: list[Finding]) -> list[Finding]:
        floors = {}
        for leaf in self.pair.places:
            name = self.pair.names[leaf]
            floors[leaf] = max((f.gate for f in values if f.argument == name), default=0.0)
        checks = behaviour.Behaviour(self.pair, dys, grads, floors)
        findings = list(checks.check(self.rng))
        if not all(f.passed for f in values):  # elsewhere it would be wrong again
            return findings
        findings += self._second_point()
        findings += self._other_shapes()
        findings.append(elsewhere.same_again(self.pair, dys, grads))
        if all(p.dtype == np.float64 for p in self.pair.point if is_float(p)):
            findings += self._narrower(dys)
        return findings

    def _narrower(self, dys: Arrays) -> list[Finding]:
        found, self.float32 = narrower.promotions(self.pair, dys)
        if "float32" not in (self.dtypes or ()):
            self.remarks += [
                f"in float32: {f.argument}: {f.meaning}" for f in found if not f.passed
            ]
            found = []
        for dtype in self.dtypes if self.dtypes is not None else ("float16",):
            if dtype != "float32":
                found += narrower.half(self.pair, dys, dtype)
        if not found and (self.dtypes is None or "float16" in self.dtypes):
            found += self._ties_counted()
        return found

    def _ties_counted(self) -> Iterator[Finding]:
        """Are more equal numbers than float16 counts to too many for float16?

        Where other numbers are as well, length alone is, as for dy / n: no defect of a NumPy function.
        """
        long = many_ties(self.pair) if self.sizes else None
        if long is None:
            return
        off = self._half(long)
        if not off or self._half(graded(long)):
            return
        asked = self.dtypes is not None
        meaning = "Ties are counted in float16, where so many are infinitely many."
        for finding in off:
            yield replace(finding, oracle=_TIES, meaning=meaning, judged=asked, failed=asked)

    def _half(self, pair: Pair) -> list[Finding]:
        """In float16, by cotangents of at least 1: divided by LONG smaller ones would be nothing."""
        dys = tuple(np.asarray(np.copysign(1, dy) + dy, dy.dtype) for dy in self._cotangents(pair))
        return list(narrower.half(pair, dys, "float16"))

    def _second_point(self) -> list[Finding]:
        for changed in elsewhere.second_points(self.pair):
            there, model = self.pair.at(changed), self.model.at(changed)
            try:
                made = there.forward(*there.arguments())
                finite = all(np.isfinite(y).all() for y in model.floating())
            except Exception:  # outside the domain
                continue
            if finite:
                return list(self._judged(replace(there, made=made), model, "at a second point"))
        return []

    def _other_shapes(self) -> Iterator[Finding]:
        if not self.sizes:
            return
        if sum(p.size for p in self.pair.point if isinstance(p, np.ndarray)) > SMALL:
            return
        for what, found in (
            ("with one row fewer", elsewhere.shorter(self.pair)),
            (_TALLER, elsewhere.taller(self.pair) if self.ranks else None),
            *((f"with {_shapes(longer)}", longer) for longer in past_tiles(self.pair)),
        ):
            if found is not None and elsewhere.usable(found, self._cotangents(found)) is not None:
                model = replace(found, forward=self.model.forward)
                for finding in self._judged(found, model, what):
                    # What was promised for two axes need not hold for three.
                    yield replace(finding, judged=what != _TALLER, failed=what != _TALLER)

    def _judged(self, pair: Pair, model: Pair, what: str) -> Iterator[Finding]:
        """Values at another point, by directions and a few entries; only what is wrong is told."""
        dys = self._cotangents(pair)
        made = model.floating()
        cast = tuple(np.asarray(dy, t.dtype) for dy, t in zip(dys, self.truth.dys, strict=True))
        working = model if self.truth.pair is self.model else model.cast(np.float64)
        size = abs(inner(tuple(map(np.abs, cast)), tuple(np.abs(y) for y in made)))
        truth = replace(self.truth, pair=working, dys=cast, size=size)
        grads = pair.gradients(dys)
        for finding in self._judge(pair, truth, dys, grads, min(6, self._entries())).findings():
            if not finding.passed and finding.judged:
                yield replace(finding, oracle=f"{finding.oracle}, {what}")
