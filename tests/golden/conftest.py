"""Fixtures of the golden tests: the shipped suite, and answers to it made from its own values."""

from pathlib import Path

import numpy as np
import pytest
from helpers import Answer

from mesp_ref.golden import Suite
from mesp_ref.golden.builder.write import write_tensors
from mesp_ref.ops import Array


@pytest.fixture(scope="session")
def suite() -> Suite:
    return Suite()


@pytest.fixture
def answer(suite: Suite, tmp_path: Path) -> Answer:
    """Write right answers to some cases, with the tensors in `changed` replaced or (None) left out."""

    def write(*cases: str, dtype: object = np.float64, **changed: Array | None) -> Path:
        root = tmp_path / "actual"
        for name in cases:
            case = suite.cases[name]
            want = suite.read(case).want | changed
            arrays = {n: np.asarray(a).astype(dtype) for n, a in want.items() if a is not None}
            write_tensors(root / case.file, arrays)
        return root

    return write
