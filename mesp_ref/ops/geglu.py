"""The gate of Gemma's MLP: gelu(gate) ⊙ up, GELU in its tanh form."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import NOTHING, Array, sigmoid, sigmoids

CUBE, TWICE = 0.044715, 2 * (2 / np.pi) ** 0.5
FAR = 1e4  # a gate's square from which on σ is 0 or 1, and its cube would overflow


class GegluRes(NamedTuple):
    """Residuals of geglu: [..., F] each."""

    gate: Array
    up: Array
    gelu: Array | None  # None once dropped: the backward rebuilds it


def geglu(gate: Array, up: Array, *, drop: frozenset[str] = NOTHING) -> tuple[Array, GegluRes]:
    """Gated linear unit with the tanh form of GELU.

    Forward   gelu = gate·(1 + tanh(u))/2 = gate ⊙ σ(2u), u = √(2/π)·(gate + 0.044715·gate³);
              z = gelu ⊙ up. σ keeps the digits that 1 + tanh loses
    Shapes    gate, up [..., F] -> z [..., F]
    Drop      "gelu"
    Source    Shazeer 2020, eq. 5; Hendrycks & Gimpel 2016 for the tanh form
    """
    gelu = sigmoid((CUBE * np.minimum(gate * gate, FAR) + 1) * gate * TWICE)
    gelu *= gate
    return gelu * up, GegluRes(gate, up, None if "gelu" in drop else gelu)


def geglu_bwd(dz: Array, res: GegluRes) -> tuple[Array, Array]:
    """VJP of geglu.

    Backward  dup = dz ⊙ gelu;  dgate = dz ⊙ up ⊙ (σ + gelu ⊙ (1 − σ) ⊙ 2u′), 1 − σ(t) formed as
              σ(−t);  2u′ = 2·√(2/π)·(1 + 3·0.044715·gate²)
    Shapes    dz [..., F] -> dgate, dup [..., F]
    """
    cubic = CUBE * np.minimum(res.gate * res.gate, FAR)
    sig, dgate, turn = np.empty_like(cubic), np.empty_like(cubic), (cubic + 1) * res.gate * TWICE
    sigmoids(turn, sig, dgate, turn)
    gelu = res.gate * sig if res.gelu is None else res.gelu
    dgate *= gelu * ((3 * cubic + 1) * TWICE)
    dgate += sig
    dgate *= res.up * dz
    return dgate, dz * gelu
