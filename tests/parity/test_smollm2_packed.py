"""SmolLM2-135M-Instruct kept in the 4-bit and 8-bit blocks of its GGUF file, against dequantised."""

import numpy as np
import pytest
from smollm2 import smollm2_directory

import mesp_ref as mr

pytestmark = pytest.mark.slow
TEXT = "The ferry leaves at 7:45, and the harbour (built in 1862) wakes slowly."


@pytest.fixture(scope="module")
def models() -> tuple[mr.Model, mr.Model]:
    """The model dequantised and packed."""
    return mr.load_model(smollm2_directory()), mr.load_model(smollm2_directory(packed=True))


def test_every_weight_and_every_logit_is_the_same(models: tuple[mr.Model, mr.Model]) -> None:
    dense, packed = models
    for name in dense.weights:
        assert np.array_equal(packed.weights[name][...], dense.weights[name][...]), name
    ids = [mr.load_tokenizer(packed.path or "").encode(TEXT).ids]
    assert np.array_equal(mr.logits(packed, ids), mr.logits(dense, ids))


@pytest.mark.parametrize("method", ["store_all", "mebp", "mesp", "mesp_tiled"])
def test_every_gradient_is_the_same(models: tuple[mr.Model, mr.Model], method: str) -> None:
    dense, packed = models
    ids = [mr.load_tokenizer(packed.path or "").encode(TEXT).ids]
    adapter = mr.init_lora(dense.config, rank=2, b_std=0.02)
    want_loss, want = mr.loss_and_grads(dense, adapter, ids, ids, method=method)
    got_loss, got = mr.loss_and_grads(packed, adapter, ids, ids, method=method)
    assert got_loss == want_loss
    assert all(np.array_equal(got[name], want[name]) for name in want)
