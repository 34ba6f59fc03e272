"""JAX and MLX as clients of the golden suite, where they are installed.

JAX compiles every op of every shape on its own, which takes minutes: it is marked slow.
"""

from pathlib import Path

import pytest

from mesp_ref.golden import Suite, check
from mesp_ref.golden.backends import run

PARTS = ("ops", "quant", "block", "e2e")
# What docs/golden-backends.md reports, with its cause.
DEVIATIONS = {
    ("autograd", "float32"): {"ops/swiglu/saturated"},
    ("mlx", "float16"): {"ops/swiglu/large"},
}


def assert_agrees(backend: str, dtype: str, out: Path) -> None:
    suite = Suite()
    run(backend, out, suite, dtype=dtype, only=PARTS)
    report = check(out, suite, dtype=dtype, only=PARTS)
    wrong = {case.case for case in report.cases if not case.passed}
    assert wrong == DEVIATIONS.get((backend, dtype), set())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mlx(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    assert_agrees("mlx", dtype, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_jax(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    assert_agrees("jax", dtype, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_autograd(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("autograd")
    assert_agrees("autograd", dtype, tmp_path / "out")
