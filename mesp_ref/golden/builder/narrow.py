"""What right kernels do in 16 bits, emulated: the gates of whole tensors are four times their error.

Each op is written as an eager framework runs it: every intermediate that it stores is rounded to 16
bits, sums and what happens inside one operation stay in float32. A fused kernel rounds less.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mesp_ref.golden.generate import row_sums
from mesp_ref.ops import Array

MARGIN = 4.0
Rounding = Callable[[Array], Array]


def _rmsnorm(r: Rounding, v: dict[str, Any]) -> dict[str, Array]:
    """x/n in float32, rounded; times w, rounded. Backwards the same way."""
    x, w, dy = v["x"], v["w"], v["dy"]
    inverse = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + v["eps"])
    unit = r(x * inverse)
    u = r(dy * w)
    dx = r(u * inverse - x * (u * x).mean(-1, keepdims=True) * inverse**3)
    return {"y": r(w * unit), "dx": dx, "dw": r((dy * unit).reshape(-1, len(w)).sum(0))}


def _swiglu(r: Rounding, v: dict[str, Any]) -> dict[str, Array]:
    """silu stored; its derivative inside one operation."""
    gate, up, dz = v["gate"], v["up"], v["dy"]
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = r(gate * sigmoid)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return {"y": r(silu * up), "dgate": r(r(dz * up) * slope), "dup": r(dz * silu)}


EAGER = {"rmsnorm": _rmsnorm, "swiglu": _swiglu}
NARROW = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def gates_of(
    op: str, args: dict[str, Any], want: dict[str, Array]
) -> dict[str, dict[str, dict[str, float]]]:
    """By tensor: norms and biases, each by dtype: four times what the emulation is off by."""
    found: dict[str, dict[str, dict[str, float]]] = {n: {"norms": {}, "biases": {}} for n in want}
    for dtype, narrow in NARROW.items():

        def rounded(x: Array, narrow: Any = narrow) -> Array:
            return np.asarray(x).astype(narrow).astype(np.float64)

        for name, value in EAGER[op](rounded, args).items():
            right = want[name]
            norm = float(np.linalg.norm(value - right) / np.linalg.norm(right))
            rows, found_rows = row_sums(right), row_sums(value)
            off = found_rows[rows > 0] / rows[rows > 0] - 1
            bias = float(np.sqrt(np.mean(off**2)))
            found[name]["norms"][dtype] = float(f"{MARGIN * norm:.3e}")
            found[name]["biases"][dtype] = float(f"{MARGIN * bias:.3e}")
    return found
