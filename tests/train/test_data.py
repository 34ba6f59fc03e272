"""Data files of every kind: what is read, cut, counted, shuffled, held out and refused."""

import json
import tracemalloc
from collections import Counter
from datetime import datetime

import numpy as np
import pytest
from helpers import CHATML, GPT2, QWEN, STOP, byte_level_tokenizer, words
from hypothesis import given, settings
from hypothesis import strategies as st

from mesp_ref.errors import MespRefError
from mesp_ref.ops import IGNORED
from mesp_ref.train import rows as rows_module
from mesp_ref.train.chat import ChatTemplate, load_chat_template
from mesp_ref.train.data import cut_text, open_data, split_pages
from mesp_ref.train.rows import Cursor, Encoder, Row, RowStream, as_batch

TURNS = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Truly?"},
    {"role": "assistant", "content": "Truly."},
]


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, ChatTemplate(CHATML), (tokenizer.token_to_id(STOP),), 300)


def write_lines(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def all_pages(data):
    return np.arange(data.pages)


def as_tuples(rows):
    return [tuple(row.ids.tolist()) for row in rows]


# Text: pages


@pytest.mark.parametrize("pattern", [QWEN, GPT2], ids=["qwen", "gpt2"])
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(
            [
                "word",
                "I'm",
                "3.14",
                " ",
                "\n",
                ", then",
                "naïve",
                "日本",
                "“so”",
                "x\u00a0y",
                "don't",
            ]
        ),
        min_size=1,
        max_size=120,
    ),
    page=st.integers(8, 40),
)
def test_pages_are_cut_where_no_token_is(tmp_path_factory, pattern, parts, page):
    """Pages tokenised one by one give the tokens of the whole, wherever words have single spaces."""
    text = " ".join(part if part.strip() else "z" + part + "z" for part in parts)
    path = tmp_path_factory.mktemp("cut") / "text.txt"
    path.write_bytes(text.encode())
    data = open_data(path, seq_len=page // 8)
    pieces = [data.read(i).decode("utf-8") for i in range(data.pages)]
    assert "".join(pieces) == text
    tokenizer = byte_level_tokenizer(pattern)
    got = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert got == tokenizer.encode(text, add_special_tokens=False).ids


def test_text_without_spaces_is_cut_between_characters(tmp_path):
    text = "海上生明月天涯共此時" * 200
    path = tmp_path / "poem.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = open_data(path, seq_len=8)
    pieces = [data.read(i).decode("utf-8") for i in range(data.pages)]
    assert len(pieces) > 50
    assert "".join(pieces) == text  # without the byte order mark


def test_scanning_needs_little_memory(tmp_path):
    path, text = tmp_path / "large.txt", words(2000)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(400):
            file.write(text)
    size = path.stat().st_size
    tracemalloc.start()
    data = open_data(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 3_800_000
    assert peak < 3_500_000  # a piece of 1 MiB as bytes and as text, whatever the size
    assert data.offsets.nbytes < size / 1000


# Text: rows


def test_an_evaluation_counts_every_token_once(tmp_path, encoder, tokenizer):
    text = words(700)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    data = open_data(path, seq_len=32)
    stream = RowStream(data, encoder, all_pages(data), seq_len=32, shuffle=False)
    rows = list(stream.once())
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert [i for row in rows for i in row.ids.tolist()] == ids
    assert {len(row.ids) for row in rows[:-1]} == {32}
    assert list(stream.once(3))[2].ids.tolist() == ids[64:96]


def test_training_rows_are_full_and_all_text_is_in_them(tmp_path, encoder, tokenizer):
    text = words(700)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    data = open_data(path, seq_len=32)
    stream = RowStream(data, encoder, all_pages(data), seq_len=32, seed=5)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    count = -(-len(ids) // 32)
    rows = stream.take(count)
    assert stream.cursor == Cursor(epoch=1)
    assert {len(row.ids) for row in rows} == {32}
    second = stream.take(count)
    assert as_tuples(second) != as_tuples(rows)
    assert sorted(as_tuples(second)) == sorted(as_tuples(rows))
    expected = [tuple(ids[min(32 * i, len(ids) - 32) :][:32]) for i in range(count)]
    assert as_tuples(rows) != expected
    assert sorted(as_tuples(rows)) == sorted(expected)


def numbered_file(tmp_path, count=400):
    """Words that occur only once, so that a row tells where it comes from."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(f"{i:05d}" for i in range(count)), encoding="utf-8")
    return path


def test_held_out_text_is_never_trained_on(tmp_path, encoder, tokenizer):
    data = open_data(numbered_file(tmp_path), seq_len=32)
    train, held = split_pages(data.pages, 0.25, seed=1)
    stream = RowStream(data, encoder, train, seq_len=32, seed=1)
    rows = []
    while stream.cursor.epoch < 2:
        rows += stream.take(1)
    trained = " ".join(tokenizer.decode(row.ids.tolist()) for row in rows).split()
    held_rows = RowStream(data, encoder, held, seq_len=32, shuffle=False).once()
    unseen = "".join(tokenizer.decode(row.ids.tolist()) for row in held_rows)
    found = {number for number in trained if len(number) == 5}
    assert len(found) > 200
    assert not [number for number in found if number in unseen.split()]


def test_the_seam_between_distant_pages_is_not_learnt(tmp_path, encoder):
    data = open_data(numbered_file(tmp_path), seq_len=8)
    stream = RowStream(data, encoder, np.array([0, 1, 5, 6]), seq_len=8, shuffle=False)
    ids = np.concatenate([row.ids for row in stream.once()])
    labels = np.concatenate([row.labels for row in stream.once()])
    seams = np.flatnonzero(labels == IGNORED)
    lengths = [len(encoder.text(data.read(i).decode())) for i in (0, 1)]
    assert seams.tolist() == [0, sum(lengths)]
    np.testing.assert_array_equal(labels[labels != IGNORED], ids[labels != IGNORED])


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_large_files_are_visited_pool_by_pool(tmp_path, encoder, monkeypatch, form):
    """With pools of some pages every epoch still has every record once, in another order."""
    monkeypatch.setattr(rows_module, "POOL_BYTES", 300)
    if form == "jsonl":
        path = tmp_path / "data.jsonl"
        records = [[i % 300, i // 300, 7] for i in range(600)]
        write_lines(path, *({"tokens": r} for r in records))
    else:
        path = numbered_file(tmp_path)
    data = open_data(path, seq_len=8)
    packing = "pad" if form == "jsonl" else "pack"
    stream = RowStream(data, encoder, all_pages(data), seq_len=8, packing=packing, seed=2)
    assert stream.pools > 5
    epochs = []
    for epoch in range(3):
        rows = []
        while stream.cursor.epoch == epoch:
            rows += stream.take(1)
        epochs.append(as_tuples(rows))
    assert epochs[0] != epochs[1]
    beginnings = [set(epoch[: len(epoch) // 4]) for epoch in epochs]
    assert len(beginnings[0] & beginnings[1]) < len(beginnings[0]) // 2  # not the same pages first
    if form == "jsonl":
        expected = Counter(map(tuple, records))
        assert [Counter(epoch) for epoch in epochs] == [expected] * 3
    else:
        seen = {i for row in epochs[0] for i in row}
        assert seen == set(encoder.text(path.read_text()).tolist())


@pytest.mark.parametrize("pool_bytes", [200, 1 << 20])
def test_order_follows_from_seed_and_cursor(text_file, encoder, monkeypatch, pool_bytes):
    monkeypatch.setattr(rows_module, "POOL_BYTES", pool_bytes)
    data = open_data(text_file, seq_len=16)

    def stream(seed):
        return RowStream(data, encoder, all_pages(data), seq_len=16, seed=seed)

    one, other = stream(7), stream(7)
    first = as_tuples(one.take(40))
    assert first == as_tuples(other.take(40))
    elsewhere = as_tuples(stream(8).take(40))
    assert first != elsewhere
    if pool_bytes == 200:  # another seed begins with other pages, not only with other rows
        assert len(set(first[:20]) & set(elsewhere[:20])) < 10
    resumed = stream(7)
    resumed.cursor = one.cursor
    assert as_tuples(resumed.take(100)) == as_tuples(one.take(100))


def test_split_is_a_seeded_partition():
    train, held = split_pages(40, 0.1, seed=3)
    assert len(held) == 4
    assert sorted([*train, *held]) == list(range(40))
    assert held.tolist() == split_pages(40, 0.1, seed=3)[1].tolist()
    assert held.tolist() != split_pages(40, 0.1, seed=4)[1].tolist()


@pytest.mark.parametrize(
    ("pages", "fraction", "held"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (50, 0.0, 0)]
)
def test_split_of_few_pages(pages, fraction, held):
    assert [len(part) for part in split_pages(pages, fraction, 0)] == [pages - held, held]


# JSONL


def test_text_records_end_with_the_end_token(tmp_path, encoder, tokenizer):
    path = write_lines(tmp_path / "d.jsonl", {"text": "one"}, "", {"text": "two" + STOP})
    data = open_data(path)
    stream = RowStream(data, encoder, all_pages(data), seq_len=99, packing="pad", shuffle=False)
    texts = [tokenizer.decode(row.ids.tolist(), skip_special_tokens=False) for row in stream.once()]
    assert texts == ["one" + STOP, "two" + STOP]


def test_token_records_are_taken_as_they_are(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"tokens": [5, 6, 7, 8, 9]}, {"tokens": [1, 2]})
    data = open_data(path, vocab_size=10)
    encoder = Encoder(None, None, (), 10)
    packed = RowStream(data, encoder, all_pages(data), seq_len=4, shuffle=False)
    assert as_tuples(packed.once()) == [(5, 6, 7, 8), (9, 1, 2)]
    padded = RowStream(data, encoder, all_pages(data), seq_len=3, packing="pad", shuffle=False)
    assert as_tuples(padded.once()) == [(5, 6, 7), (8, 9), (1, 2)]


def test_only_the_assistant_counts(tmp_path, encoder, tokenizer):
    data = open_data(write_lines(tmp_path / "d.jsonl", {"messages": TURNS}))
    [row] = RowStream(data, encoder, all_pages(data), seq_len=512, shuffle=False).once()
    whole = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\nFine.<|im_end|>\n<|im_start|>user\nTruly?<|im_end|>\n"
        "<|im_start|>assistant\nTruly.<|im_end|>\n"
    )
    assert tokenizer.decode(row.ids.tolist(), skip_special_tokens=False) == whole
    counted = row.labels != IGNORED
    np.testing.assert_array_equal(row.labels[counted], row.ids[counted])
    said = tokenizer.decode(row.ids[counted].tolist(), skip_special_tokens=False)
    assert said == "Fine.<|im_end|>Truly.<|im_end|>"


def test_conversations_are_cut_short_and_dropped_when_nothing_is_left(tmp_path, encoder):
    data = open_data(write_lines(tmp_path / "d.jsonl", {"messages": TURNS}))
    [whole] = RowStream(data, encoder, all_pages(data), seq_len=512, shuffle=False).once()
    first = int(np.flatnonzero(whole.labels != IGNORED)[0])
    second = int(np.flatnonzero(whole.labels != IGNORED)[-1])
    for seq_len in (first + 7, second):  # "Fine." and <|im_end|> are 6 tokens
        cut = RowStream(data, encoder, all_pages(data), seq_len=seq_len, shuffle=False)
        [row] = cut.once()
        np.testing.assert_array_equal(row.ids, whole.ids[: first + 6])
        assert row.labels[-1] == encoder.ends[0]
    nothing = RowStream(data, encoder, all_pages(data), seq_len=first + 5, shuffle=False)
    with pytest.raises(MespRefError, match="1 of 1 have no answer that ends there, the longest"):
        nothing.take(1)


def test_batches_are_padded_on_the_right():
    long, short = np.array([4, 5, 6], np.int32), np.array([7, 8], np.int32)
    ids, labels, _ = as_batch([Row(long, long), Row(short, np.array([IGNORED, 8], np.int32))])
    assert ids.tolist() == [[4, 5, 6], [7, 8, 0]]
    assert labels.tolist() == [[4, 5, 6], [-100, 8, -100]]
    assert (Row(long, long).counted, Row(short, short).counted) == (2, 1)


# Chat templates


def test_generation_blocks_say_what_counts():
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}."
        "{% endgeneration %}{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source)
    assert template.segments(TURNS) == [
        ("U:How are you?A:", False),
        ("Fine..", True),
        ("U:Truly?A:", False),
        ("Truly..", True),
    ]
    assert template.render(TURNS[:2]) == "U:How are you?A:Fine.."


def test_templates_are_rendered_as_hugging_face_does():
    source = (
        "{% set n = namespace(k=0) %}\n    {% for m in messages %}\n"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ bos_token }}{{ m | tojson }}\n"
        "    {% endfor %}\n{{ strftime_now('%Y-%m-%d') }}{{ tools }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"}, now=datetime(2024, 2, 29))
    got = template.render([{"role": "user", "content": "é<&'"}, TURNS[1]])
    assert got == '<s>{"role": "user", "content": "é<&\'"}\n2024-02-29None'


def test_a_template_that_rewrites_all_turns_has_nothing_to_learn(tmp_path, tokenizer):
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    cut = ChatTemplate(source).cut(TURNS)
    assert (cut.learned, cut.answers, cut.rewritten) == ((), 2, 2)
    encoder = Encoder(tokenizer, ChatTemplate(source), (), 300)
    data = open_data(write_lines(tmp_path / "d.jsonl", {"messages": TURNS}))
    with pytest.raises(MespRefError, match="no token to learn from"):
        RowStream(data, encoder, all_pages(data), seq_len=64).take(1)
    assert encoder.counts.silent > 0
    assert "rewrites" in encoder.counts.told()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "template error: roles must alternate"),
        ("{{ messages[9].content.x }}", "template error: "),
        ("{{ ''.__class__.__mro__ }}", "template error: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "template error: "),
    ],
)
def test_template_errors_name_the_line_of_the_data(tmp_path, tokenizer, source, words):
    path = write_lines(tmp_path / "d.jsonl", "", {"messages": TURNS})
    data = open_data(path)
    encoder = Encoder(tokenizer, ChatTemplate(source, where="conf.json"), (), 300)
    with pytest.raises(MespRefError, match=f"d.jsonl: line 2: messages: conf.json: {words}"):
        RowStream(data, encoder, all_pages(data), seq_len=64).take(1)


def test_templates_are_found_where_models_keep_them(tmp_path):
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one {{ eos_token }}", "eos_token": "E"}))
    assert load_chat_template(tmp_path).render([]) == "one E"
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named, "eos_token": {"content": "E"}}))
    assert load_chat_template(tmp_path).render([]) == "two"
    (tmp_path / "chat_template.jinja").write_text("three {{ eos_token }}")
    assert load_chat_template(tmp_path).render([]) == "three E"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(MespRefError, match=r"chat_template.jinja: chat_template: line 1"):
        load_chat_template(tmp_path)


# What is refused

BAD_FILES = {
    "empty text": ("t.txt", b"", "empty, expected text"),
    "only space": ("t.txt", b" \n\t\n", "empty, expected text"),
    "binary": ("t.txt", b"GGUF\x03\x00\xff\xfe", "byte 6: found 0xff, expected UTF-8"),
    "cut character": ("t.txt", "caf\u00e9".encode()[:-1], "found the end inside a character"),
    "empty lines": ("d.jsonl", b"\n\n", "empty, expected records: a JSON object per line"),
    "not JSON": ("d.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "list of lists": ("d.json", b'[["a"]]', "record 1: found list, expected a JSON object"),
    "no field": ("d.jsonl", b'{"prompt": "a"}', "line 1: found fields 'prompt', expected text"),
    "text a number": ("d.jsonl", b'{"text": 3}', "line 1: text: found int"),
    "no turns": ("d.jsonl", b'{"messages": []}', "line 1: messages: found"),
    "no role": ("d.jsonl", b'{"messages": [{"content": "a"}]}', "turn 1: expected an object"),
    "no content": ("d.jsonl", b'\n{"messages": [{"role": "user"}]}', "line 2: messages: turn 1"),
    "role unknown": (
        "d.jsonl",
        b'{"messages": [{"role": "bot", "content": "a"}]}',
        "turn 1: role: f",
    ),
    "role forged": (
        "d.jsonl",
        b'{"messages": [{"role": "user<|im_end|>", "content": "a"}]}',
        "turn 1: role: found 'user<|im_end|>', expected one of system, developer, user",
    ),
    "field unknown": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a", "mask": 1}]}',
        "turn 1: found field 'mask', expected only role",
    ),
    "content a number": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": 3}]}',
        "content: found 3",
    ),
    "an image": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
        "turn 1: content: found",
    ),
    "half a weight": (
        "d.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
        "turn 1: weight: found 0.5, expected 0 or 1",
    ),
    "train a number": (
        "d.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a", "train": 1}]}',
        "turn 1: train: found 1, expected true or false",
    ),
    "a user to learn": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a", "train": true}]}',
        "turn 1: train: found True on a turn of role user",
    ),
    "tokens a text": ("d.jsonl", b'{"tokens": "abc"}', "line 1: tokens: found 'abc'"),
    "token too large": ("d.jsonl", b'{"tokens": [1, 300]}', "found 300, expected 0 to 299"),
    "token negative": ("d.jsonl", b'{"tokens": [-100]}', "found -100, expected 0 to 299"),
    "token a float": ("d.jsonl", b'{"tokens": [1.5]}', "expected a list of integers"),
    "token true": ("d.jsonl", b'{"tokens": [true]}', "expected a list of integers"),
    "latin-1": ("d.jsonl", b'{"text": "caf\xe9"}', "line 1: byte 13: not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_by_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MespRefError) as error:
        open_data(path, vocab_size=300)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path, encoder, text_file):
    with pytest.raises(MespRefError, match="not found"):
        open_data(tmp_path / "missing.txt")
    with pytest.raises(MespRefError, match="not a regular file"):
        open_data(tmp_path)
    with pytest.raises(MespRefError, match="format: found 'xml'"):
        open_data(text_file, form="xml")
    with pytest.raises(MespRefError, match="packing: found 'tight'"):
        RowStream(open_data(text_file), encoder, [0], seq_len=8, packing="tight")
    with pytest.raises(MespRefError, match=r"val-fraction: found 1\.0"):
        split_pages(3, 1.0, 0)


def test_a_file_shorter_than_a_sequence_is_refused(text_file, encoder):
    data = open_data(text_file, seq_len=8000)
    stream = RowStream(data, encoder, all_pages(data), seq_len=8000)
    with pytest.raises(MespRefError, match=r"found \d+ tokens to train on, expected at least one"):
        stream.require_full_row()


def test_long_texts_are_tokenised_in_pieces_without_a_trace(encoder, tokenizer):
    text = words(12_000, seed=3) + "海上生明月" * 3000
    got = encoder.text(text).tolist()
    assert got[:20_000] == tokenizer.encode(text).ids[:20_000]
    assert len(got) > 40_000
    assert tokenizer.decode(got) == text
    assert max(map(len, cut_text(text))) <= 8192


def test_another_models_tokenizer_is_refused(text_file, tokenizer):
    data = open_data(text_file)
    stream = RowStream(data, Encoder(tokenizer, None, (), 50), all_pages(data), seq_len=8)
    with pytest.raises(MespRefError, match="another model's tokenizer"):
        stream.take(1)


def test_a_file_that_shrinks_meanwhile_is_noticed(text_file, encoder):
    data = open_data(text_file, seq_len=8)
    text_file.write_text("short", encoding="utf-8")
    with pytest.raises(MespRefError, match="changed while in use"):
        RowStream(data, encoder, all_pages(data), seq_len=8).take(1)
