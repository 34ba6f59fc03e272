"""Ball arithmetic: enclosures hold the truth, and a wrong last bit is refuted."""

import mpmath
import numpy as np
import pytest

pytest.importorskip("flint")

from mesp_ref.golden import Suite
from mesp_ref.golden.certify import certify
from mesp_ref.registry import OPS
from mesp_ref.registry.exact import exp, log, sqrt
from mesp_ref.verify.balls import enclose, is_rounded, rounded


def curve(x: np.ndarray) -> np.ndarray:
    y = np.empty(2, object)
    y[0], y[1] = exp(x[0]) * log(x[1]) / sqrt(2), 1 / (1 + exp(-x[0] * x[1]))
    return y


def test_values_and_derivatives_are_enclosed() -> None:
    x, dy = np.array([0.75, 3.0]), np.array([2.0, -0.5])
    found = enclose(curve, {"x": x}, ("x",), dy)
    with mpmath.workdps(60):
        a, b = mpmath.mpf("0.75"), mpmath.mpf(3)
        s = 1 / (1 + mpmath.exp(-a * b))
        value = mpmath.exp(a) * mpmath.log(b) / mpmath.sqrt(2)
        slopes = [2 * value - s * (1 - s) * b / 2,
                  2 * mpmath.exp(a) / b / mpmath.sqrt(2) - s * (1 - s) * a / 2]  # fmt: skip
        assert rounded(found.y[0]) == (float(value), True)
        assert [rounded(ball) for ball in found.gradients["x"]] == [
            (float(slope), True) for slope in slopes
        ]


@pytest.mark.parametrize("ulps", [-1, 1])
def test_a_wrong_last_bit_is_refuted(ulps: int) -> None:
    (ball, _) = enclose(curve, {"x": np.array([0.75, 3.0])}, (), np.zeros(2)).y
    value, _ = rounded(ball)
    assert is_rounded(ball, value) is True
    assert is_rounded(ball, float(np.nextafter(value, ulps * np.inf))) is False


def test_what_is_not_told_is_not_decided() -> None:
    """0 as a difference cannot be proven, and is taken for 0."""
    softmax = OPS["causal_softmax"].equation
    s = np.zeros((1, 1, 1, 1))
    ball = enclose(softmax, {"s": s, "first": None}, ("s",), np.ones(s.shape)).gradients["s"]
    assert rounded(ball[0, 0, 0, 0])[0] == 0.0


@pytest.mark.parametrize(
    "name", ["ops/rmsnorm/usual", "ops/causal_softmax/large", "ops/cross_entropy/confident"]
)
def test_stored_values_are_proven(name: str) -> None:
    """The last two held 53 numbers as 0 that are as small as 1e-78, until balls refuted them."""
    suite = Suite()
    found = certify(suite, suite.cases[name])
    assert found.proven == sum(np.prod(t.shape, dtype=int) for t in suite.cases[name].tensors)
    assert not found.refuted
    assert not found.undecided
