"""Rows of several documents: none sees another, and gradients are those of the documents apart."""

from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.verify.samples import sample_adapter, sample_model, small_config

LENGTHS = (5, 1, 9, 3, 70, 2, 17, 4)  # one of a single token, one longer than a tile of queries


def case(dtype: str) -> tuple[Any, ...]:
    """A model, an adapter, and documents with their labels, some of them ignored."""
    rng = np.random.default_rng(2)
    config = small_config()
    model = sample_model(rng, config, dtype)
    documents = [rng.integers(0, config.vocab_size, n) for n in LENGTHS]
    labels = [np.where(rng.random(len(d)) < 0.2, -100, d) for d in documents]
    return model, sample_adapter(rng, config, dtype), documents, labels


def apart(model: Any, adapter: Any, documents: Any, labels: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the documents one by one, weighted by the labels that count."""
    counts = [int((label[1:] != -100).sum()) for label in labels]
    loss, total = 0.0, dict[str, Any]()
    for ids, label, count in zip(documents, labels, counts, strict=True):
        if count:
            value, grads = mr.loss_and_grads(
                model, adapter, ids, label, method="store_all", trainable="all"
            )
            loss += value * count / sum(counts)
            for name, grad in grads.items():
                total[name] = total.get(name, 0) + grad * count / sum(counts)
    return loss, total


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("method", ["store_all", "mebp", "mesp", "mesp_tiled", "mesp_streamed"])
def test_a_packed_row_is_its_documents_apart(method: str, workers: int) -> None:
    """In float64 to 1e-12 of the largest entry: another order of sums over some hundred terms."""
    model, adapter, documents, labels = case("float64")
    loss, want = apart(model, adapter, documents, labels)
    positions = np.concatenate([np.arange(n) for n in LENGTHS])
    found, grads = mr.loss_and_grads(
        model, adapter, np.concatenate(documents), np.concatenate(labels), method=method,
        trainable="all", position_ids=positions, workers=workers,
    )  # fmt: skip
    assert found == pytest.approx(loss, rel=1e-13)
    assert grads.keys() == want.keys()
    for name, grad in want.items():
        largest = np.abs(grad).max()
        np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-12 * largest, err_msg=name)


def test_without_positions_documents_see_each_other() -> None:
    """The check can fail: the same row without position_ids has another loss."""
    model, adapter, documents, labels = case("float64")
    row = np.concatenate(documents), np.concatenate(labels)
    assert abs(mr.loss(model, adapter, *row) - apart(model, adapter, documents, labels)[0]) > 1e-3


def test_mezo_sees_documents_apart() -> None:
    model, adapter, documents, labels = case("float64")
    positions = np.concatenate([np.arange(n) for n in LENGTHS])
    row = np.concatenate(documents), np.concatenate(labels)
    loss = mr.loss(model, adapter, *row, position_ids=positions)
    assert loss == pytest.approx(apart(model, adapter, documents, labels)[0], rel=1e-13)
    value, _ = mr.loss_and_grads(
        model, adapter, *row, method="mezo", eps=1e-6, position_ids=positions
    )
    assert value == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("positions", "words"),
    [([[0, 1, 2]], "shape"), ([0, 1, 3, 4], "count up"), ([1, 2, 3, 4], "count up"),
     ([0.0, 1.0, 2.0, 3.0], "integers")],
)  # fmt: skip
def test_positions_that_are_none(positions: Any, words: str) -> None:
    model, adapter, _, _ = case("float32")
    with pytest.raises(mr.MespRefError, match=words):
        mr.loss_and_grads(model, adapter, [1, 2, 3, 4], [1, 2, 3, 4], position_ids=positions)
