"""Tiled ops and mesp_tiled beside the plain ones; the oracles of both are in test_ops."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref import lean as tiled
from mesp_ref import ops
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.lean.shards import shared_lm_loss
from mesp_ref.lean.workers import Workers
from mesp_ref.registry import OPS, Sizes

SIZES = Sizes(n=2, t=11, past=4, c=13, g=2, share=3, d=6, f=17, v=29, r=3)


@pytest.mark.parametrize("tile", [1, 3, 11, 64])
def test_attention_does_not_depend_on_its_tiles(tile: int) -> None:
    given = OPS["attention"].sample(np.random.default_rng(0), SIZES, np.float64)
    do = np.random.default_rng(1).standard_normal(given["q"].shape)
    (o, res), (expected, plain) = tiled.attention(**given, tile=tile), ops.attention(**given)
    np.testing.assert_allclose(o, expected, rtol=0, atol=1e-14)
    pairs = zip(tiled.attention_bwd(do, res, tile=tile), ops.attention_bwd(do, plain), strict=True)
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", [1, 7, 29, 64])
def test_head_does_not_depend_on_its_tiles(width: int) -> None:
    given = OPS["lm_loss"].sample(np.random.default_rng(0), SIZES, np.float64)
    w = given["w"]
    (loss, res), (expected, plain) = ops.lm_loss(**given, width=width), ops.lm_loss(**given)
    assert abs(loss - expected) <= 1e-14
    np.testing.assert_allclose(
        ops.lm_loss_bwd(0.7, res, w), ops.lm_loss_bwd(0.7, plain, w), rtol=0, atol=1e-14
    )
    dw = ops.lm_loss_bwd_params(0.7, res, w, width=width)
    np.testing.assert_allclose(dw, ops.lm_loss_bwd_params(0.7, plain, w), rtol=0, atol=1e-14)


def test_head_of_a_batch_without_labels_is_zero() -> None:
    x, w = np.ones((1, 3, 4)), np.ones((5, 4))
    loss, res = ops.lm_loss(x, w, np.full((1, 3), -100))
    assert loss == 0
    assert not res.dx.any()


def test_head_survives_huge_logits() -> None:
    """The running maximum is subtracted, whichever tile it stands in."""
    x, w = np.array([[1.0], [-1.0]]), np.linspace(-3000, 3000, 7)[:, None]
    loss, res = ops.lm_loss(x, w, np.array([6, 0]), width=2)
    assert loss == 0
    assert np.isfinite(res.dx).all()


def test_lm_loss_holds_four_arrays_like_its_input_and_a_tile() -> None:
    """Counted rows, labels' rows of W, mix and product; dx only once the rows are not needed."""
    rng, labels = np.random.default_rng(0), np.arange(1100)
    x, w = (rng.standard_normal((n, 512), np.float32) for n in (1100, 2000))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        ops.lm_loss(x, w, labels)
        most = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    tile = tiled.vocabulary_tile(len(x)) * len(x) * x.itemsize
    assert tile < x.nbytes
    assert most <= 4 * x.nbytes + tile + 100_000


@pytest.mark.parametrize("width", [1, 5, 64])
def test_mlp_with_gate_and_up_kept(width: int) -> None:
    """The same bits as when they are rebuilt; what is kept is gate and up, tile by tile."""
    given = OPS["tiled_mlp"].sample(np.random.default_rng(0), SIZES, np.float64) | {"width": width}
    x, s = given["x"], given["s"]
    y, rebuilt = tiled.mlp(**given)
    same, res = tiled.mlp(**given, keep=np.copy)
    np.testing.assert_array_equal(same, y)
    for at, letter in enumerate("gu"):
        w, A, B = (given[f"{name}{letter}"] for name in ("w", "A", "B"))
        whole, _ = ops.lora_linear(ops.rows(x), w, None, A, B, s=s)
        kept = np.concatenate([tile[at] for tile in res.kept], axis=1)
        np.testing.assert_allclose(kept, whole, rtol=0, atol=1e-14)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    weights = {name: given[name] for name in given if name != "x"}
    for backward in (tiled.mlp_bwd, tiled.mlp_bwd_params):
        for got, wanted in zip(
            backward(dy, res, **weights), backward(dy, rebuilt, **weights), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


def _attention_peak(first: np.ndarray | None) -> int:
    """tracemalloc's peak of 1,024 queries of two heads a group, forward and backward."""
    q, k = np.zeros((1, 1024, 4, 8), np.float32), np.zeros((1, 1024, 2, 8), np.float32)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        o, res = tiled.attention(q, k, k, first=first)
        tiled.attention_bwd(o, res, first=first)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_attention_holds_no_square_array() -> None:
    assert _attention_peak(None) < 1024 * 1024 * 4  # one head's scores alone


def test_scores_of_a_window_are_as_wide_as_the_window() -> None:
    """64 queries at once, two heads stacked: two arrays of 128 rows of 100 keys in place of 1,024."""
    window = np.maximum(np.arange(1024) - 36, 0)[None]
    saved = _attention_peak(None) - _attention_peak(window)
    assert abs(saved - 2 * 128 * (1024 - 100) * 4) < 64 * 1024


@pytest.mark.parametrize("checkpoints", ["ram", "disk", "offload"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", ["all", ("q_proj", "down_proj"), ("gate_proj",)])
def test_mesp_tiled_agrees_with_mesp(tied: bool, targets: Any, checkpoints: str) -> None:
    """Every gradient of LoRA and base weights, in float64 to 1e-12 of its largest entry."""
    config = Qwen2Config(53, 24, 40, 3, 6, 2, 4, tie_word_embeddings=tied)
    model = mr.random_model(config, dtype="float64", std=0.2)
    adapter = mr.init_lora(config, rank=3, b_std=0.2, dtype="float64", targets=targets)
    ids = np.random.default_rng(0).integers(0, 53, (2, 11))
    labels = np.where(np.arange(11) < 4, -100, ids)
    given = model, adapter, ids, labels
    loss, grads = mr.loss_and_grads(*given, method="mesp", trainable="all")
    again, found = mr.loss_and_grads(
        *given, method="mesp_tiled", trainable="all", checkpoints=checkpoints
    )
    assert abs(again - loss) <= 1e-14 * loss
    assert found.keys() == grads.keys()
    for name, expected in grads.items():
        limit = 1e-12 * np.abs(expected).max()  # measured: 2e-14
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=limit, err_msg=name)


def test_tiles_cover_evenly() -> None:
    for length in range(1, 40):
        for width in range(1, 45):
            bounds = list(tiled.tiles(length, width))
            assert [a for a, _ in bounds[1:]] == [b for _, b in bounds[:-1]]
            assert (bounds[0][0], bounds[-1][1]) == (0, length)
            assert max(b - a for a, b in bounds) == tiled.widest(length, width) <= width


@pytest.mark.parametrize("parts", [2, 3, 40])
@pytest.mark.parametrize("drop", [ops.NOTHING, frozenset({"dx"})])
def test_parts_of_the_vocabulary_change_only_the_order_of_sums(
    parts: int, drop: frozenset[str]
) -> None:
    """Also where a part has no label, or logits far above another's."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((2, 9, 5)), rng.standard_normal((31, 5))
    w[20:] *= 40
    labels = rng.integers(0, 12, (2, 9))
    labels[0, :4] = -100
    whole, res = ops.lm_loss(x, w, labels, width=4, drop=drop)
    value, found = shared_lm_loss(Workers(parts), x, w, labels, drop=drop)
    assert value == pytest.approx(whole, rel=1e-14)
    np.testing.assert_allclose(found.lse, res.lse, rtol=1e-14)
    if drop:
        assert found.dx is res.dx is None
    else:
        np.testing.assert_allclose(found.dx, res.dx, rtol=1e-12, atol=1e-14)
