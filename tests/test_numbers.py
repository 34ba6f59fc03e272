"""Numbers at the edge of their type: the right result, or a stop that says so, never a silent NaN.

The truth is each op's equation at 50 digits (mesp_ref.registry), rounded once.
"""

from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref import lean as tiled
from mesp_ref import ops
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.registry import OPS
from mesp_ref.verify.samples import sample_adapter, sample_batch, sample_model, small_config

F32, F64 = np.finfo(np.float32), np.finfo(np.float64)
U = {"float32": 2.0**-24, "float64": 2.0**-53}


def exact(x: Any) -> Any:
    """An array as 50-digit numbers."""
    return np.vectorize(mpmath.mpf, otypes=[object])(np.asarray(x, np.float64))


def truth(equation: Any, *arguments: Any) -> np.ndarray:
    with mpmath.mp.workdps(50):
        found = equation(*(exact(a) if isinstance(a, np.ndarray) else a for a in arguments))
        return np.vectorize(float, otypes=[np.float64])(found)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float32", 1e30),
        ("float32", 1e38),
        ("float64", 1e200),
        ("float64", 1e300),
        ("float32", 1e-30),
    ],
)
def test_rmsnorm_of_rows_whose_squares_leave_the_range(dtype: str, size: float) -> None:
    """Beside ordinary rows; the gradient against numbers of 50 digits, (f(x+h) − f(x−h))/2h."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5))
    x[1] *= size
    x, w = x.astype(dtype), rng.standard_normal(5).astype(dtype)
    y, res = ops.rmsnorm(x, w, eps=1e-6)
    want = truth(OPS["rmsnorm"].equation, x, w, mpmath.mpf(1e-6))
    np.testing.assert_allclose(y, want, rtol=8 * U[dtype], atol=0)
    dy = rng.standard_normal((3, 5)).astype(dtype)
    dx = ops.rmsnorm_bwd(dy, res, w, eps=1e-6)
    with mpmath.mp.workdps(120):
        rows, weight, cotangent = exact(x), exact(w), exact(dy)

        def f(c: int, h: Any) -> Any:
            moved = rows[1:2].copy()
            moved[0, c] += h
            y = OPS["rmsnorm"].equation(moved, weight, mpmath.mpf(1e-6))
            return mpmath.fdot(cotangent[1], y[0])

        h = mpmath.mpf(max(size, 1e-3)) * mpmath.mpf(10) ** -30
        slope = [float((f(c, h) - f(c, -h)) / (2 * h)) for c in range(5)]
    # Two terms of size |dy·w|/n cancel; below the smallest normal number digits are lost.
    bound = 40 * U[dtype] * np.abs(slope).max() + np.finfo(dtype).tiny
    assert np.abs(dx[1] - slope).max() <= bound


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rmsnorm_of_zeros_and_subnormals(dtype: str) -> None:
    tiny = float(np.finfo(dtype).smallest_subnormal)
    x = np.array([[0, 0, 0], [tiny, -3 * tiny, 7 * tiny]], dtype)
    w = np.array([1, 2, 3], dtype)
    y, res = ops.rmsnorm(x, w, eps=1e-6)
    want = truth(OPS["rmsnorm"].equation, x, w, mpmath.mpf(1e-6))
    np.testing.assert_allclose(y, want, rtol=4 * U[dtype], atol=4 * tiny)
    dx = ops.rmsnorm_bwd(np.ones_like(x), res, w, eps=1e-6)
    np.testing.assert_allclose(dx, np.tile(w * 1e3, (2, 1)), rtol=4 * U[dtype])


SCORES = {
    "equal": [5.0] * 4, "huge": [3e38, 3e38, -3e38, 0.0], "far apart": [-700.0, 0.0, 700.0, 1400.0],
    "subnormal": [1e-45, 0.0, -1e-45, 3e-45], "hidden": [0.0, -1e4, -1e5, -1e30],
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_softmax_at_the_edges(name: str) -> None:
    s = np.tile(np.array(SCORES[name], np.float32), (4, 1))
    with np.errstate(over="ignore", under="ignore"):  # 3e38 below the maximum is −∞, and exp 0
        p, res = ops.causal_softmax(s)
        ds = ops.causal_softmax_bwd(np.array([[1, -2, 3, 0.5]] * 4, np.float32), res)
    assert np.isfinite(ds).all()
    want = truth(OPS["causal_softmax"].equation, s)
    np.testing.assert_allclose(p, want, rtol=8 * U["float32"], atol=float(F32.tiny))
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=8 * U["float32"])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_attention_plain_and_tiled_at_the_edges(size: float) -> None:
    """All-equal scores, scores that underflow, and scores of 1e30."""
    rng = np.random.default_rng(1)
    shape = (1, 4, 2, 6)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    q, k = q * np.float32(size), k * np.float32(size)
    want = truth(OPS["attention"].equation, q, k, v)
    do = rng.standard_normal(shape).astype(np.float32)
    results = []
    for module in (ops, tiled):
        o, res = module.attention(q, k, v)
        np.testing.assert_allclose(o, want, rtol=0, atol=16 * U["float32"] * np.abs(v).max())
        results.append(module.attention_bwd(do, res))
    # Saturated rows have a gradient of 0, as a difference of terms of size |do·v|·|k| or |q|.
    most = np.abs(do).max() * np.abs(v).max() * max(1.0, size) * 4
    for plain, other in zip(*results, strict=True):
        assert np.isfinite(plain).all()
        bound = 64 * U["float32"] * most
        np.testing.assert_allclose(other, plain, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swiglu_from_subnormal_to_huge(dtype: str) -> None:
    tiny, big = float(np.finfo(dtype).smallest_subnormal), float(np.finfo(dtype).max) / 4
    gate = np.array([-big, -1e4, -80.0, -tiny, 0.0, tiny, 1e-20, 40.0, 1e4, big], dtype)
    up = np.array([1.0, 2.0, 1e20, 3.0, 1e30, 1.0, 1e20, 1e-30, 1e-4, 1.0], dtype)
    with np.errstate(under="ignore"):
        z, res = ops.swiglu(gate, up)
        grads = ops.swiglu_bwd(np.ones_like(z), res)
    want = truth(OPS["swiglu"].equation, gate, up)
    np.testing.assert_allclose(z, want, rtol=8 * U[dtype], atol=float(np.finfo(dtype).tiny))
    assert all(np.isfinite(g).all() for g in grads)


LOGITS = {
    "equal": np.full((3, 7), 2.5), "one class": np.array([[4.0], [-1e30], [0.0]]),
    "certain": np.array([[1e4, 0.0, -1e4]] * 3), "certainly wrong": np.array([[0.0, 1e30, 0.0]] * 3),
    "huge and equal": np.full((3, 4), 2e37), "subnormal": np.full((3, 5), 1e-45),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("kind", ["plain", "tiled"])
def test_cross_entropy_at_the_edges(name: str, kind: str) -> None:
    """Loss and gradient; "certain" and "one class" have a loss of exactly 0."""
    z, labels = LOGITS[name].astype(np.float32), np.zeros(3, np.int64)
    with mpmath.mp.workdps(50):
        e = [
            [mpmath.exp(mpmath.mpf(float(v)) - mpmath.mpf(float(row.max()))) for v in row]
            for row in z
        ]
        p = np.array([[float(v / mpmath.fsum(row)) for v in row] for row in e])
        losses = [mpmath.log(mpmath.fsum(r)) + (float(x.max()) - mpmath.mpf(float(x[0])))
                  for r, x in zip(e, z, strict=True)]  # fmt: skip
        want = float(mpmath.fsum(losses) / 3)
    p[:, 0] -= 1
    with np.errstate(under="ignore"):
        if kind == "plain":
            loss, res = ops.cross_entropy(z, labels)
            dz = ops.cross_entropy_bwd(1.0, res)
        else:  # logits are x·Wᵀ with x the identity
            loss, head = ops.lm_loss(np.eye(3, dtype=np.float32), z.T.copy(), labels, width=2)
            dz = ops.lm_loss_bwd_params(1.0, head, z.T.copy(), width=2).T
    largest = float(np.abs(z).max())
    rounding = 8 * U["float32"]
    # The tiled loss is lse − z_label: what the largest logit rounds to is lost.
    assert abs(float(loss) - want) <= rounding * (abs(want) + (largest if kind == "tiled" else 1))
    if name in ("certain", "one class") and kind == "plain":
        assert float(loss) == 0.0
    assert np.isfinite(dz).all()
    if largest < 1e5:
        np.testing.assert_allclose(dz, p / 3, rtol=0, atol=rounding * max(1, 0.01 * largest))


@pytest.mark.parametrize("method", ["store_all", "mebp", "mesp", "mesp_tiled", "mesp_streamed"])
def test_a_batch_without_a_counted_label_is_loss_zero_and_gradient_zero(method: str) -> None:
    rng = np.random.default_rng(2)
    config = small_config()
    ids, labels = sample_batch(rng, config)
    labels[...] = ops.IGNORED
    loss, grads = mr.loss_and_grads(
        sample_model(rng, config), sample_adapter(rng, config), ids, labels, method=method
    )
    assert loss == 0
    assert grads
    assert not any(g.any() for g in grads.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_stop_what_they_reach(
    bad: float, name: str, tmp_path: Path
) -> None:
    """Loss and generation refuse; gradients show it in a loss that is not finite, and training in
    the stop that test_trainer.py checks. 3e38 is finite, and overflows on the way."""
    rng = np.random.default_rng(3)
    config = small_config(tied=False)
    model = sample_model(rng, config, "float32")
    model.weights[name][1, :] = bad
    save_checkpoint(config, model.weights, tmp_path)
    ids = np.ones((1, 4), np.int64)
    for loaded in (model, mr.load_model(tmp_path)):
        with np.errstate(all="ignore"):
            if bad == 3e38 and "embed" in name:  # RMSNorm brings it back
                assert np.isfinite(mr.loss(loaded, None, ids, ids))
                continue
            with pytest.raises(mr.MespRefError, match=r"loss: found .*, expected a finite number"):
                mr.loss(loaded, None, ids, ids)
            with pytest.raises(mr.MespRefError, match="generate: logits: found"):
                mr.generate(loaded, [[1, 1]], max_new_tokens=1)
            adapter = mr.init_lora(config, rank=1)
            for method in ("mesp", "mesp_tiled", "mesp_streamed"):
                assert not np.isfinite(
                    mr.loss_and_grads(loaded, adapter, ids, ids, method=method)[0]
                )
