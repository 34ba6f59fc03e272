"""The suite as tests of your own functions, under pytest or any other runner:

import pytest
from mesp_ref.golden.testing import cases

@pytest.mark.parametrize("case", cases("ops/rmsnorm", "tile/rmsnorm"), ids=str)
def test_rmsnorm(case):
    case.check(my_rmsnorm(**case.inputs))  # x, w, dy, eps -> {"y": …, "dx": …, "dw": …}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mesp_ref.golden.check import ROLES, CaseReport, judge, select
from mesp_ref.golden.explain import explain
from mesp_ref.golden.report import case_lines
from mesp_ref.golden.suite import SHIPPED, Case, Suite, Tensor


@dataclass(frozen=True)
class GoldenCase:
    """One case of the suite in one precision; its text is its name."""

    suite: Suite
    case: Case
    tensors: tuple[Tensor, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.case.name}-{self.dtype}"

    @property
    def inputs(self) -> dict[str, Any]:
        """Arrays in the case's precision, integers as they are, and the attributes (eps, s)."""
        numbers = getattr(ml_dtypes, self.dtype, None) or np.dtype(self.dtype)
        arrays = {
            name: array.astype(numbers) if array.dtype.kind == "f" else array
            for name, array in self.suite.read(self.case).inputs.items()
        }
        return arrays | {n: v for n, v in self.case.attributes.items() if n != "op"}

    def check(self, found: Mapping[str, Any]) -> None:
        """Hold results against the suite: "y" and the gradients you have; those left out are not asked.

        Raises AssertionError with the report's lines, the name of the mistake among them
        """
        vectors, report = self.suite.read(self.case), CaseReport(self.case.name, self.dtype)
        got = {name: np.asarray(value) for name, value in found.items()}
        wanted = [tensor for tensor in self.tensors if tensor.name in got]
        if unknown := set(got) - {tensor.name for tensor in self.case.tensors}:
            raise AssertionError(f"{self}: {min(unknown)!r}: the suite has no such tensor")
        if not wanted:
            raise AssertionError(f"{self}: no result was given, expected such as y")
        with np.errstate(all="ignore"):
            report.verdicts += [judge(t, got[t.name], vectors, self.dtype) for t in wanted]
            wrong = [t for t, v in zip(wanted, report.verdicts, strict=True) if not v.passed]
            if wrong:
                report.like = explain(self.suite, self.case, vectors, got, self.dtype, wrong)
        assert report.passed, "\n".join(case_lines(report))


def cases(*only: str, dtype: str = "float32", suite: str | Path = SHIPPED) -> list[GoldenCase]:
    """The cases that patterns name and a precision covers, for pytest.mark.parametrize.

    Raises MespRefError for a pattern that matches nothing
    """
    opened = Suite(suite)
    return [
        GoldenCase(opened, case, tuple(tensors), dtype)
        for case, tensors in select(opened, only, ROLES)
        if dtype in case.dtypes
    ]
