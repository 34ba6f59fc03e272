"""Every family against transformers and peft in float64: logits, loss and every gradient."""

from pathlib import Path

import family_oracle
import numpy as np
import pytest
import torch_oracle
from family_oracle import CONFIGS
from torch_oracle import TOLERANCE, Arrays, Batch, assert_all_close, assert_close

import mesp_ref as mr

EXACT = ("store_all", "mebp", "mesp")


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One configuration, in a directory that transformers wrote."""
    folder = tmp_path_factory.mktemp("family")
    family_oracle.build(request.param).save_pretrained(folder)
    return folder


def lora(path: Path) -> mr.Adapter:
    """An adapter with B ≠ 0 and a scale that is neither 1 nor a power of two."""
    config = mr.load_model(path).config
    return mr.init_lora(config, rank=3, alpha=5.0, seed=1, b_std=0.3, dtype="float64")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path, batch: Batch) -> tuple[float, Arrays]:
    wrapped = torch_oracle.with_adapter(torch_oracle.load(checkpoint), lora(checkpoint))
    return torch_oracle.loss_and_grads(wrapped, *batch)


def test_logits(checkpoint: Path, batch: Batch) -> None:
    model, adapter = mr.load_model(checkpoint, dtype="float64"), lora(checkpoint)
    oracle = torch_oracle.load(checkpoint)
    want = torch_oracle.logits(oracle, batch.ids)
    assert_close(mr.logits(model, batch.ids), want, TOLERANCE, "logits")
    want = torch_oracle.logits(torch_oracle.with_adapter(oracle, adapter), batch.ids)
    assert_close(mr.logits(model, batch.ids, adapter=adapter), want, TOLERANCE, "adapted logits")


def test_every_gradient(checkpoint: Path, batch: Batch, oracle: tuple[float, Arrays]) -> None:
    """And the three exact methods are one, bit for bit."""
    model, adapter = mr.load_model(checkpoint, dtype="float64"), lora(checkpoint)
    want_loss, want = oracle
    first: Arrays = {}
    for method in EXACT:
        loss, grads = mr.loss_and_grads(
            model, adapter, batch.ids, batch.labels, method=method, trainable="all"
        )
        assert abs(loss - want_loss) <= TOLERANCE * want_loss
        assert_all_close(grads, want, TOLERANCE)
        first = first or grads
        assert all(np.array_equal(grads[name], first[name]) for name in want), method


@pytest.mark.parametrize("options", [
    {}, {"checkpoints": "disk"}, {"checkpoints": "offload"}, {"workers": 2},
    {"workers": 2, "checkpoints": "offload"},
], ids=str)  # fmt: skip
def test_tiled_offloaded_and_shared(
    checkpoint: Path, batch: Batch, oracle: tuple[float, Arrays], options: dict[str, object]
) -> None:
    model, adapter = mr.load_model(checkpoint, dtype="float64"), lora(checkpoint)
    loss, grads = mr.loss_and_grads(
        model, adapter, batch.ids, batch.labels, method="mesp_tiled", trainable="all", **options
    )
    assert abs(loss - oracle[0]) <= TOLERANCE * oracle[0]
    assert_all_close(grads, oracle[1], TOLERANCE)


@pytest.mark.parametrize("options", [
    {}, {"chunk": 4}, {"chunk": 3, "workers": 2},
], ids=str)  # fmt: skip
def test_in_chunks(
    checkpoint: Path, batch: Batch, oracle: tuple[float, Arrays], options: dict[str, object]
) -> None:
    model, adapter = mr.load_model(checkpoint, dtype="float64"), lora(checkpoint)
    loss, grads = mr.loss_and_grads(
        model, adapter, batch.ids, batch.labels, method="mesp_streamed", trainable="all", **options
    )
    assert abs(loss - oracle[0]) <= TOLERANCE * oracle[0]
    assert_all_close(grads, oracle[1], TOLERANCE)


def test_workers_share_the_plain_halves(
    checkpoint: Path, batch: Batch, oracle: tuple[float, Arrays]
) -> None:
    model, adapter = mr.load_model(checkpoint, dtype="float64"), lora(checkpoint)
    _, grads = mr.loss_and_grads(
        model, adapter, batch.ids, batch.labels, method="mesp", trainable="all", workers=3
    )
    assert_all_close(grads, oracle[1], TOLERANCE)


def test_score(checkpoint: Path, batch: Batch, oracle: tuple[float, Arrays]) -> None:
    from mesp_ref.lean.score import score

    model, adapter = mr.load_model(checkpoint, dtype="float64"), lora(checkpoint)
    assert abs(score(model, adapter, batch.ids, batch.labels)[0] - oracle[0]) <= TOLERANCE


def test_generate(checkpoint: Path, batch: Batch) -> None:
    """Greedy text over a cache is that of transformers over its own."""
    import torch

    prompt = batch.ids[0].tolist()
    [new] = mr.generate(mr.load_model(checkpoint, dtype="float64"), [prompt], max_new_tokens=12)
    oracle = torch_oracle.load(checkpoint)
    want = oracle.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
    assert new == want[0, len(prompt) :].tolist()
