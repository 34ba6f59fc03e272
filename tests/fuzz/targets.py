"""One function per reader: bytes to files to reader. Whatever it raises must be a MespRefError.

An input holds the files of its target, in their order, joined by SEPARATOR.
"""

import functools
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mesp_ref as mr
from mesp_ref.errors import named
from mesp_ref.files.affine import Quantization
from mesp_ref.files.checkpoint import open_checkpoint
from mesp_ref.files.config import config_fields, read_config, read_generation_config
from mesp_ref.files.gguf import Gguf
from mesp_ref.files.gguf_tokenizer import build_tokenizer, tokenizer_config
from mesp_ref.files.mlx import load_mlx_adapter
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.files.strict import read_object
from mesp_ref.files.tokenizer import load_tokenizer, read_tokenizer_config
from mesp_ref.golden.check import check
from mesp_ref.golden.page import as_html
from mesp_ref.golden.report import as_text
from mesp_ref.golden.sketch import check_sketch, load_sketch
from mesp_ref.golden.suite import Suite
from mesp_ref.job.curves import write_csv
from mesp_ref.job.directory import RunDirectory
from mesp_ref.train.chat import load_chat_template
from mesp_ref.train.data import open_data
from mesp_ref.train.rows import Cursor, Encoder, RowStream
from mesp_ref.train.trainer import TrainConfig, Trainer

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent), str(HERE.parent / "files")]

from helpers import byte_level_tokenizer  # noqa: E402
from mutate import SEPARATOR  # noqa: E402
from seeds import CONFIG, SEEDS  # noqa: E402


class Target(NamedTuple):
    """A reader, the names of the files it is given, and valid inputs to start from."""

    read: Callable[[Path], object]
    files: tuple[str, ...]
    seeds: Callable[[], list[bytes]]


def fast_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder, in memory where there is one: readers' writers sync what they write."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def run(name: str, data: bytes, folder: Path) -> str:
    """Give an input to a reader; "read" or "refused". Anything but a MespRefError comes through."""
    target = TARGETS[name]
    for file, part in zip(target.files, data.split(SEPARATOR), strict=False):
        (folder / file).write_bytes(part)
    try:
        with np.errstate(all="ignore"):  # stored numbers that another type cannot hold
            target.read(folder)
    except mr.MespRefError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 1500, message  # noqa: PT018
        message.encode()
        return "refused"
    finally:
        for file in target.files:
            (folder / file).unlink(missing_ok=True)
    return "read"


def _touch(arrays: Any) -> None:
    """Read every byte, so that a place outside the file would show."""
    for array in arrays:
        np.asarray(array).tobytes()


def _config(folder: Path) -> None:
    config = read_config(folder)
    Quantization(read_object(folder / "config.json", "an object"), "config.json")
    json.dumps(config_fields(config), allow_nan=False).encode()
    config.weight_shapes()


def _settings(folder: Path) -> None:
    read_tokenizer_config(folder)
    read_generation_config(folder)


def _safetensors(folder: Path) -> None:
    file = MappedFile(folder / "a.safetensors")
    _touch(file.raw(name) for name in file)


def _checkpoint(folder: Path) -> None:
    for optional in ("model.safetensors.index.json", "b.safetensors"):
        if (folder / optional).is_file() and not (folder / optional).stat().st_size:
            (folder / optional).unlink()
    _, weights = open_checkpoint(folder)
    _touch(table[...] for table in weights.values())
    mr.load_model(folder)


def _adapter(folder: Path) -> None:
    adapter = mr.load_adapter(folder, config=CONFIG)
    mr.save_adapter(adapter, folder / "again", overwrite=True)


def _mlx_adapter(folder: Path) -> None:
    mr.save_adapter(load_mlx_adapter(folder, config=CONFIG), folder / "peft")


def _tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer, None, (), 1 << 20)
    encoder.text("The ship sailed.\n\n é <|im_end|>", special=True)


@functools.cache
def _plain() -> Encoder:
    tokenizer = byte_level_tokenizer()
    return Encoder(tokenizer, None, (2,), tokenizer.get_vocab_size())


def _rows(folder: Path, file: str, form: str, encoder: Encoder) -> None:
    data = open_data(folder / file, seq_len=48, form=form, vocab_size=encoder.vocab_size)
    stream = RowStream(data, encoder, np.arange(data.pages), seq_len=48)
    stream.take(3)
    stream.cursor = Cursor(0, 0, 0)
    stream.require_full_row()


def _text(folder: Path) -> None:
    _rows(folder, "a.txt", "text", _plain())


def _jsonl(folder: Path) -> None:
    template = load_chat_template(folder, datetime(2026, 1, 1))
    encoder = _plain()
    _rows(folder, "a.jsonl", "jsonl",
          Encoder(encoder.tokenizer, template, encoder.ends, encoder.vocab_size))  # fmt: skip


def _golden(folder: Path) -> None:
    """A stranger's suite has the right hashes: it says what it likes and signs it."""
    sums = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}"
        for name in ("manifest.json", "case.safetensors", "wrong.safetensors")
        if (folder / name).is_file()
    ]
    (folder / "SHA256SUMS").write_text("\n".join(sums))
    suite = Suite(folder)
    suite.verify_all()
    for wrong in suite.wrong:
        suite.read_wrong(wrong)
    (folder / "answer").mkdir(exist_ok=True)
    if (folder / "answer.safetensors").is_file():
        (folder / "answer.safetensors").replace(folder / "answer" / "case.safetensors")
    report = check(folder / "answer", suite)
    text, page = as_text(report), as_html(report)
    assert all(c.isprintable() or c == "\n" for c in text + page)
    assert max(len(part) for part in text.split()) < 1500


def _sketch(folder: Path) -> None:
    rows = check_sketch(load_sketch(folder / "sketch.json"), folder / "gradients.safetensors")
    assert all(named(row["name"]).isprintable() for row in rows)
    assert all(len(row["problem"]) < 500 and row["problem"].isprintable() for row in rows)


@functools.cache
def _model() -> mr.Model:
    return mr.random_model(CONFIG)


class _NoRows:
    """Where a trainer keeps its place, without data."""

    cursor = Cursor()


def _resume(folder: Path) -> None:
    directory = RunDirectory(folder, resume=True)
    try:
        saved = directory.saved()
        if saved:
            config = TrainConfig(accumulate=1, batch_size=1)
            trainer = Trainer(
                _model(), mr.init_lora(CONFIG, rank=1, targets="q_proj"), _NoRows(), config
            )  # type: ignore[arg-type]
            trainer.restore(*saved)
            zeros = {name: np.zeros_like(w) for name, w in trainer.params.items()}
            trainer.optimizer.step(trainer.params, zeros, 0.0)
            directory.reopen(trainer.step)
        write_csv(folder / "metrics.csv", directory.metrics)
    finally:
        directory.release()


def _gguf(folder: Path) -> None:
    file = Gguf(folder / "a.gguf")
    config = file.config()
    for tensor in file.tensors(config).values():
        tensor.dequantize(0, 1)
    build_tokenizer(file)
    tokenizer_config(file)


_SOURCES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "config": (_config, ("config.json",)),
    "settings": (_settings, ("tokenizer_config.json", "generation_config.json")),
    "safetensors": (_safetensors, ("a.safetensors",)),
    "checkpoint": (
        _checkpoint,
        ("config.json", "model.safetensors", "model.safetensors.index.json", "b.safetensors"),
    ),
    "adapter": (_adapter, ("adapter_config.json", "adapter_model.safetensors")),
    "mlx_adapter": (_mlx_adapter, ("adapter_config.json", "adapters.safetensors")),
    "tokenizer": (_tokenizer, ("tokenizer.json",)),
    "text": (_text, ("a.txt",)),
    "jsonl": (_jsonl, ("tokenizer_config.json", "a.jsonl", "chat_template.jinja")),
    "golden": (
        _golden,
        ("manifest.json", "case.safetensors", "answer.safetensors", "wrong.safetensors"),
    ),
    "sketch": (_sketch, ("sketch.json", "gradients.safetensors")),
    "resume": (_resume, ("run.json", "state.safetensors", "metrics.jsonl")),
    "gguf": (_gguf, ("a.gguf",)),
}
TARGETS = {
    name: Target(read, files, SEEDS[name]) for name, (read, files) in _SOURCES.items()
}  # fmt: skip
