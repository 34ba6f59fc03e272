"""What a data file comes to, counted against numbers by hand."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CHATML, STOP

from mesp_ref.ops import IGNORED
from mesp_ref.train import rows as rows_module
from mesp_ref.train.chat import ChatTemplate
from mesp_ref.train.contents import fitted, table
from mesp_ref.train.data import open_data
from mesp_ref.train.rows import Encoder, RowStream

PLAIN = Encoder(None, None, (), 10_000)


def stream_of(
    tmp_path: Path, records: list[Any], encoder: Encoder = PLAIN, **settings: Any
) -> RowStream:
    path = tmp_path / f"data-{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    data = open_data(path)
    return RowStream(data, encoder, np.arange(data.pages), **{"shuffle": False, **settings})


@pytest.mark.parametrize(
    ("labels", "length", "stop", "beyond"),
    [
        ("..aa.bb.", 8, 8, 0),  # it fits
        ("..aa.bb.", 7, 7, 0),  # the rest behind the last answer goes
        ("..aa.bb.", 6, 4, 1),  # the second answer is cut in two: neither half is kept
        ("..aa.bb.", 5, 4, 1),
        ("..aa.bb.", 4, 4, 1),
        ("..aa.bb.", 3, 0, 2),  # no answer ends there
        ("..aa....", 3, 0, 1),
        ("........", 3, 0, 0),
    ],
)
def test_where_a_conversation_is_cut(labels: str, length: int, stop: int, beyond: int) -> None:
    numbers = np.array([IGNORED if c == "." else 1 for c in labels])
    assert fitted(numbers, length) == (stop, beyond)


def test_packed_tokens_by_hand(tmp_path: Path) -> None:
    """3 + 1 + 5 + 2 = 11 tokens in rows of 6: the third document lies in both; 5 of the 11 are the
    first of a document or of a row."""
    documents = [{"tokens": t} for t in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2])]
    found = stream_of(tmp_path, documents, seq_len=6).contents()
    assert (found.documents, found.rows, found.tokens, found.learned) == (4, 2, 11, 11 - 5)
    assert (found.longest, found.continued, found.cut, found.nothing) == (5, 1, 0, 0)
    assert found.bytes_read == found.bytes == (tmp_path / "data-0.jsonl").stat().st_size


def test_a_document_that_ends_with_its_row_does_not_go_on(tmp_path: Path) -> None:
    found = stream_of(
        tmp_path, [{"tokens": [1, 2, 3]}, {"tokens": [4, 5, 6]}], seq_len=3
    ).contents()
    assert (found.rows, found.continued, found.learned) == (2, 0, 4)


def test_padded_tokens_by_hand(tmp_path: Path) -> None:
    documents = [{"tokens": t} for t in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2])]
    found = stream_of(tmp_path, documents, seq_len=3, packing="pad").contents()
    # Rows of 3, 3, 2 and 2 tokens; that of one token has nothing to learn.
    assert (found.documents, found.rows, found.tokens, found.learned) == (4, 4, 10, 6)
    assert (found.nothing, found.continued) == (1, 1)


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, ChatTemplate(CHATML), (tokenizer.token_to_id(STOP),), 300)


def talk(*answers: str, **switch: Any) -> dict[str, Any]:
    turns = []
    for answer in answers:
        turns += [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": answer, **switch},
        ]
    return {"messages": turns}


def test_a_hundred_chats_longer_than_a_row_are_told(tmp_path: Path, encoder: Encoder) -> None:
    """60 with a first answer that ends in the row, 35 without, 5 that fit: counted, and no row is
    without an end token behind each of its answers."""
    long = "x" * 300
    chats = [talk("Yes.", long)] * 60 + [talk(long)] * 35 + [talk("Yes.")] * 5
    stream = stream_of(tmp_path, chats, encoder, seq_len=200)
    found = stream.contents()
    assert (found.documents, found.rows, found.cut, found.too_long) == (100, 65, 60, 35)
    assert (found.answers, found.answers_beyond) == (60 * 2 + 35 + 5, 60 + 35)
    assert found.learned == 65 * len(b"Yes.") + 65  # one token to a byte, and one to end
    end = encoder.turn_ends[-1]
    for row in stream.once():
        said = row.labels != IGNORED
        ends = np.flatnonzero(said & ~np.append(said[1:], False))
        assert row.labels[ends].tolist() == [end]
    lines = table({"all": asdict(found)})
    assert any(line.split("tokens")[-1].split() == ["35"] for line in lines if "left out" in line)
    assert f"--seq-len {found.longest} would hold the longest whole" in lines
    whole = stream_of(tmp_path, chats, encoder, seq_len=found.longest).contents()
    assert (whole.cut, whole.too_long, whole.rows, whole.answers_beyond) == (0, 0, 100, 0)


def test_excluded_and_silent_turns_are_told(tmp_path: Path, encoder: Encoder) -> None:
    chats = [talk("A."), talk("B.", weight=0), {"messages": [{"role": "user", "content": "Q"}]}]
    found = stream_of(tmp_path, chats, encoder, seq_len=200).contents()
    assert (found.documents, found.rows, found.nothing) == (3, 1, 2)
    assert (found.answers, found.excluded) == (2, 1)


def test_counting_changes_neither_rows_nor_cursor(tmp_path: Path, encoder: Encoder) -> None:
    chats = [talk("A." * i) for i in range(1, 30)]
    counted, plain = (stream_of(tmp_path, chats, encoder, seq_len=99, shuffle=True, seed=3)
                      for _ in range(2))  # fmt: skip
    first = counted.contents()
    assert counted.contents() == first
    for a, b in zip(counted.take(70), plain.take(70), strict=True):
        assert a.ids.tolist() == b.ids.tolist()
    assert counted.cursor == plain.cursor


def test_of_large_files_a_part_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "POOL_BYTES", 300)
    records = [{"tokens": [i % 300, 7, 8]} for i in range(600)]
    stream = stream_of(tmp_path, records, seq_len=8, packing="pad")
    part, whole = stream.contents(4), stream.contents(None)
    assert (whole.documents, whole.rows, whole.learned) == (600, 600, 1200)
    assert whole.bytes_read == whole.bytes
    assert 0 < part.documents < 100
    assert 0 < part.bytes_read < part.bytes == whole.bytes
    assert any("spread over the file" in line for line in table({"all": asdict(part)}))


def test_the_table_has_a_column_for_each_side() -> None:
    sides = [{**asdict(PART), "rows": 1234}, {**asdict(PART), "rows": 5, "forged": 2}]
    lines = table({"train": sides[0], "held out": sides[1]})
    assert lines[0].split() == ["train", "held", "out"]
    assert next(line for line in lines if line.startswith("rows")).split()[-2:] == ["1,234", "5"]
    assert next(line for line in lines if "control token" in line).split()[-2:] == ["0", "2"]
    assert len({len(line) for line in lines if "reads" not in line}) == 1
    assert lines[-1] == "fields that nobody reads: id"


PART = rows_module.Contents(["text"], 64, documents=3, rows=3, unused=["id"])
