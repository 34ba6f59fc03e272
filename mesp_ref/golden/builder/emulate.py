"""How far a model drifts in a precision: our own emulation, and the gates four times above it."""

from collections.abc import Callable, Sequence

import numpy as np

from mesp_ref.golden.plain import Arrays, Plain, Setting
from mesp_ref.golden.tolerance import UNITS
from mesp_ref.ops import Array

RUNS = 16
MARGIN = 4.0


class Rounded(Plain):
    """Plain in float32 arithmetic, every tensor moved by up to one rounding to storage.

    The direction is random, so that some runs show what one deterministic rounding hides.
    """

    dtype = np.float32

    def __init__(self, setting: Setting, unit: float, rng: np.random.Generator):
        self.unit, self.rng = unit, rng
        cos, sin = self.rounded(setting.cos), self.rounded(setting.sin)
        local = setting.local and (self.rounded(setting.local[0]), self.rounded(setting.local[1]))
        super().__init__(setting._replace(cos=cos, sin=sin, local=local))

    def rounded(self, value: Array) -> Array:
        moved = value * (1 + self.unit * self.rng.uniform(-1, 1, value.shape))
        return np.asarray(moved, np.float32)

    def keep(self, name: str, value: Array) -> Array:
        return super().keep(name, self.rounded(value))

    def add(self, what: str, a: Array, b: Array) -> Array:
        return self.rounded(a + b)


def gates(
    want: Arrays,
    setting: Setting,
    run: Callable[[Plain], Arrays],
    rng: np.random.Generator,
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16"),
    runs: int = RUNS,
) -> dict[str, dict[str, float]]:
    """By tensor and dtype: four times the worst error of several emulated runs.

    float64 is float32's scaled by the ratio of the units: to first order, rounding is linear.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in want}
    for dtype in dtypes:
        worst = dict.fromkeys(want, 0.0)
        for _ in range(runs):
            trace = run(Rounded(setting, UNITS[dtype].store, rng))
            for name, value in want.items():
                worst[name] = max(worst[name], float(np.abs(trace[name] - value).max()))
        for name, error in worst.items():
            found[name][dtype] = MARGIN * error
    ratio = UNITS["float64"].store / UNITS["float32"].store
    return {name: {"float64": g["float32"] * ratio} | g for name, g in found.items()}
