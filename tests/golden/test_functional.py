"""The functional twins and the shared model on them, on NumPy: no framework need be installed."""

import pytest
from numpy_framework import NumPy

from mesp_ref.golden import Suite
from mesp_ref.golden.backends import functional
from mesp_ref.golden.check import judge

CASES = [name for name, case in Suite().cases.items() if case.kind == "op"]


@pytest.mark.parametrize("name", [*CASES, "block/usual"])
def test_twins_agree_with_the_suite_in_float64(name: str, suite: Suite) -> None:
    case = suite.cases[name]
    vectors = suite.read(case)
    got = functional.compute(NumPy(), case, vectors.inputs, suite.root, "float64")
    verdicts = [judge(t, got.get(t.name), vectors, "float64") for t in case.tensors]
    assert not [verdict for verdict in verdicts if not verdict.passed]
