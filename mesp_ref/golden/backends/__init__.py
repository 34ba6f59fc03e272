"""Clients of the suite: each computes the cases in its framework and writes what it got.

    engine       mesp_ref itself, in NumPy      torch        functional ops and autograd
    jax          jax.numpy and jax.vjp          mlx          mlx.core and mx.vjp
    autograd     HIPS autograd's NumPy          tinygrad     its layers and Tensor.gradient
    ggml         llama.cpp's backward graph     transformers its modules, and PEFT's layers
    liger, unsloth, fla, flash_attn, cut_cross_entropy
                 Triton kernels, on a GPU or in Triton's interpreter

A backend is a module with `compute(case, inputs, root, dtype) -> {tensor name: array}`; `root` is
the suite's directory, for the checkpoints of e2e. It may know fewer kinds of cases than there are
and then raises NotCovered. No backend's code is here: each calls a package that the user installs.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError, escaped
from mesp_ref.files.output import new_directory
from mesp_ref.golden.builder.write import write_tensors
from mesp_ref.golden.check import ROLES, select
from mesp_ref.golden.suite import Case, Suite
from mesp_ref.ops import Array

BACKENDS = {  # and what pip installs for it
    "engine": "mesp-ref",
    "torch": "torch",
    "jax": "jax",
    "mlx": "'mlx[cpu]'",
    "autograd": "autograd",
    "tinygrad": "tinygrad",
    "ggml": "ggml-python",
    "transformers": "torch transformers peft",
    "liger": "--no-deps liger-kernel triton",
    "unsloth": "--no-deps unsloth unsloth_zoo triton",
    "fla": "--no-deps flash-linear-attention fla-core einops triton",
    "flash_attn": "--no-deps --no-build-isolation flash-attn einops triton",
    "cut_cross_entropy": "--no-deps cut-cross-entropy triton",
}


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

    Raises MespRefError for an unknown backend, a package that is not installed or not the one that
    the backend knows, a case at which it raises, an `out` that is not empty, and when nothing that
    was asked for covers the dtype
    """
    backend, done = load(name), []
    suite = suite or Suite()
    with new_directory(out, overwrite=overwrite, inputs=[suite.root]) as root:
        for case, _ in select(suite, only, ROLES):
            if dtype not in case.dtypes:
                continue
            inputs = suite.read(case).inputs
            try:
                arrays = computed(backend, name, case, inputs, suite.root, dtype)
            except NotCovered:
                continue
            write_tensors(root / case.file, arrays)
            done.append(case.name)
        if not done:
            raise MespRefError(f"dtype: found {dtype!r}, covered by none of the cases asked for")
    return done


def load(name: str) -> Any:
    """The module of a backend; MespRefError, with what to install, where it cannot be imported."""
    if name not in BACKENDS:
        raise MespRefError(f"backend: found {name!r}, expected one of {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise MespRefError(
            f"{error.name}: not installed, needed by backend {name!r}: pip install {BACKENDS[name]}"
        ) from None
    except (ImportError, AttributeError) as error:
        raise MespRefError(
            f"backend {name!r}: the installed version lacks what is used of it "
            f"({escaped(str(error))}); docs/scoreboard.md says which one was tried"
        ) from error


def computed(
    backend: Any, name: str, case: Case, inputs: dict[str, Array], root: Path, dtype: str
) -> dict[str, Array]:
    """What a backend gets for a case; MespRefError, naming the case, where it raises."""
    try:
        found: dict[str, Array] = backend.compute(case, inputs, root, dtype)
        return found
    except (NotCovered, MespRefError):
        raise
    except Exception as error:  # of whatever kind: it is other people's code that runs
        first = (str(error).strip() or "no message").splitlines()[0]
        raise MespRefError(
            f"{case.name}: backend {name!r} raised {type(error).__name__}: {escaped(first)[:200]}; "
            "leave the case out with --only"
        ) from error
