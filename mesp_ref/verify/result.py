"""What an oracle reports: one finding per argument, and how it reads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Finding:
    """One comparison of one gradient with what an oracle says it is.

    error     the worst deviation; infinite where shape or dtype are wrong, a value is not finite or
              a structural zero is not exactly 0
    gate      what rounding alone can explain; the finding passes when error ≤ gate
    index     where the worst deviation lies; () for a scalar such as a directional derivative
    meaning   what the numbers are, in words
    judged    False where no truth could be had: such a finding neither passed nor failed
    failed    True where it is wrong whatever the numbers say
    """

    oracle: str
    subject: str
    argument: str
    error: float
    gate: float
    meaning: str
    index: tuple[int, ...] = ()
    got: Any = None
    expected: Any = None
    judged: bool = True
    failed: bool = False

    @property
    def passed(self) -> bool:
        inside = math.isfinite(self.gate) and self.error <= self.gate  # False for NaN, too
        return inside and self.judged and not self.failed

    @property
    def margin(self) -> float:
        """gate / error: how many times over the check is passed."""
        return math.inf if self.error == 0 else self.gate / self.error

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL" if self.judged else "????"
        line = (
            f"{verdict} {self.subject}: gradient of {self.argument} by {self.oracle}: "
            f"error {self.error:.3g}, gate {self.gate:.3g}"
        )
        if self.passed:
            return f"{line}, margin {self.margin:.3g}"
        at = f" at index {list(self.index)}" if self.index else ""
        return f"{line}{at}: got {self.got}, expected {self.expected}. {self.meaning}"


def misfit(got: Any, like: Array, finite: bool = True) -> str | None:
    """What is wrong with a gradient before its values count: type, shape, dtype, NaN or infinity."""
    if not isinstance(got, np.ndarray | np.generic):
        return f"found {type(got).__name__}, expected an array"
    if got.shape != like.shape:
        return f"found shape {list(got.shape)}, expected {list(like.shape)}"
    if got.dtype != like.dtype:
        return f"found dtype {got.dtype}, expected {like.dtype}"
    if finite and not np.isfinite(got).all():
        return "found NaN or infinity"
    return None


def compare(
    oracle: str,
    subject: str,
    argument: str,
    got: Array,
    expected: Array,
    mag: Array,
    relative: float,
    meaning: str,
    floor: float = 0.0,
) -> Finding:
    """|got − expected| against relative·max(mag) + floor; where mag is 0, got must be exactly 0."""
    gate = relative * float(mag.max(initial=0)) + floor
    wrong = misfit(got, expected)
    if wrong is not None:
        return Finding(oracle, subject, argument, math.inf, gate, wrong + ".")
    if not got.size:
        return Finding(oracle, subject, argument, 0.0, gate, meaning)
    error = np.array(np.abs(got - expected), np.float64)
    error[(mag == 0) & (got != 0)] = math.inf
    at = np.unravel_index(int(error.argmax()), error.shape)
    index = tuple(int(i) for i in at)
    return Finding(
        oracle, subject, argument, float(error[index]), gate, meaning, index,
        got[index].item(), expected[index].item(),
    )  # fmt: skip


def scalar(
    oracle: str, subject: str, argument: str, got: Any, expected: Any, gate: float, meaning: str
) -> Finding:
    """Two numbers that must agree: a directional derivative, an identity."""
    got, expected, gate = float(got), float(expected), float(gate)
    error = abs(got - expected)
    error = error if math.isfinite(error) else math.inf
    return Finding(oracle, subject, argument, error, gate, meaning, (), got, expected)


def failures(findings: Sequence[Finding]) -> list[Finding]:
    """Those that did not pass."""
    return [finding for finding in findings if not finding.passed]


def require(findings: Sequence[Finding]) -> None:
    """Raise AssertionError with every failed finding, one a line; also when nothing was checked."""
    # Raised by hand: `python -O` drops assert statements, and every gradient would pass.
    if not findings:
        raise AssertionError("nothing was checked")
    if wrong := failures(findings):
        raise AssertionError("\n".join(str(finding) for finding in wrong))
