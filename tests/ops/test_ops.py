"""Every op of the registry against oracles that know nothing of its backward."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from mesp_ref.registry import OPS, Args, OpSpec, Sizes
from mesp_ref.verify import oracles, strategies
from mesp_ref.verify.precision import precision
from mesp_ref.verify.result import require
from mesp_ref.verify.subject import op_subject

every_op = pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
quick = examples(30)
# 50-digit arithmetic is slow: the smallest sizes at which no two axes of an op coincide
TINY = Sizes(n=1, t=3, past=1, c=4, g=2, share=2, d=2, f=5, v=6, r=2)


def sample(
    spec: OpSpec, dtype: Any = np.float64, sizes: Sizes | None = None, seed: int = 0
) -> Args:
    return spec.sample(np.random.default_rng(seed), sizes or Sizes(), dtype)


def cotangent(spec: OpSpec, args: Args, seed: int = 1) -> np.ndarray:
    y = np.asarray(spec.forward(**args)[0])
    return np.asarray(np.random.default_rng(seed).standard_normal(y.shape)).astype(y.dtype)


@every_op
@given(data=st.data(), rng=strategies.generators())
@quick
def test_backward_is_the_complex_step_derivative(
    spec: OpSpec, data: st.DataObject, rng: np.random.Generator
) -> None:
    """Every entry of every gradient to 1e-14·max(mag), at drawn shapes and scales."""
    require(oracles.complex_step(op_subject(spec, data.draw(strategies.op_cases(spec))), rng))


@every_op
@given(data=st.data(), rng=strategies.generators())
@quick
def test_backward_is_the_limit_of_differences(
    spec: OpSpec, data: st.DataObject, rng: np.random.Generator
) -> None:
    """Random directions to 1e-9, through real values of the forward only."""
    require(oracles.richardson(op_subject(spec, data.draw(strategies.op_cases(spec))), rng))


@every_op
def test_adjoint_and_symmetric_hessian(spec: OpSpec) -> None:
    subject, rng = op_subject(spec, sample(spec)), np.random.default_rng(2)
    require(oracles.adjoint(subject, rng) + oracles.hessian_symmetry(subject, rng))


@every_op
def test_value_and_gradients_at_fifty_digits(spec: OpSpec) -> None:
    """Within 4 ulp of max(mag) of the truth, which 80 digits confirm."""
    subject = op_subject(spec, sample(spec, sizes=TINY))
    require(precision(subject, np.random.default_rng(3), ulps=4, digits=(50, 80)))


@every_op
@given(data=st.data(), rng=strategies.generators())
@quick
def test_float32_within_its_rounding_bound(
    spec: OpSpec, data: st.DataObject, rng: np.random.Generator
) -> None:
    """|got − truth| ≤ (u + 4·√k·u)·mag entry by entry, truth in float64 from the same numbers."""
    sizes = data.draw(strategies.sizes())
    subject = op_subject(spec, sample(spec, np.float32, sizes, int(rng.integers(2**31))))
    require(oracles.float32(subject, rng, spec.reduction_length(sizes)))


@every_op
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_dtype_out_is_dtype_in(spec: OpSpec, dtype: Any) -> None:
    args = sample(spec, np.float64)
    args |= {name: args[name].astype(dtype) for name in spec.differentiable}
    if dtype is np.float32:
        args |= {
            name: args[name].astype(dtype) for name in spec.constants if name in ("cos", "sin")
        }
    y, res = spec.forward(**args)
    assert y.dtype == dtype
    for name, grad in spec.gradients(cotangent(spec, args), res, args).items():
        assert grad.dtype == dtype, name
        assert grad.shape == args[name].shape, name


@every_op
def test_inputs_are_never_changed(spec: OpSpec) -> None:
    """Also: read-only and non-contiguous inputs are accepted and change nothing, to the bit."""
    args = sample(spec)
    expected = spec.vjp(cotangent(spec, args), args)
    frozen = dict(args)
    for name, value in args.items():
        if isinstance(value, np.ndarray):
            frozen[name] = np.repeat(value, 2, axis=-1)[..., ::2]
            frozen[name].flags.writeable = False
    dy = cotangent(spec, args)
    dy.flags.writeable = False
    for name, grad in spec.vjp(dy, frozen).items():
        np.testing.assert_allclose(grad, expected[name], rtol=1e-13, atol=1e-13, err_msg=name)
    for name, value in frozen.items():
        np.testing.assert_array_equal(value, args[name], err_msg=name)


@pytest.mark.parametrize(
    ("name", "field"), [(row.name, field) for row in OPS.values() for field in row.droppable]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dropped_residual_is_rebuilt_bit_for_bit(name: str, field: str, dtype: Any) -> None:
    spec = OPS[name]
    args = sample(spec, dtype)
    dy = cotangent(spec, args)
    y, kept = spec.forward(**args)
    y_dropped, dropped = spec.forward(**args, drop=frozenset({field}))
    assert getattr(kept, field) is not None
    assert getattr(dropped, field) is None
    np.testing.assert_array_equal(y_dropped, y)
    again = spec.gradients(dy, dropped, args)
    for key, grad in spec.gradients(dy, kept, args).items():
        np.testing.assert_array_equal(again[key], grad, err_msg=key)
