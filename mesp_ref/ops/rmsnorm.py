"""Root-mean-square normalisation."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array, Table, rows


class RmsNormRes(NamedTuple):
    """Residuals of rmsnorm."""

    x: Array  # [..., C]


def _inverse_rms(x: Array, eps: float) -> Array:
    """1/n with n = sqrt(mean(x²) + eps), one number per row: [..., 1]."""
    mean_square = np.einsum("...c,...c->...", x, x)[..., None] / x.shape[-1]
    r = 1 / np.sqrt(mean_square + eps)
    far = ~np.isfinite(mean_square[..., 0].real)
    if far.any():
        r[far] = _inverse_rms_of_far(x[far])
    return r


def _inverse_rms_of_far(x: Array) -> Array:
    """1/n of rows whose x² overflows (float32: |x| > 1.8e19): of x/2^k, where eps is nothing."""
    unit = x.dtype.type(2.0 ** (-5 * np.finfo(x.dtype).maxexp // 8))
    near = x * unit
    return unit / np.sqrt(np.einsum("mc,mc->m", near, near)[:, None] / x.shape[-1])


def rmsnorm(x: Array, w: Table, *, eps: float) -> tuple[Array, RmsNormRes]:
    """Root-mean-square normalisation of the last axis.

    Forward   n = sqrt(mean(x²) + eps);  y = w ⊙ x / n
    Shapes    x [..., C], w [C] -> y [..., C]
    Source    Zhang & Sennrich 2019, eq. 4; Qwen2 puts eps inside the root
    """
    y = x * _inverse_rms(x, eps)
    y *= w[...]
    return y, RmsNormRes(x)


def rmsnorm_bwd(dy: Array, res: RmsNormRes, w: Table, *, eps: float) -> Array:
    """VJP of rmsnorm in its activation.

    Backward  u = dy ⊙ w;  dx = u/n − x·mean(u ⊙ x)/n³
              The first term scales, the second removes the part along x that n absorbs:
              ∂n/∂x_c = x_c/(C·n), hence ∂(1/n)/∂x_c = −x_c/(C·n³).
    Shapes    dy [..., C] -> dx [..., C]
    """
    x, r = res.x, _inverse_rms(res.x, eps)
    dx = dy * w[...]
    along_x = np.einsum("...c,...c->...", dx, x)[..., None] / x.shape[-1] * r * r
    dx -= x * along_x
    dx *= r  # last: r³ alone would underflow where x is large
    return dx


def rmsnorm_bwd_params(dy: Array, res: RmsNormRes, w: Table, *, eps: float) -> Array:
    """VJP of rmsnorm in its weight.

    Backward  dw = Σ_rows dy ⊙ x / n
    Shapes    dy [..., C] -> dw [C]
    """
    return np.einsum("mc,mc->c", rows(dy), rows(res.x * _inverse_rms(res.x, eps)))
