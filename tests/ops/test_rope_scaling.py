"""Angles of positions, scaled and not, against their equation at 50 digits."""

import dataclasses

import mpmath
import numpy as np
import pytest

from mesp_ref import ops
from mesp_ref.engine.config import NO_ROPE, SLIDING
from mesp_ref.engine.positions import layers
from mesp_ref.files.models import SHAPES
from mesp_ref.ops import RopeScaling
from mesp_ref.verify.equations import angles
from mesp_ref.verify.samples import sample_model, small_config

LLAMA3 = SHAPES["llama-3.2-1b"].rope_scaling
SCALINGS = {
    "none": (1e4, None), "linear": (1e6, RopeScaling(8.0)), "Llama 3.2": (5e5, LLAMA3),
    "all between": (3.0, RopeScaling(2.0, 60, 1.0, 12.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_the_equation(name: str) -> None:
    """Within what float64 leaves of the angle: its rounding, times the angle itself."""
    theta, scaling = SCALINGS[name]
    cos, sin = ops.rope_tables(0, 50, 64, theta, np.dtype(np.float64), scaling)
    config = dataclasses.replace(
        SHAPES["llama-3.2-1b"], rope_theta=theta, rope_scaling=scaling, head_dim=64
    )
    with mpmath.mp.workdps(50):
        angle = angles(config, "full_attention", 50)
        for at in ((1, 0), (7, 5), (49, 15), (49, 31), (33, 20)):
            bound = 8 * 2.0**-53 * (1 + float(angle[at]))
            assert abs(float(mpmath.cos(angle[at])) - cos[at]) <= bound
            assert abs(float(mpmath.sin(angle[at])) - sin[at]) <= bound


def test_llama_keeps_fast_frequencies_and_slows_slow_ones_by_the_factor() -> None:
    one = ops.rope_tables(1, 2, 64, 5e5, np.dtype(np.float64))
    scaled = ops.rope_tables(1, 2, 64, 5e5, np.dtype(np.float64), LLAMA3)
    ratio = np.arctan2(one[1], one[0])[0] / np.arctan2(scaled[1], scaled[0])[0]
    assert np.all(np.diff(ratio) >= -1e-12)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(32)
    assert ((ratio > 1.001) & (ratio < 31.9)).any()


def test_a_layer_without_rope_turns_nothing_and_a_window_begins_at_its_key() -> None:
    config = small_config(layer_types=(NO_ROPE, SLIDING), sliding_window=3)
    still, windowed = layers(sample_model(np.random.default_rng(0), config), None, 0, 6)
    assert np.all(still.cos == 1)
    assert not still.sin.any()
    assert still.first is None
    assert windowed.first is not None
    assert windowed.first.tolist() == [[0, 0, 0, 1, 2, 3]]
    rows = np.array([[0, 1, 2, 3, 0, 1]])
    _, windowed = layers(sample_model(np.random.default_rng(0), config), None, 0, 6, rows)
    assert windowed.first is not None
    assert windowed.first.tolist() == [[0, 0, 0, 1, 4, 4]]
