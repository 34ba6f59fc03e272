"""Packed rows: documents one after another, of which none sees another."""

import json

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.lean.score import score
from mesp_ref.ops import IGNORED
from mesp_ref.train.data import open_data
from mesp_ref.train.rows import Encoder, Row, RowStream, as_batch
from mesp_ref.train.trainer import TrainConfig, Trainer, evaluate
from mesp_ref.verify.samples import sample_adapter, sample_model, small_config

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def stream_of(tmp_path, documents, seq_len, **settings):
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(json.dumps({"tokens": d}) + "\n" for d in documents))
    data = open_data(path)
    encoder = Encoder(None, None, (), 10_000)
    return RowStream(data, encoder, np.arange(data.pages), seq_len=seq_len, **settings)


def test_rows_tell_where_documents_begin(tmp_path):
    """By hand: 3 + 1 + 5 + 2 tokens in rows of 6; the third document is cut after two of its five,
    and begins anew at 0 in the next row."""
    first, second = stream_of(tmp_path, DOCUMENTS, 6, shuffle=False).once()
    assert first.ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert first.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert first.labels.tolist() == [IGNORED, 6, 7, IGNORED, IGNORED, 10]
    assert second.ids.tolist() == [11, 12, 13, 14, 15]
    assert second.positions.tolist() == [0, 1, 2, 0, 1]
    assert (first.counted, second.counted) == (3, 3)


def test_a_row_of_one_document_has_no_positions(tmp_path):
    [row] = stream_of(tmp_path, [[1, 2, 3, 4]], 4, shuffle=False).once()
    assert row.positions is None
    padded = stream_of(tmp_path, DOCUMENTS, 6, packing="pad", shuffle=False).once()
    assert all(row.positions is None for row in padded)


def test_the_last_row_reaches_back_and_begins_at_0(tmp_path):
    rows = stream_of(tmp_path, DOCUMENTS, 8, seed=1).take(2)
    for row in rows:
        starts = np.flatnonzero(row.positions == 0)
        assert len(row.ids) == 8
        assert starts[0] == 0
        # Every other document begins where its first token stands.
        assert {int(row.ids[s]) for s in starts[1:]} <= {d[0] for d in DOCUMENTS}


def test_batches_carry_positions():
    packed = Row(*(np.array(x, np.int32) for x in ([1, 2, 3], [IGNORED, 2, IGNORED], [0, 1, 0])))
    plain = Row(*(np.array([1, 2, 3, 4, 5], np.int32),) * 2)
    batch = as_batch([packed, plain])
    assert batch.positions.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert as_batch([plain]).positions is None


@pytest.fixture
def case(tmp_path):
    rng = np.random.default_rng(3)
    config = small_config()
    model = sample_model(rng, config)
    documents = [rng.integers(0, config.vocab_size, n).tolist() for n in (7, 1, 12, 3, 20, 5)]
    adapter = sample_adapter(rng, config)
    [row] = stream_of(tmp_path, documents, sum(map(len, documents)), shuffle=False).once()
    counts = [max(len(d) - 1, 0) for d in documents]
    losses = [mr.loss(model, adapter, [d], [d]) if n else 0.0
              for d, n in zip(documents, counts, strict=True)]  # fmt: skip
    return model, adapter, row, counts, float(np.dot(counts, losses) / sum(counts))


def test_loss_of_a_packed_row_is_that_of_its_documents(case):
    """Float64: another order of some dozens of terms."""
    model, adapter, row, counts, want = case
    assert row.counted == sum(counts)
    ids, labels, positions = as_batch([row])
    assert score(model, adapter, ids, labels, positions)[0] == pytest.approx(want, rel=1e-13)
    found = evaluate(model, adapter, [row])
    assert found.loss == pytest.approx(want, rel=1e-13)
    assert found.tokens == sum(counts)
    leaking = mr.loss(model, adapter, ids, labels)  # the check can fail
    assert abs(leaking - want) > 1e-3


class _Rows:
    def __init__(self, rows):
        self.rows, self.cursor = rows, None

    def take(self, count):
        return self.rows[:count]


@pytest.mark.parametrize("method", ["store_all", "mebp", "mesp", "mesp_tiled"])
def test_a_step_on_a_packed_row_has_its_loss(case, method):
    model, adapter, row, counts, want = case
    config = TrainConfig(method=method, accumulate=1, seq_len=len(row.ids), steps=1)
    result = Trainer(model, adapter, _Rows([row]), config).advance()
    assert result.loss == pytest.approx(want, rel=1e-13)
    assert result.tokens == sum(counts)
