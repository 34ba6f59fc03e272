"""The gate of the MLP: silu(gate) ⊙ up."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import NOTHING, Array, sigmoid, sigmoids


class SwigluRes(NamedTuple):
    """Residuals of swiglu."""

    gate: Array  # [..., F]
    up: Array  # [..., F]
    silu: Array | None  # [..., F], gate ⊙ σ(gate); None once dropped: the backward rebuilds it


def swiglu(gate: Array, up: Array, *, drop: frozenset[str] = NOTHING) -> tuple[Array, SwigluRes]:
    """Gated linear unit with the SiLU activation.

    Forward   silu = gate ⊙ σ(gate);  z = silu ⊙ up
    Shapes    gate, up [..., F] -> z [..., F]
    Drop      "silu"
    Source    Shazeer 2020, eq. 6
    """
    silu = sigmoid(gate)
    silu *= gate
    if "silu" in drop:
        return np.multiply(silu, up, out=silu), SwigluRes(gate, up, None)
    return silu * up, SwigluRes(gate, up, silu)


def swiglu_bwd(dz: Array, res: SwigluRes) -> tuple[Array, Array]:
    """VJP of swiglu.

    Backward  dup = dz ⊙ silu;  dgate = dz ⊙ up ⊙ (σ + silu ⊙ (1 − σ))
              from silu' = σ + gate·σ·(1 − σ); 1 − σ(g) is formed as σ(−g), which keeps its
              digits where σ is close to 1
    Shapes    dz [..., F] -> dgate, dup [..., F]
    """
    sig, dgate, spare = (np.empty_like(res.gate) for _ in range(3))
    sigmoids(res.gate, sig, dgate, spare)
    silu = np.multiply(res.gate, sig, out=spare) if res.silu is None else res.silu
    dgate *= silu
    dgate += sig
    dgate *= res.up
    dgate *= dz
    return dgate, np.multiply(dz, silu, out=sig)
