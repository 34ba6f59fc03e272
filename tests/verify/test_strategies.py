"""Strategies: valid cases, and shrinking that ends at the smallest failing shape."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from profiles import examples

import mesp_ref as mr
from mesp_ref.registry import OPS
from mesp_ref.verify import gradcheck, strategies

quick = examples(30)


# The five lines of the README: verify an op of one's own.
def gelu(x: Any) -> Any:
    return x / (1 + np.exp(-1.702 * x))


def gelu_bwd(dy: Any, x: Any) -> Any:
    s = 1 / (1 + np.exp(-1.702 * x))
    return dy * (s + 1.702 * x * s * (1 - s))


@given(x=strategies.values(strategies.shapes(2), scales=(1.0, 1e-6)), seed=strategies.seeds)
@quick
def test_my_op(x: np.ndarray, seed: int) -> None:
    result = gradcheck(gelu, gelu_bwd, (x,), names=("x",), seed=seed)
    assert result.passed, result


def wrong_from_three_rows(dy: Any, x: Any) -> Any:
    dx = gelu_bwd(dy, x)
    if 2 < x.shape[0] < 99 and 1 < x.shape[1] < 99:  # gradcheck looks at long ones by itself
        dx[2, 1] *= 1.01
    return dx


def test_a_failure_shrinks_to_the_smallest_failing_shape() -> None:
    """The op is wrong from [3, 2] on; Hypothesis ends there, and the message says shape and index."""
    cases = strategies.values(strategies.shapes(2), scales=(1.0,))
    smallest = find(
        cases,
        lambda x: not gradcheck(gelu, wrong_from_three_rows, (x,)).passed,
        settings=settings(
            max_examples=300, derandomize=True, deadline=None, database=None,
            phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    assert smallest.shape == (3, 2)
    report = str(gradcheck(gelu, wrong_from_three_rows, (smallest,), names=("x",)))
    assert "gradient of x" in report
    assert "index [2, 1]: got" in report
    assert "x is [3, 2]" in report


@given(data=st.data(), name=st.sampled_from(list(OPS)))
@quick
def test_op_cases_run(data: st.DataObject, name: str) -> None:
    args = data.draw(strategies.op_cases(OPS[name]))
    y, _ = OPS[name].forward(**args)
    assert np.isfinite(y).all()
    assert np.asarray(y).dtype == np.float64


@given(data=st.data())
@quick
def test_models_adapters_and_batches_fit_each_other(data: st.DataObject) -> None:
    model = data.draw(strategies.models())
    adapter = data.draw(strategies.adapters(model.config))
    ids, labels = data.draw(strategies.batches(model.config))
    assert all(w.any() for w in adapter.weights.values())
    loss, grads = mr.loss_and_grads(model, adapter, ids, labels)
    assert np.isfinite(loss)
    assert grads.keys() == adapter.weights.keys()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_labels_reach_all_and_none_ignored(share: float) -> None:
    """Some draws have every label ignored, some none, some a mixture."""

    def fits(labels: np.ndarray) -> bool:
        ignored = (labels == -100).mean()
        return bool(ignored == share) if share in (0.0, 1.0) else bool(0 < ignored < 1)

    find(strategies.labels((4, 5), 7), fits, settings=settings(derandomize=True, database=None))
