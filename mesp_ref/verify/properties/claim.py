"""How a property is stated and found by name."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import OPS, Args, OpSpec, Sizes
from mesp_ref.verify.result import Finding, compare

Check = Callable[[np.random.Generator], Iterable[Finding]]

RELATIVE = 1e-14  # of the sum of absolute terms: the gate of one op


class Property(NamedTuple):
    """An identity about `subject`, an op's name, "model" or "methods"."""

    name: str
    subject: str
    check: Check

    @property
    def statement(self) -> str:
        """The identity in words and symbols: the first line of the check's docstring."""
        return (self.check.__doc__ or "").strip().splitlines()[0]


PROPERTIES: dict[str, Property] = {}  # of single subjects
OF_EVERY_OP: list[Callable[[str], Check]] = []  # makers of the check of any row, by its name


def holds(subject: str) -> Callable[[Check], Check]:
    """Register a generator of findings as a property of `subject`."""

    def register(check: Check) -> Check:
        name = check.__name__
        PROPERTIES[name] = Property(name, subject, check)
        return check

    return register


def of_every_op(make: Callable[[str], Check]) -> Callable[[str], Check]:
    """Register what makes, from an op's name, the check of a property that holds for all ops."""
    OF_EVERY_OP.append(make)
    return make


def properties() -> dict[str, Property]:
    """All by name: those of single subjects, and for every op registered now those of all ops."""
    general = [(name, make(name)) for name in OPS for make in OF_EVERY_OP]
    return PROPERTIES | {check.__name__: Property(check.__name__, n, check) for n, check in general}


def agree(
    subject: str, claim: str, got: Any, expected: Any, mag: Any, relative: float = RELATIVE
) -> Finding:
    """got = expected to relative·max(mag), mag the sum of absolute terms; exactly where it is 0."""
    got, expected, mag = np.asarray(got), np.asarray(expected), np.asarray(mag)
    got = got.astype(np.float64) if got.dtype == bool else got
    expected = np.broadcast_to(expected, got.shape).astype(got.dtype)
    mag = np.broadcast_to(mag, got.shape)
    return compare("properties", subject, claim, got, expected, mag, relative, "An identity fails.")


def exactly(subject: str, claim: str, got: Any, expected: Any) -> Finding:
    """got = expected to the bit."""
    return agree(subject, claim, got, expected, np.ones(np.shape(got)), relative=0.0)


def drawn(name: str, rng: np.random.Generator, **changed: Any) -> tuple[OpSpec, Args, Array]:
    """A row as it is registered now, a case of it and a cotangent."""
    spec = OPS[name]
    args = spec.sample(rng, Sizes()._replace(**changed), np.float64)
    y = np.asarray(spec.forward(**args)[0])
    return spec, args, np.asarray(rng.standard_normal(y.shape))


def check_properties(
    subjects: Iterable[str] | None = None, seed: int = 0
) -> Iterator[tuple[Property, list[Finding]]]:
    """Every property (of these subjects), each with a generator of its own."""
    wanted = None if subjects is None else set(subjects)
    for number, item in enumerate(properties().values()):
        if wanted is None or item.subject in wanted:
            yield item, list(item.check(np.random.default_rng((seed, number))))
