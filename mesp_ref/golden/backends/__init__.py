"""Clients of the suite: each computes the cases in its framework and writes what it got.

    engine   mesp_ref itself, in NumPy        torch    functional ops and autograd
    jax      jax.numpy and jax.vjp            mlx      mlx.core and mx.vjp
    autograd HIPS autograd's NumPy            liger    Liger's Triton kernels, interpreted on a CPU

A backend is a module with `compute(case, inputs, root, dtype) -> {tensor name: array}`; `root` is
the suite's directory, for the checkpoints of e2e. It may know fewer kinds of cases than there are
and then raises NotCovered.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

from mesp_ref.errors import MespRefError
from mesp_ref.files.output import new_directory
from mesp_ref.golden.builder.write import write_tensors
from mesp_ref.golden.check import ROLES, select
from mesp_ref.golden.suite import Suite

BACKENDS = ("engine", "torch", "jax", "mlx", "autograd", "liger", "fla", "unsloth", "transformers", "ggml", "tinygrad", "flash_attn", "cut_cross_entropy")


class NotCovered(Exception):
    """A case that a backend does not compute."""


def run(
    name: str,
    out: str | Path,
    suite: Suite | None = None,
    *,
    dtype: str = "float32",
    only: Sequence[str] = (),
    overwrite: bool = False,
) -> list[str]:
    """Compute the cases with a backend into the directory `out`; returns their names.

    Raises MespRefError for an unknown backend, a framework that is not installed, an `out` that is
    not empty, and when nothing that was asked for covers the dtype
    """
    if name not in BACKENDS:
        raise MespRefError(f"backend: found {name!r}, expected one of {', '.join(BACKENDS)}")
    try:
        backend = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise MespRefError(f"{error.name}: not installed, needed by backend {name!r}") from None
    suite, done = suite or Suite(), []
    with new_directory(out, overwrite=overwrite, inputs=[suite.root]) as root:
        for case, _ in select(suite, only, ROLES):
            if dtype not in case.dtypes:
                continue
            inputs = suite.read(case).inputs
            try:
                arrays = backend.compute(case, inputs, suite.root, dtype)
            except NotCovered:
                continue
            write_tensors(root / case.file, arrays)
            done.append(case.name)
        if not done:
            raise MespRefError(f"dtype: found {dtype!r}, covered by none of the cases asked for")
    return done
