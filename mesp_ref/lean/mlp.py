"""The gated MLP with its three LoRA projections, over tiles of its width.

Weights and LoRA matrices carry the letter of their projection: g gate, u up, d down. A projection
without an adapter has matrices of rank 0.
"""

import numpy as np

from mesp_ref.lean._mlp_tiles import GateUp, Keep, MlpRes, backward_tiles, gelu, product, silu
from mesp_ref.lean.widths import mlp_width
from mesp_ref.ops._array import Array, Table, rows
from mesp_ref.ops._tiles import tiles, view, widest


def mlp(
    x: Array, wg: Table, wu: Table, wd: Table,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array,
    *, s: float, is_gelu: bool = False, width: int | None = None, keep: Keep | None = None,
) -> tuple[Array, MlpRes]:  # fmt: skip
    """Gate, up, the gate between them, and down, without holding any of the three whole.

    Forward   gate = x·Wgᵀ + s·(x·Agᵀ)·Bgᵀ, up alike;  z = silu(gate) ⊙ up, or gelu;
              y = Σ_tiles z_tile·Wd[:, tile]ᵀ + s·(Σ_tiles z_tile·Ad[:, tile]ᵀ)·Bdᵀ
    Shapes    x [..., C]; wg, wu [F, C]; wd [C, F]; A [R, in], B [out, R] -> y [..., C]
    Tiles     `width` of the F columns, by default mlp_width; the backward must be given the same
    Keep      `keep` takes gate and up of a tile, which lie in scratch, and returns what outlasts it
    Source    Shazeer 2020, eq. 6; Hu et al. 2021, eq. 3
    """
    x2, f = rows(x), wg.shape[0]
    m, c = x2.shape
    width = width or mlp_width(m)
    dtype = np.result_type(x, wg.dtype, wu.dtype, wd.dtype, Ag, Bg, Au, Bu, Ad, Bd)
    widths = widest(f, width)
    scratch = np.empty((2, m * widths), dtype, like=x)
    spare = np.empty(m * max(c, widths), dtype, like=x)
    hg, hu = x2 @ Ag.T * s, x2 @ Au.T * s  # [M, R]
    hd, y = np.zeros((m, len(Ad)), dtype, like=x), np.zeros((m, c), dtype, like=x)
    kept, activation = list[GateUp](), gelu if is_gelu else silu
    for a, b in tiles(f, width):
        z, up = (view(part, m, b - a) for part in scratch)
        product(x2, wg[a:b].T, hg, Bg[a:b].T, z, spare)
        gate = keep(z) if keep else z
        activation(z, up, view(spare, *z.shape))
        product(x2, wu[a:b].T, hu, Bu[a:b].T, up, spare)
        if keep:
            kept.append((gate, keep(up)))
        z *= up
        y += np.matmul(z, wd[:, a:b].T, out=view(spare, m, c))
        hd += z @ Ad[:, a:b].T
    y += (hd * s) @ Bd.T
    return y.reshape(x.shape), MlpRes(x, kept if keep else None)


def mlp_bwd(
    dy: Array, res: MlpRes, wg: Table, wu: Table, wd: Table,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array,
    *, s: float, is_gelu: bool = False, width: int | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """VJP of mlp in its activation and its LoRA matrices; down_proj is not computed again.

    Backward  per tile, with dgate, dup and z:  dx += dgate·Wg + dup·Wu;  dB[tile] = dgateᵀ·h;
              dh += dgate·B[tile];  dAd[:, tile] = dhdᵀ·z;  after the last:  dx += s·dh·A;
              dA = s·dhᵀ·x;  dBd = dyᵀ·(s·Σ_tiles z·Ad[:, tile]ᵀ)
    Shapes    dy [..., C] -> dx [..., C], dAg, dBg, dAu, dBu, dAd, dBd
    """
    x, dy2 = rows(res.x), rows(dy)
    m, c = x.shape
    width = width or mlp_width(m)
    dtype = np.result_type(dy, x, wg.dtype, wu.dtype, wd.dtype, Ag, Bg, Au, Bu, Ad, Bd)
    hg, hu, dhd = x @ Ag.T * s, x @ Au.T * s, dy2 @ Bd * s  # [M, R]
    dhg, dhu, hd = np.zeros_like(hg, dtype), np.zeros_like(hu, dtype), np.zeros_like(dhd, dtype)
    dx, dAd = np.zeros((m, c), dtype, like=x), np.empty(Ad.shape, dtype, like=x)
    dBg, dBu = np.empty(Bg.shape, dtype, like=x), np.empty(Bu.shape, dtype, like=x)
    walk = backward_tiles(dy2, res, wg, wu, wd, Ag, Bg, Au, Bu, Ad, Bd, s, width, dtype, is_gelu)
    for t in walk:
        at = slice(t.a, t.b)
        dAd[:, at] = dhd.T @ t.z
        hd += t.z @ Ad[:, at].T
        dBg[at], dBu[at] = t.dgate.T @ hg, t.dup.T @ hu
        dhg += t.dgate @ Bg[at]
        dhu += t.dup @ Bu[at]
        dx += np.matmul(t.dgate, t.wg, out=t.spare)
        dx += np.matmul(t.dup, t.wu, out=t.spare)
        del t  # and with it the decoded weights
    for dh, A in ((dhg, Ag), (dhu, Au)):
        dh *= s
        dx += dh @ A
    hd *= s
    return dx.reshape(dy.shape), dhg.T @ x, dBg, dhu.T @ x, dBu, dAd, dy2.T @ hd


def mlp_bwd_params(
    dy: Array, res: MlpRes, wg: Table, wu: Table, wd: Table,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array,
    *, s: float, is_gelu: bool = False, width: int | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """VJP of mlp in its base weights.

    Backward  dWg[tile] = dgateᵀ·x;  dWu[tile] = dupᵀ·x;  dWd[:, tile] = dyᵀ·z
    Shapes    dy [..., C] -> dwg, dwu [F, C], dwd [C, F]
    """
    x, dy2 = rows(res.x), rows(dy)
    dtype = np.result_type(dy, x, wg.dtype, wu.dtype, wd.dtype, Ag, Bg, Au, Bu, Ad, Bd)
    width = width or mlp_width(len(x))
    dwg, dwu, dwd = (np.empty(w.shape, dtype, like=x) for w in (wg, wu, wd))
    walk = backward_tiles(dy2, res, wg, wu, wd, Ag, Bg, Au, Bu, Ad, Bd, s, width, dtype, is_gelu)
    for t in walk:
        dwg[t.a : t.b], dwu[t.a : t.b] = t.dgate.T @ x, t.dup.T @ x
        dwd[:, t.a : t.b] = dy2.T @ t.z
        del t
    return dwg, dwu, dwd
