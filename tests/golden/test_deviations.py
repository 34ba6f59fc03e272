"""The causes of the scoreboard's deviations, in NumPy: a case fails with the cause and not without."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from mesp_ref.golden import Suite
from mesp_ref.golden.check import judge
from mesp_ref.ops import Array

Arrays = dict[str, Array]
STORED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def stored(x: Array, dtype: str) -> Array:
    """Numbers as `dtype` holds them, in float64 to go on with."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(STORED[dtype]).astype(np.float64)


def sigmoid_in_16_bits(v: Arrays, dtype: str, cause: bool) -> Arrays:
    """swiglu whose sigmoid is formed in the type of its gate (tinygrad, MLX)."""
    gate, up, dy = v["gate"], v["up"], v["dy"]
    if cause:
        e = stored(np.exp2(stored(-gate * np.log2(np.e), dtype)), dtype)
        sigmoid = stored(1 / stored(1 + e, dtype), dtype)
    else:
        sigmoid = 1 / (1 + np.exp(-gate))
    dgate = dy * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    return {"y": gate * sigmoid * up, "dgate": dgate, "dup": dy * gate * sigmoid}


def rounded_products(v: Arrays, dtype: str, cause: bool) -> Arrays:
    """A product of matrices whose terms are rounded before they are summed (tinygrad)."""

    def term(x: Array) -> Array:
        return stored(x, dtype) if cause else x

    x, w, dy = v["x"], v["w"], v["dy"]
    dx = term(dy[..., :, None] * w).sum(-2)
    dw = term(dy[..., :, None] * x[..., None, :]).reshape(-1, *w.shape).sum(0)
    return {"dx": dx, "dw": dw}


def square_of_the_denominator(v: Arrays, dtype: str, cause: bool) -> Arrays:
    """silu's quotient rule with q², which leaves float32 at a gate of −47 (HIPS autograd)."""
    gate, up, dy = v["gate"], v["up"], v["dy"]
    e = np.exp(-gate)
    q = 1 + e
    square = stored(q * q, dtype) if cause else q * q
    return {"dgate": dy * up * (1 / q + gate * e / square)}


CAUSES: list[tuple[Callable[[Arrays, str, bool], Arrays], str, str]] = [
    (sigmoid_in_16_bits, "ops/swiglu/large", "float16"),
    (sigmoid_in_16_bits, "tile/swiglu/one_gate_a_row", "float16"),
    (sigmoid_in_16_bits, "tile/swiglu/one_gate_a_row", "bfloat16"),
    (rounded_products, "ops/linear/no_bias", "bfloat16"),
    (rounded_products, "ops/linear/nine_tokens", "bfloat16"),
    (rounded_products, "ops/linear/large", "bfloat16"),
    (square_of_the_denominator, "ops/swiglu/saturated", "float32"),
]


@pytest.mark.parametrize(("cause", "name", "dtype"), CAUSES)
def test_the_cause_and_nothing_else_fails_the_case(
    cause: Callable[[Arrays, str, bool], Arrays], name: str, dtype: str, suite: Suite
) -> None:
    case = suite.cases[name]
    vectors = suite.read(case)
    inputs = {n: a.astype(np.float64) for n, a in vectors.inputs.items()}
    tensors = {tensor.name: tensor for tensor in case.tensors}
    for present in (True, False):
        with np.errstate(all="ignore"):
            got = {n: stored(a, dtype) for n, a in cause(inputs, dtype, present).items()}
            verdicts = [judge(tensors[n], a, vectors, dtype) for n, a in got.items()]
        assert all(verdict.passed for verdict in verdicts) is not present, verdicts
