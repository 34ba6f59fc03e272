"""Merging changes results by rounding alone, within a bound that is derived."""

from pathlib import Path

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref import ops
from mesp_ref.engine.config import PROJECTIONS

U = 2.0**-24  # unit roundoff of float32


@pytest.mark.parametrize("projection", PROJECTIONS.values())
def test_a_merged_projection_differs_by_rounding_alone(
    tiny_model_dir: Path, tmp_path: Path, projection: str
) -> None:
    """|x·W′ᵀ − (x·Wᵀ + s·x·Aᵀ·Bᵀ)| ≤ 2·(1 + 4·√k)·u·|x|·(|W| + s·|B|·|A|)ᵀ,  k = in + R.

    Either side is off by 4·√k·u of the magnitude at most (sums of k products); W′ and s·B·A are
    rounded once. The bias is added on both sides alike.
    """
    model, R = mr.load_model(tiny_model_dir), 3
    adapter = mr.init_lora(model.config, rank=R, alpha=5.0, b_std=0.3, seed=2)
    mr.merge(model, adapter, tmp_path / "merged")
    name = f"model.layers.1.{projection}"
    W, merged = model.weights[f"{name}.weight"][...], mr.load_model(tmp_path / "merged").weights
    pair = adapter.pair(name)
    assert pair is not None
    A, B = pair
    x = np.random.default_rng(3).standard_normal((2, 7, W.shape[1])).astype(np.float32)
    before, _ = ops.lora_linear(x, W, None, A, B, s=adapter.scale)
    after, _ = ops.linear(x, merged[f"{name}.weight"])
    mag = np.abs(x) @ (np.abs(W) + adapter.scale * np.abs(B) @ np.abs(A)).T
    bound = 2 * (1 + 4 * np.sqrt(W.shape[1] + R)) * U * mag
    assert (np.abs(after - before) <= bound).all()
    assert np.abs(ops.linear(x, W)[0] - before).max() > 1e3 * bound.max()  # the adapter matters


def test_a_merged_model_is_as_exact_as_the_adapted_one(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Logits before and after merging lie within 8 times our own float32 error of each other.

    That error is of the adapted model against float64. The merged one has at most 4 times of it,
    the rule for another order of the same roundings, and so has the adapted one.
    """
    ids = np.arange(3, 60)[None]
    wide, model = mr.load_model(tiny_model_dir, "float64"), mr.load_model(tiny_model_dir)
    adapter = mr.init_lora(model.config, rank=3, alpha=5.0, b_std=0.3, seed=2)
    mr.merge(model, adapter, tmp_path / "merged")
    exact = mr.logits(wide, ids, adapter.astype("float64"))
    before = mr.logits(model, ids, adapter)
    after = mr.logits(mr.load_model(tmp_path / "merged"), ids)
    own = np.abs(before - exact).max()
    assert 0 < np.abs(after - before).max() <= 8 * own
    assert np.abs(mr.logits(model, ids) - before).max() > 1e3 * own  # the adapter matters
