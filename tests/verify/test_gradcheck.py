"""gradcheck on other people's functions: wrong ones are named, right ones are never rejected."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.verify import gradcheck

RNG = np.random.default_rng(8)
X, W = RNG.standard_normal((3, 5)), RNG.standard_normal((4, 5))


def product(x: Any, w: Any) -> Any:
    return x @ w.T


def product_bwd(dy: Any, x: Any, w: Any) -> Any:
    return dy @ w, dy.T @ x


def softmax(z: Any) -> Any:
    e = np.exp(z - z.real.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_bwd(dy: Any, z: Any) -> Any:
    p = softmax(z)
    return p * (dy - (dy * p).sum(axis=-1, keepdims=True))


def test_a_right_pair_passes_and_says_how() -> None:
    result = gradcheck(product, product_bwd, (X, W), names=("x", "w"))
    assert result.passed, result
    assert result.method == "complex step"
    report = str(result)
    assert "gradient of x by complex step: error" in report
    assert "proves the backward against the forward that was given" in report


def plus_one_in_ten_thousand(dy: Any, x: Any, w: Any) -> Any:
    dx, dw = product_bwd(dy, x, w)
    return dx * 1.0001, dw


def swapped(dy: Any, x: Any, w: Any) -> Any:
    return product_bwd(dy, x, w)[::-1]


def zeros(dy: Any, x: Any, w: Any) -> Any:
    return np.zeros_like(x), np.zeros_like(w)


def not_a_number(dy: Any, x: Any, w: Any) -> Any:
    dx, dw = product_bwd(dy, x, w)
    dx[1, 2] = np.nan
    return dx, dw


def one_entry(dy: Any, x: Any, w: Any) -> Any:
    dx, dw = product_bwd(dy, x, w)
    dw[3, 1] += 1e-8
    return dx, dw


def promoted(dy: Any, x: Any, w: Any) -> Any:
    dx, dw = product_bwd(dy, x, w)
    return dx.astype(np.float64), dw


def wrong_shape(dy: Any, x: Any, w: Any) -> Any:
    dx, dw = product_bwd(dy, x, w)
    return dx, dw.T


def one_missing(dy: Any, x: Any, w: Any) -> Any:
    return product_bwd(dy, x, w)[0]


def a_list_of_lists(dy: Any, x: Any, w: Any) -> Any:
    dx, dw = product_bwd(dy, x, w)
    return dx.tolist(), dw


def in_place(dy: Any, x: Any, w: Any) -> Any:
    result = product_bwd(dy, x.copy(), w)
    x += 1
    return result


def over_the_cotangent(dy: Any, x: Any, w: Any) -> Any:
    result = product_bwd(dy, x, w)
    dy *= 2
    return result


def raising(dy: Any, x: Any, w: Any) -> Any:
    raise RuntimeError("no gradient today")


def not_linear(dy: Any, x: Any, w: Any) -> Any:
    dx, dw = product_bwd(dy, x, w)
    return np.where(np.abs(dy).max() > 3.4, 0, 1) * dx, dw


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        (plus_one_in_ten_thousand, "gradient of x"),
        (swapped, r"gradient of x by complex step.*shape \[4, 5\], expected \[3, 5\]"),
        (zeros, "gradient of x"),
        (not_a_number, "NaN"),
        (one_entry, r"gradient of w by complex step.*at index \[3, 1\]: got"),
        (wrong_shape, r"gradient of w.*shape \[5, 4\], expected \[4, 5\]"),
        (one_missing, "1 gradients returned, expected one each for"),
        (a_list_of_lists, "found list, expected an array"),
        (in_place, "gradient of x by inputs unchanged"),
        (over_the_cotangent, "gradient of dy by inputs unchanged"),
        (raising, "no gradient today"),
    ],
)
def test_a_wrong_backward_is_named(backward: Callable[..., Any], message: str) -> None:
    result = gradcheck(product, backward, (X.copy(), W.copy()), names=("x", "w"))
    assert not result.passed
    assert result.failures
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(str(result).replace("\n", " "))


def test_a_promotion_in_float32_is_found() -> None:
    result = gradcheck(product, promoted, (X, W), names=("x", "w"), dtypes=("float32",))
    assert [f.oracle for f in result.failures] == ["float32 stays float32"]
    assert gradcheck(product, product_bwd, (X.astype(np.float32), W.astype(np.float32))).passed


def test_what_ones_hide_is_found() -> None:
    """Softmax's gradient of sum(y) is zero: with dy = 1 a zero backward would pass."""
    z = RNG.standard_normal((2, 6))
    np.testing.assert_allclose(softmax_bwd(np.ones_like(z), z), 0, atol=1e-16)
    assert gradcheck(softmax, softmax_bwd, (z,)).passed
    assert not gradcheck(softmax, lambda dy, z: np.zeros_like(z), (z,)).passed
    assert not gradcheck(softmax, lambda dy, z: softmax(z) * dy, (z,)).passed


def rms(x: Any) -> Any:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)


def rms_bwd(dy: Any, x: Any) -> Any:
    r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
    return dy * r - x * (dy * x).mean(axis=-1, keepdims=True) * r**3


def nll(z: Any) -> Any:
    shifted = z - z.real.max(axis=-1, keepdims=True)
    return (np.log(np.exp(shifted).sum(axis=-1)) - shifted[:, 0]).sum()


def nll_bwd(dy: Any, z: Any) -> Any:
    p = softmax(z)
    p[:, 0] -= 1
    return dy * p


HARD = RNG.standard_normal((3, 6))


@pytest.mark.parametrize(
    ("forward", "backward", "x"),
    [
        (softmax, softmax_bwd, 30 * HARD),
        (softmax, softmax_bwd, 300 * HARD),
        (rms, rms_bwd, HARD[:, :1]),
        (rms, rms_bwd, 1e-9 * HARD),
        (rms, rms_bwd, 1e9 * HARD),
        (nll, nll_bwd, HARD + 30 * np.eye(3, 6)[0]),
        (nll, nll_bwd, HARD - 30 * np.eye(3, 6)[0]),
        (nll, nll_bwd, HARD[:, :1]),
        (np.tanh, lambda dy, x: dy * (1 - np.tanh(x) ** 2), 20 * HARD),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_right_code_at_hard_inputs_is_never_rejected(
    forward: Callable[..., Any], backward: Callable[..., Any], x: np.ndarray
) -> None:
    for seed in range(20):
        result = gradcheck(forward, backward, (x,), seed=seed)
        assert result.passed, result


@pytest.mark.parametrize(
    ("forward", "slope", "why"),
    [
        (np.abs, np.sign, "drops what is imaginary"),
        (lambda x: x.real * x, lambda x: 2 * x, "blind in x"),
        (lambda x: np.where(x > 0.3, 2 * x, x), lambda x: 1 + (x > 0.3).astype(x.dtype), "richardson"),
        (lambda x: np.array([float(v) for v in x.ravel()], x.dtype).reshape(x.shape) ** 2,
         lambda x: 2 * x,
         "refuses complex128 with"),
    ],
    ids=["abs", "real", "where", "float"],
)  # fmt: skip
def test_functions_complex_step_cannot_see_through(
    forward: Callable[..., Any], slope: Callable[..., Any], why: str
) -> None:
    x = np.array([[0.7, -0.4, 1.3]])
    result = gradcheck(forward, lambda dy, x: dy * slope(x), (x,), names=("x",))
    assert result.passed, result
    if why != "richardson":
        assert result.method == "richardson"
        assert why in result.why
    assert not gradcheck(forward, lambda dy, x: dy * slope(x) * 1.0001, (x,)).passed


def test_several_outputs_and_arguments_without_gradient() -> None:
    def forward(x: Any, index: Any, w: Any, scale: float) -> Any:
        return x[index] * w, scale * x.sum(axis=0)

    def backward(dys: Any, x: Any, index: Any, w: Any, scale: float) -> Any:
        da, db = dys
        dx = np.zeros_like(x)
        np.add.at(dx, index, da * w)
        return dx + scale * db, (da * x[index]).sum(axis=0)

    args = X, np.array([2, 0, 2, 1]), RNG.standard_normal(5), 0.3
    result = gradcheck(forward, backward, args, names=("x", "index", "w", "scale"))
    assert result.passed, result
    with_nones = gradcheck(forward, lambda *a: (backward(*a)[0], None, backward(*a)[1], None), args)
    assert with_nones.passed, with_nones
    only_x = gradcheck(forward, lambda *a: backward(*a)[0], args, differentiable=[0])
    assert only_x.passed, only_x


def test_a_function_of_float32_only() -> None:
    def forward(x: Any) -> Any:
        assert x.dtype == np.float32
        return x * x * x

    x = X.astype(np.float32)
    result = gradcheck(forward, lambda dy, x: dy * 3 * x * x, (x,))
    assert result.passed, result
    assert "takes nothing else" in result.why
    assert not gradcheck(forward, lambda dy, x: dy * 2.9 * x * x, (x,)).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": (np.arange(3),)}, "expected at least one floating"),
        ({"args": (X,), "differentiable": [1]}, "expected at least one floating"),
        ({"args": (X,), "names": ("a", "b")}, "expected 1 different names"),
        ({"args": (X * np.nan,)}, "expected finite outputs"),
    ],
)
def test_misuse_is_a_one_line_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mr.MespRefError, match=message):
        gradcheck(np.tanh, lambda dy, x: dy, **options)
