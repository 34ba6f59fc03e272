"""positions/: RoPE with theta, scaling and positions as attributes, exact from the equation."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mpmath
import numpy as np

from mesp_ref.golden.builder.draw import generator, representable, stored
from mesp_ref.golden.suite import Case, Tensor, Vectors
from mesp_ref.ops import Array

DIGITS = 60
SOURCE = (
    f"equation at {DIGITS} digits, angles too; dx is the transposed rotation of dy; rounded once"
)
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


class Positions(NamedTuple):
    """What is turned by what."""

    name: str
    note: str
    positions: list[int]
    theta: float
    head_dim: int = 16
    scaling: dict[str, Any] | None = None


CASES = (
    Positions("from_0", "positions 0 to 6, theta 10,000", list(range(7)), 1e4),
    Positions("from_5", "positions 5 to 11, theta 1e6: a cache holds five", list(range(5, 12)), 1e6),
    Positions("packed", "two documents in a row: positions start again", [0, 1, 2, 3, 0, 1, 2], 1e4),
    Positions("left_padded", "positions of padding are 0", [0, 0, 0, 1, 2, 3, 4], 1e4),
    Positions("far", "positions from 30,000, theta 1e6", list(range(30_000, 30_007)), 1e6),
    Positions("linear", "angles divided by 8", list(range(7)), 1e4,
              scaling={"rope_type": "linear", "factor": 8.0}),
    Positions("llama3", "Llama 3's scaling, theta 5e5, positions from 100", list(range(100, 107)), 5e5,
              head_dim=64, scaling=LLAMA3),
)  # fmt: skip


def frequency(case: Positions, i: int) -> Any:
    """f_i at the working precision (see golden.positions for the formula)."""
    f = mpmath.mpf(case.theta) ** (mpmath.mpf(-2 * i) / case.head_dim)
    if case.scaling is None:
        return f
    factor = mpmath.mpf(case.scaling["factor"])
    if case.scaling["rope_type"] == "linear":
        return f / factor
    low, high = (case.scaling[f"{end}_freq_factor"] for end in ("low", "high"))
    turns = case.scaling["original_max_position_embeddings"] * f / (2 * mpmath.pi)
    smooth = min(mpmath.mpf(1), max(mpmath.mpf(0), (turns - low) / (high - low)))
    return (1 - smooth) * f / factor + smooth * f


def turned(case: Positions, x: Array, way: int) -> tuple[Array, Array]:
    """x rotated forward (way 1) or back (−1), and mag: |terms|·(1 + |angle|).

    An angle is a product of float32 numbers in most engines, off by |angle|·u: that is no mistake.
    """
    half, y, mag = case.head_dim // 2, np.empty(x.shape), np.empty(x.shape)
    with mpmath.workdps(DIGITS):
        for t, position in enumerate(case.positions):
            for i in range(half):
                angle = position * frequency(case, i)
                c, s = mpmath.cos(angle), way * mpmath.sin(angle)
                for n, h in np.ndindex(x.shape[0], x.shape[2]):
                    a, b = (mpmath.mpf(float(x[n, t, h, j])) for j in (i, i + half))
                    y[n, t, h, i], y[n, t, h, i + half] = a * c - b * s, b * c + a * s
                    size = float((abs(a) + abs(b)) * (1 + abs(angle)))
                    mag[n, t, h, i] = mag[n, t, h, i + half] = size
    return y, mag


def make_positions(case: Positions) -> tuple[Case, Vectors]:
    """One case: x, dy and positions in; y and dx out."""
    rng, name = generator(f"positions/{case.name}"), f"positions/{case.name}"
    shape = (2, len(case.positions), 2, case.head_dim)
    x, dy = (representable(rng.standard_normal(shape)) for _ in range(2))
    (y, mag_y), (dx, mag_dx) = turned(case, x, 1), turned(case, dy, -1)
    tensors = (
        Tensor("y", y.shape, "result", "forward", 2, 3),
        Tensor("dx", dx.shape, "result", "backward", 2, 3),
    )
    attributes: dict[str, Any] = {"theta": case.theta, "scaling": case.scaling or {}}
    positions = np.array(case.positions, np.int32)
    inputs = {"x": stored(x), "positions": positions, "dy": stored(dy)}
    made = Case(
        name, "positions", f"{name}.safetensors", case.note, SOURCE, ("float64", "float32"),
        attributes, tensors,
    )  # fmt: skip
    return made, Vectors(inputs, {"y": y, "dx": dx}, {"y": mag_y, "dx": mag_dx})


def position_cases() -> Iterator[tuple[Case, Vectors]]:
    """Every case, one after the other."""
    yield from map(make_positions, CASES)
