"""Forms of data: what each record becomes, which files are recognised, and what is refused by name."""

import contextlib
import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CHATML, STOP

from mesp_ref.errors import MespRefError
from mesp_ref.ops import IGNORED
from mesp_ref.train.chat import ChatTemplate
from mesp_ref.train.data import DataFile, open_data
from mesp_ref.train.forms import turned
from mesp_ref.train.rows import Encoder, RowStream

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
QUESTION, ANSWER = CHAT


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def records(data: DataFile) -> list[dict[str, Any]]:
    return [record for page in range(data.pages) for _, record in data.records(page)]


def written(tmp_path: Path, name: str, content: bytes) -> DataFile:
    path = tmp_path / name
    path.write_bytes(content)
    return open_data(path)


# Records

TURNED = {
    "text": ({"text": "a", "id": 3}, "text", {"text": "a"}),
    "tokens": ({"tokens": [1, 2]}, "tokens", {"tokens": [1, 2]}),
    "tokens in a cell": ({"tokens": "[1, 2]"}, "tokens", {"tokens": [1, 2]}),
    "messages": ({"messages": CHAT, "prompt": "Who?"}, "messages", {"messages": CHAT}),
    "messages in a cell": ({"messages": json.dumps(CHAT)}, "messages", {"messages": CHAT}),
    "messages in columns": (
        {"messages": {"role": ["user", "assistant"], "content": ["Who?", "Nobody."]}},
        "messages", {"messages": CHAT},
    ),
    "tools": ({"messages": CHAT, "tools": [{"a": 1}]}, "messages",
              {"messages": CHAT, "tools": [{"a": 1}]}),
    "input_ids": ({"input_ids": [1, 2]}, "input_ids", {"tokens": [1, 2]}),
    "input_ids with labels, padded on both sides": (
        {"input_ids": [0, 5, 6, 7, 0], "labels": [-100, -100, 6, 7, -100],
         "attention_mask": [0, 1, 1, 1, 0]},
        "input_ids", {"tokens": [5, 6, 7], "labels": [-100, 6, 7]},
    ),
    "prompt": ({"prompt": "a", "completion": "b"}, "prompt", {"prompt": "a", "completion": "b"}),
    "prompt of turns": (
        {"prompt": [ANSWER, QUESTION], "completion": [ANSWER]}, "prompt",
        {"messages": [ANSWER | {"train": False}, QUESTION, ANSWER]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Who?"},
                           {"from": "gpt", "value": "Nobody.", "weight": 0}], "system": "S"},
        "conversations",
        {"messages": [{"role": "system", "content": "S"}, QUESTION, ANSWER | {"weight": 0}]},
    ),
    "sharegpt by our names": ({"conversations": CHAT}, "conversations", {"messages": CHAT}),
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "all of it"}, "instruction",
        {"messages": [{"role": "user", "content": "Add.\n\n1 and 2"},
                      {"role": "assistant", "content": "3"}],
         "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
         "completion": "3"},
    ),
    "alpaca without input": (
        {"instruction": "Sing.", "input": "", "output": "La."}, "instruction",
        {"messages": [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}],
         "prompt": "### Instruction:\nSing.\n\n### Response:\n", "completion": "La."},
    ),
    "alpaca with a past": (
        {"instruction": "And?", "output": "So.", "history": [["Who?", "Nobody."]], "system": "S"},
        "instruction",
        {"messages": [{"role": "system", "content": "S"}, *CHAT, {"role": "user", "content": "And?"},
                      {"role": "assistant", "content": "So."}]},
    ),
    "a table of two forms": (
        {"messages": None, "text": "a", "chosen_by": None}, "text", {"text": "a"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "form", "value"), TURNED.values(), ids=TURNED)
def test_records_are_turned(record: Any, form: str, value: Any) -> None:
    found = turned(record, "f: line 1")
    assert (found.form, found.value) == (form, value)


def test_fields_that_nobody_reads_are_named(tmp_path: Path) -> None:
    data = written(tmp_path, "a.jsonl", lines({"text": "a", "id": 1}, {"text": "b", "lang": "en"}))
    assert data.unused == ("id", "lang")


REFUSED = {
    "DPO": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pair (DPO)"),
    "KTO": ({"prompt": "a", "completion": "b", "label": False}, "(KTO)"),
    "question and answer": ({"question": "a", "answer": "b"},
                            "rename question to prompt and answer to completion"),
    "half a pair": ({"prompt": "a"}, "nearest is prompt and completion: completion is missing"),
    "half of alpaca": ({"instruction": "a"}, "nearest is instruction and output: output is missing"),
    "a slip": ({"mesages": []}, "rename 'mesages' to messages"),
    "a body": ({"title": "a", "content": "b"}, "rename content to text"),
    "a dialogue": ({"dialogue": []}, "rename dialogue to messages"),
    "a turn": ({"role": "user", "content": "a"}, "this is a turn"),
    "wrapped": ({"version": 1, "data": [{"text": "a"}]}, "give the list of 'data' alone"),
    "a list": (["a"], "found list, expected a JSON object"),
    "unknown speaker": ({"conversations": [{"from": "narrator", "value": "x"}]},
                        "conversations: turn 1: from: found 'narrator', expected one of human"),
    "unknown field": ({"conversations": [{"from": "gpt", "value": "x", "mask": 1}]},
                      "turn 1: found field 'mask'"),
    "no turns": ({"conversations": []}, "conversations: found []"),
    "mixed": ({"prompt": "a", "completion": ["b"]}, "two strings or two lists of turns"),
    "a number": ({"instruction": "a", "output": 3}, "output: found int, expected a string"),
    "null": ({"text": None}, "text: found null, expected a string"),
    "labels": ({"input_ids": [1, 2], "labels": [1]}, "labels: found 1 numbers, expected 2"),
    "ids": ({"input_ids": [1.5]}, "input_ids: found [1.5], expected a list of integers"),
    "a hole": ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask: expected 1"),
    "packed": ({"input_ids": [1, 2], "position_ids": [0, 0]}, "found position_ids"),
    "past": ({"instruction": "a", "output": "b", "history": [["x"]]}, "a list of pairs of strings"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "words"), REFUSED.values(), ids=REFUSED)
def test_records_are_refused_with_the_nearest_form(record: Any, words: str) -> None:
    with pytest.raises(MespRefError, match=r"^f: line 1: ") as error:
        turned(record, "f: line 1")
    assert words in str(error.value)


# What is learned of a prompt


def tokenized(tokenizer: Any, record: Any, template: bool, tmp_path: Path) -> Any:
    data = written(tmp_path, "a.jsonl", lines(record))
    chat = ChatTemplate(CHATML) if template else None
    encoder = Encoder(tokenizer, chat, (tokenizer.token_to_id(STOP),), 300)
    [row] = RowStream(data, encoder, np.arange(data.pages), seq_len=512, shuffle=False).once()
    said = [tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            for ids in (row.ids, row.ids[row.labels != IGNORED])]  # fmt: skip
    return tuple(said)


def test_of_a_prompt_only_the_completion_and_its_end_are_learned(
    tokenizer: Any, tmp_path: Path
) -> None:
    found = tokenized(tokenizer, {"prompt": "One and", "completion": " two"}, True, tmp_path)
    assert found == ("One and two" + STOP, " two" + STOP)


def test_labels_of_other_programs_are_kept(tmp_path: Path) -> None:
    """Labels stand at their own token, as in transformers, which shifts them in the loss; a record is
    a row."""
    data = written(tmp_path, "a.jsonl", lines(
        {"input_ids": [4, 5, 6, 0], "labels": [-100, 5, 6, -100], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [7, 8]},
    ))  # fmt: skip
    encoder = Encoder(None, None, (), 9)
    stream = RowStream(data, encoder, np.arange(data.pages), seq_len=8, shuffle=False)
    rows = list(stream.once())
    assert [(row.ids.tolist(), row.labels.tolist()) for row in rows] == [
        ([4, 5, 6], [-100, 5, 6]), ([7, 8], [7, 8]),
    ]  # fmt: skip


def test_labels_are_held_to_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"input_ids": [1, 2], "labels": [-100, 12]}))
    with pytest.raises(MespRefError, match="line 1: labels: found 12, expected 0 to 8"):
        open_data(tmp_path / "a.jsonl", vocab_size=9)


def test_alpaca_is_a_conversation_or_a_prompt(tokenizer: Any, tmp_path: Path) -> None:
    record = {"instruction": "Sing.", "input": "", "output": "La."}
    whole, said = tokenized(tokenizer, record, True, tmp_path)
    assert whole.endswith(
        "<|im_start|>user\nSing.<|im_end|>\n<|im_start|>assistant\nLa.<|im_end|>\n"
    )
    assert said == "La.<|im_end|>"
    whole, said = tokenized(tokenizer, record, False, tmp_path)
    assert whole == "### Instruction:\nSing.\n\n### Response:\nLa." + STOP
    assert said == "La." + STOP


# Files

CSV = b'text,id\n"one, and",1\n"two\nlines ""q""",2\n'
TWO = [{"text": "one, and", "id": "1"}, {"text": 'two\nlines "q"', "id": "2"}]
TEXTS = [{"text": record["text"]} for record in TWO]
LIST = json.dumps([{"text": r["text"]} for r in TWO], indent=2).encode()
FILES = {
    "JSON lines": ("a.jsonl", lines(*TEXTS), "jsonl"),
    "JSON lines in .txt": ("a.txt", lines(*TEXTS), "jsonl"),
    "JSON lines without a name": ("data", b"\n" + lines(*TEXTS), "jsonl"),
    "JSON lines in .csv": ("a.csv", lines(*TEXTS), "jsonl"),
    "a list": ("a.json", LIST, "json"),
    "a list in .txt": ("a.txt", b"\xef\xbb\xbf  " + LIST, "json"),
    "a list in .jsonl": ("a.jsonl", LIST, "json"),
    "CSV": ("a.csv", CSV, "csv"),
    "CSV with a BOM and CRLF": ("a.csv", b"\xef\xbb\xbf" + CSV.replace(b"id\n", b"id\r\n"), "csv"),
    "CSV in .txt": ("a.txt", CSV, "csv"),
    "semicolons": ("a.csv", CSV.replace(b"text,id", b"text;id").replace(b'",1', b'";1')
                   .replace(b'",2', b'";2'), "csv"),
    "TSV": ("a.tsv", CSV.replace(b"text,id", b"text\tid").replace(b'",1', b'"\t1')
            .replace(b'",2', b'"\t2'), "tsv"),
    "TSV in .txt": ("a.txt", CSV.replace(b"text,id", b"text\tid").replace(b'",1', b'"\t1')
                    .replace(b'",2', b'"\t2'), "tsv"),
    "gzip of lines": ("a.jsonl.gz", gzip.compress(lines(*TEXTS)), "jsonl"),
    "gzip of CSV": ("a.csv.gz", gzip.compress(CSV), "csv"),
    "gzip without a name": ("a.txt", gzip.compress(LIST), "json"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "form"), FILES.values(), ids=FILES)
def test_files_are_what_their_content_is(
    tmp_path: Path, name: str, content: bytes, form: str
) -> None:
    data = written(tmp_path, name, content)
    assert records(data) == TEXTS
    assert (data.format, data.kinds) == (form, ("text",))


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world\nand so on, said she\n", "one word", "[1] A note.\n[2] Another.\n",
        "{\\rtf1 no JSON}\n", "{ int a; }\n", "name, age\nsaid, he\nsaid, she\n",
        "I came,I saw\nI won\nand left, too, soon\n", "# title\n\ntext, with, commas\n",
    ],
)  # fmt: skip
def test_texts_stay_texts(tmp_path: Path, text: str) -> None:
    data = written(tmp_path, "a.txt", text.encode())
    assert not data.jsonl
    assert data.read(0).decode() == text


def test_text_can_be_packed_with_gzip_and_forced(tmp_path: Path) -> None:
    data = written(tmp_path, "a.txt.gz", gzip.compress(b"Some words."))
    assert (data.read(0), data.jsonl) == (b"Some words.", False)
    (tmp_path / "b.txt").write_bytes(CSV)
    assert open_data(tmp_path / "b.txt", form="text").read(0) == CSV


BROKEN = {
    "a list cut off": ("a.json", LIST[:-3], "record 2: not JSON"),
    "a list with a hole": ("a.json", b'[{"text": "a"} {"text": "b"}]', "record 2: not JSON"),
    "more after a list": ("a.json", b'[{"text": "a"}] x', "more follows the end"),
    "an empty list": ("a.json", b"[]", "empty, expected records"),
    "a list of words": ("a.json", b'["a", "b"]', "record 1: found str, expected a JSON object"),
    "twice a name": ("a.json", b'[{"text": "a", "text": "b"}]', "record 1: not JSON"),
    "an object": ("a.json", b'{\n "data": [\n {"text": "a"}]}', "goes on in the next line"),
    "a notebook": ("a.ipynb", b'{\n "cells": []\n}', "goes on in the next line"),
    "unknown columns": ("a.csv", b"question,answer\na,b\n", "rename question to prompt"),
    "unknown columns in .txt": ("a.txt", b"question,answer\na,b\nc,d\n", "rename question to prom"),
    "DPO in CSV": ("a.csv", b"prompt,chosen,rejected\na,b,c\n", "(DPO)"),
    "a field too many": ("a.csv", b"text,id\na,1\nb,2,3\n", "line 3: found 3 fields, expected 2"),
    "an open quote": ("a.csv", b'text,id\n"a,1\n', "expected CSV"),
    "a column twice": ("a.csv", b"text,text\na,b\n", "found a column twice"),
    "latin-1 in CSV": ("a.csv", b"text,id\ncaf\xe9,1\n", "not UTF-8"),
    "only names": ("a.csv", b"text,id\n", "empty, expected records"),
    "no Parquet": ("a.parquet", b"text", "found no parquet file"),
    "gzip cut off": ("a.gz", gzip.compress(b"x" * 1000)[:-12], "broken gzip file"),
    "gzip of ZIP": ("a.gz", gzip.compress(b"PK\x03\x04"), "a ZIP archive"),
    "a PDF": ("a.txt", b"%PDF-1.7", "found a PDF, expected text, JSON, CSV"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "found UTF-16 text"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_by_place(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    with pytest.raises(MespRefError) as error:
        written(tmp_path, name, content)
    assert str(error.value).startswith(str(tmp_path / name))
    assert words in str(error.value)
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl.gz"])
def test_files_of_any_size_are_converted_in_bounded_memory(tmp_path: Path, name: str) -> None:
    """12 MB of records: what stays of them, and what is alive at once, is below 6 MB."""
    texts = [{"text": f"{i} " + "word " * 200} for i in range(12_000)]
    if name == "a.json":
        content = json.dumps(texts).encode()
    elif name == "a.csv":
        content = b"text,id\n" + b"".join(f"{t['text']},1\n".encode() for t in texts)
    else:
        content = gzip.compress(lines(*texts), 1)
    path = tmp_path / name
    path.write_bytes(content)
    del content
    tracemalloc.start()
    data = open_data(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000_000
    assert records(data) == texts


# Parquet and Arrow, written by pyarrow

ROWS = [
    {"conversations": [{"from": "human", "value": f"Who? {i}", "weight": None},
                       {"from": "gpt", "value": "Nobody.", "weight": 0}], "id": i}
    for i in range(1200)
]  # fmt: skip
WANT = [{"messages": [{"role": "user", "content": f"Who? {i}"}, ANSWER | {"weight": 0}]}
        for i in range(1200)]  # fmt: skip


@pytest.fixture(scope="module")
def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def test_parquet_is_read(arrow: Any, tmp_path: Path) -> None:
    from pyarrow import parquet

    path = tmp_path / "train"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=500)
    data = open_data(path)
    assert records(data) == WANT
    assert (data.format, data.kinds, data.unused) == ("parquet", ("conversations",), ("id",))
    parquet.write_table(arrow.table({"chosen": ["a"], "rejected": ["b"]}), path)
    with pytest.raises(MespRefError, match=r"record 1: found chosen and rejected"):
        open_data(path)
    parquet.write_table(arrow.table({"text": [b"a"]}), path)
    with pytest.raises(MespRefError, match=r"record 1: Object of type bytes"):
        open_data(path)
    parquet.write_table(arrow.table({"image": [b"a"]}), path)
    with pytest.raises(MespRefError, match=r"record 1: found fields 'image'"):
        open_data(path)
    path.write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    with pytest.raises(MespRefError, match=r"record 1: not readable"):
        open_data(path)


def saved(arrow: Any, folder: Path, parts: list[Any]) -> Path:
    """A directory as `datasets.Dataset.save_to_disk` writes it: streams, and state.json."""
    folder.mkdir()
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        table = arrow.Table.from_pylist(rows)
        with (
            arrow.OSFile(str(folder / name), "wb") as file,
            arrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table, max_chunksize=1000)
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_directory_of_datasets_is_read(arrow: Any, tmp_path: Path) -> None:
    folder = saved(arrow, tmp_path / "set", [ROWS[:700], ROWS[700:]])
    assert records(open_data(folder)) == WANT
    assert records(open_data(folder / "data-00000-of-00002.arrow")) == WANT[:700]
    state = {"_data_files": [{"filename": "../x.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(MespRefError, match="expected a file inside the folder"):
        open_data(folder)
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{}]}))
    with pytest.raises(MespRefError, match="found indices"):
        open_data(folder)
    (folder / "state.json").write_text("[")
    with pytest.raises(MespRefError, match="not readable as JSON"):
        open_data(folder)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(MespRefError, match=r"splits \['train', 'test'\], expected one of them"):
        open_data(folder)


def test_arrow_files_are_read(arrow: Any, tmp_path: Path) -> None:
    table = arrow.table({"text": ["a", "b"]})
    place = str(tmp_path / "a.arrow")
    with arrow.OSFile(place, "wb") as file, arrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert records(open_data(tmp_path / "a.arrow")) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("form", ["stream", "file", "parquet"])
def test_damaged_tables_are_refused_or_read(arrow: Any, tmp_path: Path, form: str) -> None:
    """Bytes changed, cut and doubled: offsets that lead out of a buffer crash the process unless
    every batch is validated. MESP_REF_DAMAGED for more."""
    from pyarrow import parquet

    table, path = arrow.Table.from_pylist(ROWS[:4]), tmp_path / "a"
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        new = arrow.ipc.new_stream if form == "stream" else arrow.ipc.new_file
        with arrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    whole, rng = path.read_bytes(), np.random.default_rng(4)
    for _ in range(int(os.environ.get("MESP_REF_DAMAGED", "100"))):
        content = bytearray(whole)
        for place in rng.integers(8, len(whole), rng.integers(1, 4)).tolist():
            content[place] = int(rng.integers(256))
        end = len(whole) if rng.random() < 0.8 else int(rng.integers(8, len(whole)))
        path.write_bytes(content[:end])
        with contextlib.suppress(MespRefError):
            records(open_data(path))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MespRefError, match=r"needs pyarrow; pip install 'mesp-ref\[data\]'"):
        written(tmp_path, "a.parquet", b"PAR1")


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(MespRefError, match="set TMPDIR to a place with room"):
        written(tmp_path, "a.csv", CSV)
