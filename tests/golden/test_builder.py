"""The builder makes the shipped values again, and refuses what it must not ship."""

import numpy as np
import pytest

from mesp_ref.errors import MespRefError
from mesp_ref.golden import Suite
from mesp_ref.golden.builder.draw import representable
from mesp_ref.golden.builder.models import BLOCKS, make_block
from mesp_ref.golden.builder.ops import make_op
from mesp_ref.golden.builder.quantised import CASES, make_quantised
from mesp_ref.registry import OPS, OpCase

QUICK = [
    (row.name, case)
    for row in OPS.values()
    for case in (row.golden.cases if row.golden else ())
    if case.name == "one_token" or (row.name, case.name) == ("rmsnorm", "usual")
]


@pytest.mark.parametrize(("op", "op_case"), QUICK, ids=[f"{op}/{c.name}" for op, c in QUICK])
def test_op_values_are_reproduced_bit_for_bit(op: str, op_case: OpCase, suite: Suite) -> None:
    case, vectors = make_op(OPS[op], op_case)
    assert case == suite.cases[case.name]
    shipped = suite.read(case)
    for name, value in vectors.want.items():
        assert np.array_equal(value, shipped.want[name]), name
    for name, value in vectors.inputs.items():
        assert np.array_equal(value, shipped.inputs[name]), name


def test_quantised_values_are_reproduced_bit_for_bit(suite: Suite) -> None:
    case, vectors = make_quantised(CASES[1])
    shipped = suite.read(case)
    assert np.array_equal(vectors.want["w"], shipped.want["w"])
    assert np.array_equal(vectors.inputs["packed"], shipped.inputs["packed"])


def test_block_values_are_reproduced_to_rounding(suite: Suite) -> None:
    made = make_block(BLOCKS[0])
    shipped = suite.read(suite.cases[made.case.name])
    for name, value in made.vectors.want.items():
        assert np.abs(value - shipped.want[name]).max() <= 1e-13 * np.abs(value).max(), name


def test_representable_numbers() -> None:
    x = np.array([1.0, 1 / 3, 3e-6, 1e4, -0.1, 1.999])
    once = representable(x)
    assert np.array_equal(once, representable(once))
    assert np.abs(once / x - 1).max() < 0.07
    with pytest.raises(MespRefError, match="float16"):
        representable(np.array([1e5]))
