"""Linear layer with a low-rank adapter: y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ."""

from typing import NamedTuple

from mesp_ref.ops._array import NOTHING, Array, Table, rows
from mesp_ref.ops.linear import LinearRes, linear_bwd_params


class LoraLinearRes(NamedTuple):
    """Residuals of lora_linear."""

    x: Array | None  # [..., in]; None once dropped: the block rebuilds it
    h: Array | None  # [..., R], x·Aᵀ; None once dropped: the backward rebuilds it from x


def lora_linear(
    x: Array, w: Table, b: Table | None, A: Array, B: Array,
    *, s: float, drop: frozenset[str] = NOTHING,
) -> tuple[Array, LoraLinearRes]:  # fmt: skip
    """Frozen linear layer plus its LoRA branch.

    Forward   h = x·Aᵀ;  y = x·Wᵀ + b + s·h·Bᵀ
    Shapes    x [..., in], w [out, in], b [out] or None, A [R, in], B [out, R] -> y [..., out]
    Drop      "h"
    Source    Hu et al. 2021, eq. 3; s = alpha/R, or alpha/√R with rank stabilisation
    """
    h = rows(x) @ A.T  # [M, R]
    y = rows(x) @ w[...].T  # [M, out]
    if b is not None:
        y += b[...]
    y += (h * s) @ B.T
    kept = None if "h" in drop else h.reshape(*x.shape[:-1], len(A))
    return y.reshape(*x.shape[:-1], w.shape[0]), LoraLinearRes(x, kept)


def lora_linear_bwd(
    dy: Array, res: LoraLinearRes, w: Table, b: Table | None, A: Array, B: Array, *, s: float
) -> tuple[Array, Array, Array]:
    """VJP of lora_linear in its activation and in A and B.

    Backward  dh = s·dy·B;  dx = dy·W + dh·A;  dA = dhᵀ·x;  dB = s·dyᵀ·h
              W is frozen, yet dy·W stays: it carries the gradient to the layers below.
    Shapes    dy [..., out] -> dx [..., in], dA [R, in], dB [out, R]
    """
    assert res.x is not None, "lora_linear_bwd needs the layer's input; rebuild it first"
    x, dy2 = rows(res.x), rows(dy)
    h = x @ A.T if res.h is None else rows(res.h)  # [M, R]
    dh = (dy2 @ B) * s  # [M, R]
    dx = dy2 @ w[...]
    dx += dh @ A
    return dx.reshape(*dy.shape[:-1], w.shape[1]), dh.T @ x, dy2.T @ (h * s)


def lora_linear_bwd_params(
    dy: Array, res: LoraLinearRes, w: Table, b: Table | None, A: Array, B: Array, *, s: float
) -> tuple[Array, Array | None]:
    """VJP of lora_linear in the base weight and bias: those of linear, the branch adds nothing.

    Backward  dw = dyᵀ·x;  db = Σ_rows dy
    """
    return linear_bwd_params(dy, LinearRes(res.x), w, b)
