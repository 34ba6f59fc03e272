"""The oracles themselves: what they report, what they reject, and that each can fail."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mesp_ref.registry import OPS
from mesp_ref.verify import oracles
from mesp_ref.verify.oracles import complex_step
from mesp_ref.verify.planted import original, planted
from mesp_ref.verify.precision import jacobian, precision, true_gradients
from mesp_ref.verify.result import Finding, failures, require
from mesp_ref.verify.samples import sample_adapter, sample_batch, sample_model, small_config
from mesp_ref.verify.subject import Subject, op_subject
from mesp_ref.verify.suite import TINY

ALL: list[Callable[..., list[Finding]]] = [
    oracles.complex_step, oracles.adjoint, oracles.richardson, precision,
]  # fmt: skip


def subject(name: str = "rmsnorm") -> Subject:
    return op_subject(OPS[name], OPS[name].sample(np.random.default_rng(0), TINY, np.float64))


def with_gradients(change: Callable[[dict[str, Any]], object], name: str = "rmsnorm") -> Subject:
    """A subject whose backward is right and then changed."""
    right = subject(name)

    def backward(dys: Any, args: Any) -> dict[str, Any]:
        grads = right.backward(dys, args)
        change(grads)
        return grads

    return replace(right, backward=backward)


@pytest.mark.parametrize("oracle", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("factor", [1.0001, 0.0, -1.0, np.nan, np.inf])
def test_every_oracle_rejects_a_scaled_gradient(
    oracle: Callable[..., list[Finding]], factor: float
) -> None:
    def scale(grads: dict[str, Any]) -> None:
        with np.errstate(invalid="ignore"):
            grads["x"] = grads["x"] * factor

    findings = oracle(with_gradients(scale), np.random.default_rng(1))
    assert {f.argument for f in failures(findings)} == {"x"}


@pytest.mark.parametrize("oracle", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "change",
    [lambda g: g["x"].reshape(-1), lambda g: g["x"].astype(np.float32), lambda g: g["x"].tolist()],
    ids=["shape", "dtype", "type"],
)
def test_every_oracle_rejects_wrong_shape_dtype_and_type(
    oracle: Callable[..., list[Finding]], change: Callable[[dict[str, Any]], Any]
) -> None:
    wrong = with_gradients(lambda grads: grads.update(x=change(grads)))
    findings = oracle(wrong, np.random.default_rng(2))
    assert any(f.argument == "x" and "found" in f.meaning for f in failures(findings))


def test_a_structural_zero_must_be_exact() -> None:
    """1e-300 where attention has no path is wrong, however far below rounding."""

    def leak(grads: dict[str, Any]) -> None:
        grads["w"][-1] += 1e-300

    right = subject("embedding")
    right.args["ids"][:] = 0
    wrong = replace(right, backward=with_gradients(leak, "embedding").backward)
    (finding,) = failures(complex_step(wrong, np.random.default_rng(3)))
    assert finding.error == np.inf
    assert finding.index[0] == len(right.args["w"]) - 1


def test_hessian_symmetry_rejects_what_is_no_gradient_and_only_that() -> None:
    def scaled(grads: dict[str, Any]) -> None:
        grads["x"] = grads["x"] * 2
        grads["w"] = grads["w"] * 2

    def one(grads: dict[str, Any]) -> None:
        grads["x"] = grads["x"] * 2

    rng = np.random.default_rng(4)
    require(oracles.hessian_symmetry(with_gradients(scaled), rng))  # twice a gradient is one
    assert failures(oracles.hessian_symmetry(with_gradients(one), rng))


def test_a_finding_names_argument_index_values_and_meaning() -> None:
    def spoil(grads: dict[str, Any]) -> None:
        grads["x"][0, 2, 1] += 1.0

    (finding,) = failures(complex_step(with_gradients(spoil), np.random.default_rng(5)))
    text = str(finding)
    assert finding.index == (0, 2, 1)
    assert finding.got == pytest.approx(finding.expected + 1)
    for part in ("FAIL rmsnorm", "gradient of x", "complex_step", "error 1", "gate", "[0, 2, 1]",
                 "got", "expected", "exact to rounding"):  # fmt: skip
        assert part in text
    with pytest.raises(AssertionError, match=r"index \[0, 2, 1\]"):
        require([finding])
    good = complex_step(subject(), np.random.default_rng(6))
    assert all(f.margin > 10 for f in good)
    assert "margin" in str(good[0])


def test_nothing_checked_is_not_passed() -> None:
    with pytest.raises(AssertionError, match="nothing was checked"):
        require([])


def test_only_arbitrary_precision_sees_a_wrong_forward() -> None:
    """eps outside the root, in forward and backward alike: its own derivative is right."""
    inverse = original("ops.rmsnorm:_inverse_rms")

    def outside(x: Any, eps: float) -> Any:
        return 1 / (1 / inverse(x, 0.0) + eps)

    def bwd(dy: Any, res: Any, w: Any, *, eps: float) -> Any:
        x, r = res.x, outside(res.x, eps)
        n = 1 / inverse(x, 0.0)
        u = dy * w
        return u * r - x * (u * x).mean(axis=-1, keepdims=True) * r**2 / n

    changes = {"ops.rmsnorm:_inverse_rms": outside, "ops.rmsnorm:rmsnorm_bwd": bwd}
    with planted(changes):
        require(complex_step(subject(), np.random.default_rng(7)))
        wrong = failures(precision(subject(), np.random.default_rng(7)))
    assert "(the value)" in {f.argument for f in wrong}
    require(precision(subject(), np.random.default_rng(7)))  # and everything is back in its place


def test_fifty_and_eighty_digits_agree_and_a_linear_jacobian_is_exact() -> None:
    swiglu = subject("swiglu")
    true_gradients(swiglu, swiglu.cotangents(np.random.default_rng(8))[0], digits=(50, 80))
    args = {"x": np.array([[1.5, -2.0]]), "w": np.array([[3.0, 0.25]])}
    J = jacobian(OPS["linear"].equation, args, "x", 50).astype(np.float64)
    np.testing.assert_array_equal(J.reshape(2), args["w"][0])


def test_richardson_estimates_its_own_error() -> None:
    """The true derivative lies within ten estimates, at scales from 1e-6 to 30."""
    rng = np.random.default_rng(9)
    for scale in (1e-6, 1.0, 30.0):
        s = subject("swiglu").at(gate=subject("swiglu").args["gate"] * scale)
        dys, v = s.cotangents(rng), rng.standard_normal(s.args["gate"].shape)
        value, estimate = oracles.directional(s, dys, "gate", v)
        truth = (s.backward(dys, s.args)["gate"] * v).sum()
        assert abs(value - truth) <= 10 * estimate
        assert estimate <= 1e-9 * np.abs(s.backward(dys, s.args)["gate"]).sum() + 1e-12


def test_planting_reaches_every_reference_and_leaves_none() -> None:
    """Rows, modules that imported by name, tables of methods, properties of classes."""
    from mesp_ref.api import METHODS
    from mesp_ref.engine.adapter import Adapter
    from mesp_ref.engine.block import PLAIN

    def fake(*args: Any, **options: Any) -> None: ...

    scale, calls = Adapter.scale, (OPS["rmsnorm"].backward, METHODS["mesp"], PLAIN.mlp)
    changes = {
        "ops.rmsnorm:rmsnorm_bwd": fake, "engine.methods:mesp": fake,
        "engine.mlp_half:mlp_half": fake, "engine.adapter:Adapter.scale": property(fake),
    }  # fmt: skip
    with contextlib.suppress(ZeroDivisionError), planted(changes):
        assert [call() for call in calls] == [None, None, None]
        assert sample_adapter(np.random.default_rng(0), small_config()).scale is None
        raise ZeroDivisionError
    assert Adapter.scale is scale
    for call in calls:
        with pytest.raises(TypeError, match="missing"):
            call()


@pytest.mark.parametrize("oracle", ["adjoint", "complex_step", "richardson"])
def test_oracles_are_usable_by_name_over_the_registry(oracle: str) -> None:
    for name in OPS:
        findings = getattr(oracles, oracle)(subject(name), np.random.default_rng(10))
        assert {f.argument for f in findings} == set(subject(name).differentiable)


def test_checkpoint_gradcheck_proves_and_rejects() -> None:
    from mesp_ref.verify import checkpoint_gradcheck

    rng = np.random.default_rng(11)
    config = small_config()
    model, adapter = sample_model(rng, config, "float32"), sample_adapter(rng, config, "float32")
    batch = sample_batch(rng, config)
    findings = list(checkpoint_gradcheck(model, adapter, *batch, tensors=5, entries=2))
    require(findings)
    assert len(findings) == 2 + 5 * (1 + 2)
    real = original("engine.mlp_half:mlp_half_bwd")

    def forgetful(dy: Any, n: Any, res: Any, layer: Any, **options: Any) -> Any:
        res.z = real.__globals__["ops"].swiglu(res.gate, res.up)[0] * 1.001
        return real(dy, n, res, layer, **options)

    with planted({"engine.mlp_half:mlp_half_bwd": forgetful}):
        assert failures(list(checkpoint_gradcheck(model, adapter, *batch, directions=1, tensors=0)))


def test_packed_rows_are_held_to_their_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proven with their positions; a backward without them lets documents see each other."""
    from mesp_ref.verify import checkpoint_gradcheck, whole_model

    rng, config = np.random.default_rng(12), small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    ids = rng.integers(0, config.vocab_size, (2, 9))
    places = np.array([[*range(4), *range(5)], [*range(2), *range(4), *range(3)]])
    labels = np.where(np.arange(9) < [[9], [6]], ids, -100)  # the last document is padding
    options: dict[str, Any] = {"directions": 1, "tensors": 1, "position_ids": places}
    for method in ("mesp", "mesp_tiled"):
        found = list(checkpoint_gradcheck(model, adapter, ids, labels, method=method, **options))
        assert len(found) == 3
        require(found)
    real = whole_model.loss_and_grads

    def leaking(*args: Any, position_ids: Any, **more: Any) -> Any:
        return real(*args, **more)

    monkeypatch.setattr(whole_model, "loss_and_grads", leaking)
    assert failures(list(checkpoint_gradcheck(model, adapter, ids, labels, **options)))
