"""Proof of gradients: oracles, a checker for anyone's functions, properties, seeded bugs.

from mesp_ref.verify import gradcheck
result = gradcheck(forward, backward, args)     # forward(*args) -> y; backward(dy, *args) -> grads
assert result.passed, str(result)

Beside it: `gradcheck_property` and `strategies` for Hypothesis, `conventions`, `adapters` for torch,
JAX, MLX and Triton; and for mesp_ref itself `oracles` and `precision` (over rows of the registry),
`properties`, `bugs` and `mutants`, `checkpoint_gradcheck`. An import of this package loads NumPy and
the checker, nothing of the models: what a name needs is imported when the name is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mesp_ref.verify.gradcheck import GradcheckResult, gradcheck, gradgradcheck
from mesp_ref.verify.result import Finding, failures, require

if TYPE_CHECKING:
    from mesp_ref.verify.checkpoint import checkpoint_gradcheck
    from mesp_ref.verify.drawn import gradcheck_property
    from mesp_ref.verify.oracles import adjoint, complex_step, float32, hessian_symmetry, richardson
    from mesp_ref.verify.subject import Subject, op_subject
    from mesp_ref.verify.whole_model import model_subject

_HOMES = {
    "checkpoint": ("checkpoint_gradcheck",),
    "drawn": ("gradcheck_property",),
    "oracles": ("adjoint", "complex_step", "float32", "hessian_symmetry", "richardson"),
    "subject": ("Subject", "op_subject"),
    "whole_model": ("model_subject",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Finding",
    "GradcheckResult",
    "Subject",
    "adjoint",
    "checkpoint_gradcheck",
    "complex_step",
    "failures",
    "float32",
    "gradcheck",
    "gradcheck_property",
    "gradgradcheck",
    "hessian_symmetry",
    "model_subject",
    "op_subject",
    "require",
    "richardson",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mesp_ref.verify.{_HOME[name]}"), name)
