"""Where ops usually break: extremes, structural zeros, absent labels, caches."""

import mpmath
import numpy as np
import pytest

from mesp_ref import lean, ops
from mesp_ref.ops._array import sigmoid
from mesp_ref.registry import OPS, Sizes
from mesp_ref.verify.oracles import complex_step
from mesp_ref.verify.result import require
from mesp_ref.verify.subject import op_subject

RNG = np.random.default_rng


def test_sigmoid_is_accurate_everywhere() -> None:
    """Relative error ≤ 4u from −745 to 745 against 50 digits; no overflow at complex ±800."""
    x = np.array([-745.0, -300.0, -40.0, -1e-9, 0.0, 1e-300, 0.5, 36.0, 745.0])
    with mpmath.mp.workdps(50):
        truth = np.array([float(1 / (1 + mpmath.exp(-mpmath.mpf(v)))) for v in x])
    np.testing.assert_allclose(sigmoid(x), truth, rtol=4 * 2.0**-53, atol=5e-324)
    assert np.isfinite(sigmoid(np.array([-800 + 1e-60j, 800 - 1e-60j]))).all()
    assert sigmoid(np.float32([[-200.0, 200.0]])).tolist() == [[0.0, 1.0]]


def test_causality_is_exact() -> None:
    """What a query may not see has probability and gradient exactly 0, and changing it nothing."""
    rng = RNG(0)
    args = OPS["attention"].sample(rng, Sizes(past=0), np.float64)
    o, res = ops.attention(**args)
    assert (res.p[..., ~np.tri(5, dtype=bool)] == 0).all()
    do = np.zeros_like(o)
    do[:, 1] = rng.standard_normal(do[:, 1].shape)
    _, dk, dv = ops.attention_bwd(do, res)
    assert (dk[:, 2:] == 0).all()
    assert (dv[:, 2:] == 0).all()
    args["k"][:, 3:] += 7
    args["v"][:, 3:] -= 9
    np.testing.assert_array_equal(ops.attention(**args)[0][:, :3], o[:, :3])


def test_attention_over_a_cache_is_the_tail_of_attention() -> None:
    """Tq < Tk: the last queries over all keys give the last rows of the full result."""
    args = OPS["attention"].sample(RNG(1), Sizes(past=0), np.float64)
    full, _ = ops.attention(**args)
    tail, _ = ops.attention(args["q"][:, 3:], args["k"], args["v"])
    np.testing.assert_allclose(tail, full[:, 3:], rtol=0, atol=4e-16 * np.abs(full).max() * 8)


def test_scores_far_beyond_exp_do_not_overflow() -> None:
    args = OPS["attention"].sample(RNG(2), Sizes(), np.float32)
    args["q"] *= np.float32(1e4)
    o, res = ops.attention(**args)
    assert np.isfinite(o).all()
    for grad in ops.attention_bwd(np.ones_like(o), res):
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", ["cross_entropy", "lm_loss"])
def test_no_counted_label_is_loss_zero_and_gradient_zero(name: str) -> None:
    spec = OPS[name]
    args = spec.sample(RNG(3), Sizes(), np.float64)
    args["labels"] = np.full_like(args["labels"], ops.IGNORED)
    loss, res = spec.forward(**args)
    assert loss == 0
    for grad in spec.gradients(np.float64(2.0), res, args).values():
        assert grad.any() == np.False_


@pytest.mark.parametrize("lead", [30.0, 700.0])
def test_confident_cross_entropy(lead: float) -> None:
    """p − 1 cancels: the error stays at rounding of 1, and the loss at rounding of its logits."""
    logits = RNG(4).standard_normal((3, 6))
    labels = np.array([2, ops.IGNORED, 5])
    logits[0, 2] += lead
    logits[2, 5] += lead
    require(
        complex_step(op_subject(OPS["cross_entropy"], {"logits": logits, "labels": labels}), RNG(5))
    )
    with mpmath.mp.workdps(400):
        rows = [[mpmath.exp(mpmath.mpf(v)) for v in logits[i]] for i in (0, 2)]
        truth = (
            sum(-mpmath.log(r[j] / mpmath.fsum(r)) for r, j in zip(rows, (2, 5), strict=True)) / 2
        )
    assert abs(ops.cross_entropy(logits, labels)[0] - float(truth)) <= 2.0**-52


def test_rmsnorm_of_one_channel_cancels_to_rounding() -> None:
    """With C = 1 and eps → 0 the output is ±w: dx is a difference that vanishes."""
    x = RNG(6).standard_normal((4, 3, 1))
    args = {"x": x, "w": np.array([1.7]), "eps": 1e-12}
    require(complex_step(op_subject(OPS["rmsnorm"], args), RNG(7)))


def test_rmsnorm_of_zero_is_zero() -> None:
    x, w = np.zeros((1, 2, 3)), np.arange(1.0, 4.0)
    y, res = ops.rmsnorm(x, w, eps=1e-6)
    assert (y == 0).all()
    np.testing.assert_allclose(ops.rmsnorm_bwd(np.ones_like(x), res, w, eps=1e-6)[0, 0], w * 1e3)


def test_rope_tables_at_far_positions() -> None:
    """Position 1,000,000 to 1e-10: the angle itself is rounded once in float64."""
    cos, sin = ops.rope_tables(1_000_000, 1_000_001, 8, 1e6, np.dtype(np.float64))
    with mpmath.mp.workdps(50):
        angle = [1_000_000 * mpmath.mpf(10) ** (-6 * mpmath.mpf(i) / 4) for i in range(4)]
        np.testing.assert_allclose(cos[0], [float(mpmath.cos(a)) for a in angle], atol=1e-9)
        np.testing.assert_allclose(sin[0], [float(mpmath.sin(a)) for a in angle], atol=1e-9)
    assert ops.rope_tables(0, 2, 8, 1e6, np.dtype(np.complex128))[0].dtype == np.float64


@pytest.mark.parametrize("size", [1, 255, 256, 257, 2049])
def test_lm_loss_in_tiles_is_linear_then_cross_entropy(size: int) -> None:
    """Below, at and beyond a tile of the vocabulary, value and both gradients."""
    rng = RNG(size)
    x, w = rng.standard_normal((1, 1030, 3)), rng.standard_normal((size, 3))
    assert lean.vocabulary_tile(1030) == 256
    labels = np.where(rng.random((1, 1030)) < 0.2, ops.IGNORED, rng.integers(0, size, (1, 1030)))
    loss, res = ops.lm_loss(x, w, labels)
    z, r_linear = ops.linear(x, w)
    expected, r_loss = ops.cross_entropy(ops.rows(z), labels.reshape(-1))
    np.testing.assert_allclose(loss, expected, rtol=1e-14, atol=1e-15)  # 0 where size is 1
    dz = ops.cross_entropy_bwd(0.3, r_loss).reshape(z.shape)
    dw, _ = ops.linear_bwd_params(dz, r_linear, w)
    np.testing.assert_allclose(ops.lm_loss_bwd(0.3, res, w), dz @ w, atol=1e-15)
    np.testing.assert_allclose(ops.lm_loss_bwd_params(0.3, res, w), dw, atol=1e-15)


def test_repeated_tokens_accumulate_and_absent_ones_are_zero() -> None:
    ids, w = np.array([[1, 1, 4]]), np.zeros((6, 2))
    dy = np.array([[[1.0, 2.0], [10.0, 20.0], [5.0, 6.0]]])
    dw = ops.embedding_bwd_params(dy, ops.embedding(ids, w)[1], w)
    np.testing.assert_array_equal(dw, [[0, 0], [11, 22], [0, 0], [0, 0], [5, 6], [0, 0]])
