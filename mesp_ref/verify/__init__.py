"""Proof of gradients: oracles, a checker for anyone's functions, properties, seeded bugs.

from mesp_ref.verify import gradcheck
result = gradcheck(forward, backward, args)     # forward(*args) -> y; backward(dy, *args) -> grads
assert result.passed, str(result)

Beside it: `oracles` and `precision` (over rows of the registry), `strategies` for Hypothesis,
`properties`, `bugs` and `mutants`, `checkpoint_gradcheck`, and `adapters` for torch, JAX and MLX.
`precision`, `mutants` and `strategies` need the packages mpmath and hypothesis.
"""

from mesp_ref.verify.checkpoint import checkpoint_gradcheck
from mesp_ref.verify.gradcheck import GradcheckResult, gradcheck
from mesp_ref.verify.oracles import adjoint, complex_step, float32, hessian_symmetry, richardson
from mesp_ref.verify.result import Finding, failures, require
from mesp_ref.verify.subject import Subject, op_subject
from mesp_ref.verify.whole_model import model_subject

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
    "hessian_symmetry",
    "model_subject",
    "op_subject",
    "require",
    "richardson",
]
