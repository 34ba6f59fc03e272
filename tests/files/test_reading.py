"""Strict reading: JSON by the letter, short quotes, regular files, and no path out of its folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files import strict as reading
from mesp_ref.files.output import copy_companions
from mesp_ref.files.strict import inside, open_regular, parse_json, read_object
from mesp_ref.files.tokenizer import load_tokenizer
from mesp_ref.golden.suite import SHIPPED, Suite
from mesp_ref.job.directory import RunDirectory
from mesp_ref.train.chat import load_chat_template
from mesp_ref.train.data import open_data
from mesp_ref.verify.samples import small_config


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5e3, true, null, "\\u00e9\\ud83d\\ude42"]}',
        "9223372036854775807",
        "1e300",
        '"é"',
    ],
)
def test_json_that_is_json(text: str) -> None:
    assert parse_json(text) == json.loads(text) == parse_json(text.encode())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff{}", "can't decode"),
        ("{", "Expecting"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('[{"b": {"x": 1, "y": 2, "x": 1}}]', "'x' is given twice"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e400", "beyond the range"),
        ("9223372036854775808", "beyond 64 bits"),
        ("9" * 5000, "beyond 64 bits"),
        ('"\\ud800"', "half a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_json_that_only_looks_like_it(text: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_name_given_twice_is_found_without_comparing_all_names() -> None:
    """A file of a million names, the last one twice, must not take an hour to refuse."""
    compared = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)  # type: ignore[arg-type]

    names = [Name(i) for i in range(1000)]
    pairs = [*((name, 0) for name in names), (Name(999), 0)]
    with pytest.raises(ValueError, match="'999' is given twice"):
        reading._object(pairs)
    assert compared < 100  # each with each would be half a million


def test_quotes_are_short_whatever_they_quote() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "a" * 10**6, {str(i): [i] * 99 for i in range(99)}, list(range(10**6))):
        assert len(shown(value)) < 500
    assert shown("x") == "'x'"


def test_an_error_is_one_line_that_no_terminal_obeys() -> None:
    text = str(MespRefError("a\nb\x1b[2Jc\ud800é " + "x" * 5000))
    assert text.startswith("a\\nb\\x1b[2Jc\\ud800é x")
    assert len(text) < 1100
    text.encode()


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for file in (tmp_path / "config.json", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(file)
    with pytest.raises(mr.MespRefError, match="not a regular file"):
        mr.load_model(tmp_path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 33)  # a hole: 8 GiB that lie nowhere
    with pytest.raises(mr.MespRefError, match="found 8589934592 bytes, expected at most"):
        read_object(file, "an object")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b"])
def test_names_that_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(mr.MespRefError, match="expected a file inside the folder"):
        inside(tmp_path, name)


def test_links_stay_inside_or_lead_to_the_blobs_of_a_cache(tmp_path: Path) -> None:
    """The Hugging Face cache keeps models--x/snapshots/<commit>/config.json -> ../../blobs/<hash>."""
    snapshot, blobs = tmp_path / "m" / "snapshots" / "c0ffee", tmp_path / "m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ab12").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/ab12")
    (snapshot / "same.json").symlink_to("config.json")
    (snapshot / "out.json").symlink_to(tmp_path / "secret")
    (snapshot / "loop.json").symlink_to("loop.json")
    (snapshot / "folder").symlink_to(tmp_path, target_is_directory=True)
    assert inside(snapshot, "config.json").read_text() == "{}"
    inside(snapshot, "same.json")
    for name in ("out.json", "folder/secret"):
        with pytest.raises(mr.MespRefError, match=r"found a link to .*secret"):
            inside(snapshot, name)
    with pytest.raises(mr.MespRefError):
        read_object(inside(snapshot, "loop.json"), "an object")


def test_no_reader_follows_a_link_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Each file of each reader in turn is a link to a right one that lies elsewhere."""
    adapter, run = tmp_path / "adapter", tmp_path / "run"
    mr.save_adapter(mr.init_lora(small_config(), rank=1), adapter)
    shutil.copytree(SHIPPED, tmp_path / "suite")
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    RunDirectory(run).create({})
    readers: dict[Path, Any] = {
        model / "config.json": lambda: mr.load_model(model),
        model / "model.safetensors": lambda: mr.load_model(model),
        model / "tokenizer.json": lambda: load_tokenizer(model),
        model / "tokenizer_config.json": lambda: load_chat_template(model),
        adapter / "adapter_config.json": lambda: mr.load_adapter(adapter),
        adapter / "adapter_model.safetensors": lambda: mr.load_adapter(adapter),
        tmp_path / "suite" / "manifest.json": lambda: Suite(tmp_path / "suite"),
    }
    for file, read in readers.items():
        read()
        away = tmp_path / "elsewhere"
        file.rename(away)
        file.symlink_to(away)
        with pytest.raises(mr.MespRefError, match="found a link to"):
            read()
        file.unlink()
        away.rename(file)
    (model / "tokenizer_secret").symlink_to(tmp_path / "run" / "run.json")
    with pytest.raises(mr.MespRefError, match="found a link to"):
        copy_companions(model, tmp_path / "suite")


def test_there_is_no_pickle() -> None:
    """np.load refuses it by default; nothing here asks for it, or for pickle, marshal or eval."""
    for file in Path(mr.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for word in (
            "allow_pickle",
            "import pickle",
            "pickle.load",
            "marshal",
            "yaml.load",
            "shelve",
        ):
            assert word not in text, f"{file}: {word}"
    with pytest.raises(ValueError, match="pickled"):
        np.load(__file__)


POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_what_git_lfs_did_not_fetch_is_named(
    name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A clone without it holds three lines in the place of a large file (git-lfs's specification)."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / name).write_bytes(POINTER)
    read: Any = mr.load_tokenizer if name == "tokenizer.json" else mr.load_model
    with pytest.raises(mr.MespRefError, match=rf"{name}: .*a pointer of Git LFS.*git lfs pull"):
        read(folder)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_a_pointer_is_no_text_to_train_on(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(mr.MespRefError, match=r"a pointer of Git LFS"):
        open_data(tmp_path / name)
