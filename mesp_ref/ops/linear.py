"""Linear layer y = x·Wᵀ + b."""

from typing import NamedTuple

from mesp_ref.ops._array import Array, Table, rows


class LinearRes(NamedTuple):
    """Residuals of linear."""

    x: Array | None  # [..., in]; None once dropped: the block rebuilds it


def linear(x: Array, w: Table, b: Table | None = None) -> tuple[Array, LinearRes]:
    """Affine map of the last axis.

    Forward   y = x·Wᵀ + b
    Shapes    x [..., in], w [out, in], b [out] or None -> y [..., out]
    """
    y = rows(x) @ w[...].T  # [M, out]
    if b is not None:
        y += b[...]
    return y.reshape(*x.shape[:-1], w.shape[0]), LinearRes(x)


def linear_bwd(dy: Array, res: LinearRes, w: Table, b: Table | None = None) -> Array:
    """VJP of linear in its activation.

    Backward  dx = dy·W.  Derivation: dy·(dx·Wᵀ) = (dy·W)·dx for every direction dx.
    Shapes    dy [..., out] -> dx [..., in]
    """
    dx = rows(dy) @ w[...]
    return dx.reshape(*dy.shape[:-1], w.shape[1])


def linear_bwd_params(
    dy: Array, res: LinearRes, w: Table, b: Table | None = None
) -> tuple[Array, Array | None]:
    """VJP of linear in its parameters.

    Backward  dw = dyᵀ·x (summed over all rows);  db = Σ_rows dy, None without a bias
    Shapes    dy [..., out], res.x [..., in] -> dw [out, in], db [out]
    """
    assert res.x is not None, "linear_bwd_params needs the layer's input; rebuild it first"
    dy = rows(dy)
    return dy.T @ rows(res.x), None if b is None else dy.sum(axis=0)
