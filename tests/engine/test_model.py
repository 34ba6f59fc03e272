"""The whole model: every gradient of every method against complex step, and its own trace."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import mesp_ref as mr
from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.ops import Array
from mesp_ref.verify import oracles, strategies
from mesp_ref.verify.precision import precision_directions
from mesp_ref.verify.result import require
from mesp_ref.verify.samples import sample_adapter, sample_batch, sample_model, small_config
from mesp_ref.verify.whole_model import model_subject

EXACT = ("store_all", "mebp", "mesp", "mesp_tiled", "mesp_streamed")
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def case(tied: bool = True, **sizes: Any) -> tuple[mr.Model, mr.Adapter, Array, Array]:
    rng = np.random.default_rng(11)
    config = small_config(tied, **sizes)
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    return model, adapter, *sample_batch(rng, config)


@tied_or_not
@pytest.mark.parametrize("method", EXACT)
def test_every_tensor_by_complex_step(method: str, tied: bool) -> None:
    """Six entries of each tensor and a random direction of it, to 1e-13·max(mag).

    The subject overwrites a block's parameters as soon as its gradients are out, so a method that
    updates before dx is formed fails here.
    """
    subject, rng = model_subject(*case(tied), method=method), np.random.default_rng(0)
    assert len(subject.differentiable) == 2 * 12 + 2 * 7 * 2 + 2 + (not tied)
    require(oracles.complex_step(subject, rng, relative=1e-13, entries=6))
    require(oracles.adjoint(subject, rng, relative=1e-13))


@tied_or_not
def test_every_tensor_by_differences_and_symmetry(tied: bool) -> None:
    subject, rng = model_subject(*case(tied)), np.random.default_rng(1)
    require(oracles.richardson(subject, rng))
    require(oracles.hessian_symmetry(subject, rng))


@tied_or_not
def test_loss_and_every_tensor_at_fifty_digits(tied: bool) -> None:
    """The whole model written again from its equations, in mpmath."""
    tiny = {"hidden_size": 3, "intermediate_size": 2, "num_hidden_layers": 1, "vocab_size": 5}
    model, adapter, ids, _ = case(
        tied, num_key_value_heads=1, num_attention_heads=2, head_dim=2, **tiny
    )
    subject = model_subject(model, adapter, ids[:1, :3], np.array([[0, 1, 2]]))
    require(precision_directions(subject, np.random.default_rng(2)))


@given(data=st.data(), method=st.sampled_from(EXACT))
@examples(25)
def test_drawn_configurations(data: st.DataObject, method: str) -> None:
    """Sizes of 1, one key/value head, H = G, any targets, labels all or none ignored."""
    model = data.draw(strategies.models())
    adapter = data.draw(strategies.adapters(model.config))
    batch = data.draw(strategies.batches(model.config))
    subject = model_subject(model, adapter, *batch, method=method)
    require(oracles.adjoint(subject, data.draw(strategies.generators()), relative=1e-13))


@pytest.mark.parametrize("target", PROJECTIONS)
def test_each_projection_alone(target: str) -> None:
    model, _, ids, labels = case()
    adapter = sample_adapter(np.random.default_rng(3), model.config, targets=[target])
    subject = model_subject(model, adapter, ids, labels, trainable="lora")
    assert len(subject.differentiable) == 4
    require(oracles.adjoint(subject, np.random.default_rng(4), relative=1e-13))


def test_trace_is_complete_ordered_and_adds_up() -> None:
    """Forward names, then backward; the gradients are those of loss_and_grads, to the bit."""
    model, adapter, ids, labels = case()
    named = mr.trace(model, adapter, ids, labels)
    loss, grads = mr.loss_and_grads(model, adapter, ids, labels, "store_all", trainable="all")
    for name, grad in grads.items():
        np.testing.assert_array_equal(named[f"{name}.grad"], grad, err_msg=name)
    assert named["loss"] == pytest.approx(loss, rel=1e-14)
    np.testing.assert_array_equal(named["lm_head"], mr.logits(model, ids, adapter))
    order = list(named)
    forward = ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0",
               "model.layers.1.mlp.swiglu", "model.norm", "lm_head", "loss"]  # fmt: skip
    backward = ["lm_head.grad", "model.norm.grad", "model.layers.1.grad",
                "model.layers.1.self_attn.q_proj.grad", "model.layers.0.grad",
                "model.embed_tokens.grad"]  # fmt: skip
    places = [order.index(name) for name in forward + backward]
    assert places == sorted(places)


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.swiglu", "self_attn.attention.p"])
def test_trace_shows_every_layer(part: str) -> None:
    model, adapter, ids, labels = case()
    named = mr.trace(model, adapter, ids, labels)
    for layer in range(2):
        assert np.isfinite(named[f"model.layers.{layer}.{part}"]).all()


def test_loss_is_the_mean_over_counted_shifted_labels() -> None:
    """From the logits alone, written out: position t predicts label t+1."""
    model, adapter, ids, labels = case()
    z = mr.logits(model, ids, adapter)
    losses = [
        np.log(np.exp(z[n, t]).sum()) - z[n, t, labels[n, t + 1]]
        for n in range(len(ids)) for t in range(ids.shape[1] - 1) if labels[n, t + 1] != -100
    ]  # fmt: skip
    assert mr.loss(model, adapter, ids, labels) == pytest.approx(np.mean(losses), rel=1e-13)


def test_right_padding_changes_nothing() -> None:
    """Tokens behind the last counted label, whatever they are, leave loss and gradients alone."""
    model, adapter, ids, labels = case()
    loss, grads = mr.loss_and_grads(model, adapter, ids, labels)
    padded = np.concatenate([ids, np.full((2, 3), 6)], axis=1)
    ignored = np.concatenate([labels, np.full((2, 3), -100)], axis=1)
    again, same = mr.loss_and_grads(model, adapter, padded, ignored)
    assert again == pytest.approx(loss, rel=1e-13)
    for name, grad in grads.items():
        np.testing.assert_allclose(same[name], grad, rtol=0, atol=1e-14, err_msg=name)


def test_one_token_has_no_target() -> None:
    model, adapter, ids, labels = case()
    loss, grads = mr.loss_and_grads(model, adapter, ids[:, :1], labels[:, :1])
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([[11]], [[0]], "token id 11, expected 0 to 10"),
        ([[-1]], [[0]], "token id -1"),
        ([[0.5]], [[0]], "expected integers"),
        ([[0, 1], [2]], [[0, 1], [2]], "input_ids"),
        ([[]], [[]], "input_ids"),
        ([[0, 1]], [[0]], "labels: found shape"),
        ([[0, 1]], [[0, -99]], "token id -99"),
    ],
)
def test_bad_batches_are_one_line_errors(ids: Any, labels: Any, message: str) -> None:
    model, adapter, *_ = case()
    with pytest.raises(mr.MespRefError, match=message) as error:
        mr.loss_and_grads(model, adapter, ids, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "adam"}, "method: found 'adam'"),
        ({"trainable": "some"}, "trainable: found 'some'"),
        ({"eps": 0.0}, "eps: found 0.0"),
        ({"eps": float("nan")}, "eps: found nan"),
        ({"checkpoints": "tape"}, "checkpoints: found 'tape'"),
    ],
)
def test_bad_options_are_one_line_errors(options: dict[str, Any], message: str) -> None:
    model, adapter, ids, labels = case()
    with pytest.raises(mr.MespRefError, match=message):
        mr.loss_and_grads(model, adapter, ids, labels, **options)


def test_lora_training_needs_an_adapter_of_this_model() -> None:
    model, _, ids, labels = case()
    with pytest.raises(mr.MespRefError, match="adapter: found None"):
        mr.loss_and_grads(model, None, ids, labels)
    foreign = sample_adapter(np.random.default_rng(0), small_config(hidden_size=8))
    with pytest.raises(mr.MespRefError, match="belongs to another model"):
        mr.loss_and_grads(model, foreign, ids, labels)
