"""gradcheck of torch, JAX and MLX functions; each part runs where its framework is installed."""

from typing import Any

import numpy as np
import pytest

X = np.random.default_rng(0).standard_normal((3, 4))
W = np.random.default_rng(1).standard_normal(4)

pytestmark = pytest.mark.filterwarnings("default")  # those of the frameworks are not ours


def rejected(result: Any, argument: str) -> None:
    """The report names the argument, an index, what came and what was expected."""
    assert not result.passed
    text = str(result)
    for part in (f"gradient of {argument}", "at index [", "got", "expected", "is [3, 4]"):
        assert part in text, text


def torch_function(factor: float) -> Any:
    torch = pytest.importorskip("torch")

    class Scaled(torch.autograd.Function):  # type: ignore[misc, name-defined]
        """y = w·tanh(x), whose backward in x is off by a factor."""

        @staticmethod
        def forward(ctx: Any, x: Any, w: Any) -> Any:
            ctx.save_for_backward(x, w)
            return w * torch.tanh(x)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            x, w = ctx.saved_tensors
            t = torch.tanh(x)
            return factor * dy * w * (1 - t * t), (dy * t).sum(0)

    return Scaled.apply


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_torch_function(dtype: Any) -> None:
    from mesp_ref.verify.adapters.torch import gradcheck_function

    args = X.astype(dtype), W.astype(dtype)
    right = gradcheck_function(torch_function(1.0), args, names=("x", "w"))
    assert right.passed, right
    rejected(gradcheck_function(torch_function(1.001), args, names=("x", "w")), "x")


def test_torch_argmax_bfloat16_and_dictionaries() -> None:
    """The powers of gradcheck reach through: outputs without gradient, 16 bits, containers."""
    torch = pytest.importorskip("torch")
    import ml_dtypes

    from mesp_ref.verify.adapters.torch import gradcheck_function

    top = gradcheck_function(lambda x: tuple(torch.max(x, dim=-1)), (X,))
    assert top.passed, top
    low = gradcheck_function(
        torch_function(1.0), (X.astype(ml_dtypes.bfloat16), W.astype(ml_dtypes.bfloat16))
    )
    assert low.passed, low
    nested = gradcheck_function(lambda p, x: {"y": p["w"] * torch.tanh(x)}, ({"w": W}, X))
    assert nested.passed, nested


def test_torch_losses_and_arrays_of_one_number() -> None:
    """A loss is a scalar tensor, and a reversed view of one number has a negative stride."""
    torch = pytest.importorskip("torch")

    from mesp_ref.verify.adapters.torch import gradcheck_function

    labels = np.array([1, -100, 2])
    entropy = torch.nn.functional.cross_entropy
    loss = gradcheck_function(entropy, (X, labels), differentiable=(0,))
    assert loss.passed, loss
    one = gradcheck_function(torch_function(1.0), (X[:1, :1], W[:1]))
    assert one.passed, one


def jax_function(factor: float) -> Any:
    jax = pytest.importorskip("jax")
    np_ = jax.numpy

    @jax.custom_vjp
    def scaled(x: Any, w: Any) -> Any:
        return w * np_.tanh(x)

    def forward(x: Any, w: Any) -> Any:
        return scaled(x, w), (x, w)

    def backward(saved: Any, dy: Any) -> Any:
        x, w = saved
        t = np_.tanh(x)
        return factor * dy * w * (1 - t * t), (dy * t).sum(0)

    scaled.defvjp(forward, backward)
    return scaled


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_jax_custom_vjp(dtype: Any) -> None:
    from mesp_ref.verify.adapters.jax import gradcheck_custom_vjp

    args = X.astype(dtype), W.astype(dtype)
    right = gradcheck_custom_vjp(jax_function(1.0), args, names=("x", "w"))
    assert right.passed, right
    rejected(gradcheck_custom_vjp(jax_function(1.001), args, names=("x", "w")), "x")


def test_jax_scalars_bfloat16_and_dictionaries() -> None:
    jax = pytest.importorskip("jax")
    import ml_dtypes

    from mesp_ref.verify.adapters.jax import gradcheck_custom_vjp

    powers(gradcheck_custom_vjp, jax_function(1.0), jax.numpy, ml_dtypes.bfloat16)


def powers(check: Any, function: Any, library: Any, bfloat16: Any) -> None:
    """What reaches through every adapter: 16 bits, containers, outputs without a gradient, scalars."""
    low = check(function, (X.astype(bfloat16), W.astype(bfloat16)))
    nested = check(lambda p: {"y": function(p["x"], p["w"][0])}, ({"x": X, "w": [W]},))
    top = check(lambda x: (x.max(-1), x.argmax(-1)), (X,))
    total = check(lambda x: library.tanh(x).sum(), (X,))
    for result in (low, nested, top, total):
        assert result.passed, result


def mlx_function(factor: float) -> Any:
    mx = pytest.importorskip("mlx.core")

    @mx.custom_function
    def scaled(x: Any, w: Any) -> Any:
        return w * mx.tanh(x)

    @scaled.vjp
    def backward(primals: Any, dy: Any, output: Any) -> Any:
        x, w = primals
        t = mx.tanh(x)
        return factor * dy * w * (1 - t * t), (dy * t).sum(0)

    return scaled


def test_mlx_custom_function() -> None:
    from mesp_ref.verify.adapters.mlx import gradcheck_custom

    args = X.astype(np.float32), W.astype(np.float32)
    right = gradcheck_custom(mlx_function(1.0), args, names=("x", "w"))
    assert right.passed, right
    rejected(gradcheck_custom(mlx_function(1.01), args, names=("x", "w")), "x")


def test_mlx_float64_scalars_bfloat16_and_dictionaries() -> None:
    mx = pytest.importorskip("mlx.core")
    import ml_dtypes

    from mesp_ref.verify.adapters.mlx import gradcheck_custom

    powers(gradcheck_custom, mlx_function(1.0), mx, ml_dtypes.bfloat16)
