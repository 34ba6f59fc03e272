"""Cut cross entropy: head and loss in one Triton kernel through torch; on a CPU interpreted.

Covers lm_loss in 16 bits, which is what its backward takes, where a label counts: it divides by
their number. pip install --no-deps cut-cross-entropy triton.
"""

from pathlib import Path
from typing import Any

import torch

from mesp_ref.golden.backends import NotCovered, interpreter
from mesp_ref.golden.backends.kernels import SIXTEEN, Library, Tensors, compute_op
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

interpreter.prepare()
with interpreter.device():
    from cut_cross_entropy import linear_cross_entropy


def _lm_loss(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    if not (v["labels"] >= 0).any():
        raise NotCovered
    y: torch.Tensor = linear_cross_entropy(v["x"], v["w"], v["labels"])
    return y


OPS: Library = {"lm_loss": _lm_loss}


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One op in `dtype`."""
    with interpreter.device() as device:
        return compute_op(OPS, case, inputs, dtype, dtypes=SIXTEEN[1:], device=device)
