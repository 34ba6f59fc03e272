"""Arguments of op cases, as samples draw them."""

from typing import Any

import numpy as np

from mesp_ref.ops import IGNORED, Array
from mesp_ref.registry.sizes import Sizes


def normal(rng: np.random.Generator, dtype: Any, *shape: int) -> Array:
    """Normal numbers."""
    return rng.standard_normal(shape).astype(dtype)


def labels(rng: np.random.Generator, z: Sizes, rows: int) -> Array:
    """Labels of which every third is ignored."""
    found = rng.integers(0, z.v, rows)
    found[::3] = IGNORED
    return found
