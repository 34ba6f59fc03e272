"""mesp-ref memory: JSON, timelines, published shapes with random weights, and bad input."""

import dataclasses
import errno
import json
import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError
from mesp_ref.files import models as loading
from mesp_ref.files.affine import Affine
from mesp_ref.files.random import write_random_checkpoint
from mesp_ref.files.writer import Writer
from mesp_ref.lean import activations as checkpoints
from mesp_ref.lean.chunks import file_size
from mesp_ref.memory import PEAKS, Schedule, Shapes, resident
from mesp_ref.memory.schedule import megabytes, need

SMALL = Qwen2Config(601, 64, 192, 2, 4, 2, 16)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small shape under a published name, and a cache of its own; returns the cache."""
    monkeypatch.setitem(loading.SHAPES, "qwen2.5-0.5b", SMALL)
    monkeypatch.setenv("MESP_REF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "random"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("base", [[], ["--bits", "4"], ["--dtype", "bfloat16"]])
def test_json_is_all_that_is_printed(base: list[str], capfd: pytest.CaptureFixture) -> None:
    command = ["memory", "qwen2.5-0.5b", "--seq-len", "40", "--measure", "--json", *base]
    assert main(command) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed.keys() == {"methods"}
    assert printed["methods"].keys() == PEAKS.keys()
    for found in printed["methods"].values():
        assert sum(found["parts"].values()) == found["predicted_peak_bytes"]
        over = found["measured_peak_bytes"] - found["predicted_peak_bytes"]
        assert 0 <= over <= 512 * 1024  # first calls fill caches of Python, NumPy and the decoder


@pytest.mark.usefixtures("small")
@pytest.mark.skipif(not resident().anonymous, reason="no /proc/self/status")
def test_memory_of_the_process_is_told_apart_from_files(capsys: pytest.CaptureFixture) -> None:
    command = ["memory", "qwen2.5-0.5b", "--method", "mesp", "--measure", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)["methods"]["mesp"]
    for kind in ("anonymous_bytes", "mapped_bytes"):
        assert 0 < found[kind]["before"] <= found[kind]["peak"]


@pytest.mark.usefixtures("small")
def test_a_system_that_does_not_tell_shows_no_zeros(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without /proc there is nothing to say about the process, rather than 0 MB."""

    def silent() -> None:
        raise FileNotFoundError("/proc/1/stat")

    command = ["memory", "qwen2.5-0.5b", "--method", "mesp", "--seq-len", "9", "--measure"]
    monkeypatch.setattr("psutil.Process", silent)
    assert main(command) == 0
    said = capsys.readouterr().out
    assert ", measured " in said
    assert "process" not in said


def test_named_weights_are_written_once_and_mapped(small: Path) -> None:
    """Matrices have the deviation asked for; a second call opens the same file."""
    for affine, folder in (
        (None, "qwen2.5-0.5b-float32"),
        (Affine(4, 32), "qwen2.5-0.5b-4bit-g32-float32"),
        (Affine(8, 64), "qwen2.5-0.5b-8bit-g64-float32"),
    ):
        model = loading.random_checkpoint("Qwen2.5-0.5B", affine=affine)
        assert model.path == small / folder
        before = (small / folder / "model.safetensors").stat()
        assert loading.random_checkpoint("qwen2.5-0.5b", affine=affine).path == model.path
        assert (small / folder / "model.safetensors").stat() == before
        w = model.weights["model.layers.1.mlp.down_proj.weight"][...]
        assert abs(w.std() / 0.02 - 1) < 0.03  # 12,288 numbers: 0.7% at one deviation
        assert abs(w.mean()) < 0.001
        assert not model.weights["model.layers.0.self_attn.q_proj.bias"][...].any()
        assert (model.weights["model.norm.weight"][...] == 1).all()


@pytest.mark.usefixtures("small")
def test_another_shape_under_the_name_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of another model, measured beside this one's prediction, would look like an error."""
    assert loading.random_checkpoint("qwen2.5-0.5b").config.num_hidden_layers == 2
    deeper = dataclasses.replace(SMALL, num_hidden_layers=3)
    monkeypatch.setitem(loading.SHAPES, "qwen2.5-0.5b", deeper)
    model = loading.random_checkpoint("qwen2.5-0.5b")
    assert model.config.num_hidden_layers == 3
    assert len(model.weights["model.layers.2.mlp.up_proj.weight"][...]) == SMALL.intermediate_size


def test_writing_takes_a_few_rows_of_memory(tmp_path: Path) -> None:
    """Far less than the largest tensor, whatever its size."""
    import tracemalloc

    config = Qwen2Config(40_000, 256, 64, 1, 2, 1, 32)  # an embedding of 41 MB
    tracemalloc.start()
    try:
        write_random_checkpoint(config, tmp_path / "model")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16e6  # a piece in float32, and once more as bytes
    embedding = mr.load_model(tmp_path / "model").weights["model.embed_tokens.weight"][...]
    assert np.isfinite(embedding).all()
    assert len({row.tobytes() for row in embedding[::4096]}) == 10  # no piece twice


@pytest.mark.usefixtures("small")
def test_a_html_timeline_needs_nothing_else(tmp_path: Path) -> None:
    """No address, no script; a drawing, a peak and a table for each method, with no NaN."""
    file = tmp_path / "timeline.html"
    methods = ("store_all", "mesp", "mesp_tiled")
    chosen = [word for method in methods for word in ("--method", method)]
    assert main(["memory", "qwen2.5-0.5b", "--seq-len", "9", *chosen, "--plot", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|<script|@import|url\(|nan", text, re.IGNORECASE)
    for method in methods:
        assert f"<h2>{method}</h2>" in text
    assert text.count("<svg") == text.count("<table") == 3
    assert len(re.findall(r">peak [\d.]+ MB in \w+", text)) == 6  # on either scale
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_drawing_shows_the_ledger() -> None:
    """The stack's sum at the peak is the ledger's peak."""
    from mesp_ref.memory import measure
    from mesp_ref.memory.timeline import timeline

    model, adapter = mr.random_model(SMALL), mr.init_lora(SMALL, rank=3, b_std=0.1)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (1, 31))
    owned = [*adapter.weights.values(), ids]
    ledger = measure(lambda: mr.loss_and_grads(model, adapter, ids, ids), owned, model.weights)
    drawn = timeline(ledger, 3)
    assert np.isclose(drawn.total[drawn.top], ledger.peak / 1e6)
    assert drawn.ops[drawn.head] == "lm_loss"


def test_the_dial_names_a_method(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["memory", "qwen2.5-3b", "--memory-limit", "64MB"]) == 0
    assert capsys.readouterr().out.startswith("mesp_tiled, activations on disk: needs ")
    assert main(["memory", "qwen2.5-3b", "--memory-limit", "64MB", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["method"], printed["checkpoints"]) == ("mesp_tiled", "offload")
    assert not small.exists()


WRONG = [
    (["qwen2.5-9b"], "no such directory, and no shape among"),
    (["qwen2.5-3b", "--rank", "0"], "--rank: found 0"),
    (["qwen2.5-3b", "--seq-len", "1"], "--seq-len: found 1"),
    (["qwen2.5-3b", "--batch-size", "-1"], "--batch-size: found -1"),
    (["qwen2.5-3b", "--targets", "head"], "head"),
    (["qwen2.5-3b", "--method", "adam"], "adam"),
    (["qwen2.5-3b", "--plot", "x.gif"], "expected a file ending in .png or .html"),
    (["qwen2.5-3b", "--bits", "3"], "--bits: bits: found 3, expected one of 4, 8"),
    (["qwen2.5-3b", "--bits", "4", "--group-size", "48"], "group_size: found 48"),
    (["qwen2.5-3b", "--group-size", "64"], "--group-size: found without --bits"),
    (["qwen2.5-3b", "--dtype", "int8"], "--dtype"),
    (["qwen2.5-3b", "--memory-limit", "1kB"], "--memory-limit: found 0.01 MB, expected at least"),
    (["qwen2.5-3b", "--memory-limit", "tiny"], "expected a size such as 64MB"),
    (["qwen2.5-3b", "--memory-limit", "1MB", "--method", "mezo"], "mezo is none"),
    (["qwen2.5-3b", "--memory-limit", "1GB", "--method", "store_all", "--checkpoints", "disk"],
     "store_all and --checkpoints disk, expected"),
    (["qwen2.5-3b", "--memory-limit", ""], "expected a size such as 64MB"),
    (["qwen2.5-3b", "--memory-limit", "1MB", "--measure"], "--memory-limit: found beside --measure"),
    (["qwen2.5-3b", "--longest", "1MB", "--plot", "x.png"], "--longest: found beside --measure or"),
    (["qwen2.5-3b", "--longest", "1MB", "--memory-limit", "1MB"], "--longest: found beside --memory"),
    (["qwen2.5-3b", "--longest", "far"], "--longest: found 'far', expected a size such as 64MB"),
    (["qwen2.5-3b", "--longest", "1MB", "--method", "mezo"], "--longest: found beside --method mezo"),
    (["qwen2.5-3b", "--method", "mesp_streamed", "--chunk", "0"], "--chunk: found 0, expected at least"),
    (["qwen2.5-3b", "--chunk", "2000000"], "--chunk: found 2000000, expected at most 1,048,576"),
    (["qwen2.5-3b", "--method", "mesp_streamed", "--checkpoints", "offload"], "only mesp_tiled"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_mistakes_are_one_line(
    words: list[str], message: str, small: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["memory", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err
    assert not small.exists()


@pytest.mark.usefixtures("small")
def test_streamed_is_in_a_file_unless_told(capsys: pytest.CaptureFixture) -> None:
    command = ["memory", "qwen2.5-0.5b", "--method", "mesp_streamed", "--seq-len", "600", "--json"]
    found = []
    for more in ([], ["--checkpoints", "disk"], ["--checkpoints", "ram"], ["--chunk", "100"]):
        assert main([*command, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["methods"]["mesp_streamed"])
    default, disk, ram, small = found
    assert default == disk
    assert default["file_bytes"] == file_size(SMALL, 600, 4)
    assert (
        small["predicted_peak_bytes"]
        < default["predicted_peak_bytes"]
        < ram["predicted_peak_bytes"]
    )
    assert "file_bytes" not in ram


@pytest.mark.usefixtures("small")
def test_the_dial_over_length(capsys: pytest.CaptureFixture) -> None:
    """Where whole rows no longer fit: chunks, with the size of the file and about how long it takes."""
    command = ["memory", "qwen2.5-0.5b", "--memory-limit", "3MB", "--seq-len", "2500"]
    assert main(command) == 0
    said = capsys.readouterr().out
    size = file_size(SMALL, 2500, 4)
    wanted = (
        rf"mesp_streamed, checkpoints on disk: needs \S+ MB of 3.00 MB, and {megabytes(size)} of a "
    )
    assert re.match(wanted + r"temporary file; about [\d.]+ (s|min|h) a step", said)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file_bytes"] == size


@pytest.mark.usefixtures("small")
def test_the_longest_sequence(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is named fits, and 256 tokens more do not: for want of memory, or of room on the disk."""
    room, limit = 10_000_000, 3_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    methods = ["--method", "mesp_tiled", "--method", "mesp_streamed", "--checkpoints", "disk"]
    command = ["memory", "qwen2.5-0.5b", "--longest", "3MB", *methods]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limit_bytes"] == limit
    assert found["schedules"][0]["method"] == "mesp_streamed"
    for row in found["schedules"]:
        schedule = Schedule(row["method"], row["checkpoints"])
        for tokens, fits in ((row["tokens"], True), (row["tokens"] + 256, False)):
            if tokens:
                shapes = Shapes(SMALL, tokens=tokens)
                size, file = need(schedule, shapes), schedule.cost(shapes).file
                assert (size <= limit and file <= room) == fits
        assert row["bound"] == ("disk" if row["method"] == "mesp_streamed" else "limit")
    plain, checkpointed = (found["torch"][name] for name in sorted(found["torch"]))
    assert plain["tokens"] == checkpointed["tokens"] == 0
    assert 0 < plain["in_all_memory"] < checkpointed["in_all_memory"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "the disk is full there" in said
    assert re.search(
        r"a step of [\d,]+ tokens by mesp_streamed, .* takes about [\d.]+ (s|min|h) here", said
    )


def test_other_weights_than_the_checkpoints_are_not_run(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    """--bits beside a dense checkpoint is a prediction; run it, and quantize is named."""
    model = str(tiny_model_dir)
    assert main(["memory", model, "--dtype", "bfloat16"]) == 0
    capsys.readouterr()
    assert main(["memory", model, "--dtype", "bfloat16", "--measure"]) == 2
    assert "mesp-ref quantize" in capsys.readouterr().err


def test_too_little_room_is_said_before_writing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["memory", "qwen2.5-0.5b", "--measure"]) == 2
    assert re.search(r"the weights need \d+ MB, found 0 MB free", capsys.readouterr().err)
    assert not small.exists()


def test_a_disk_that_fills_up_leaves_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The room was there when it was looked at, and gone in the middle of the file."""
    put, calls = Writer.put, []

    def fails(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, *args)

    monkeypatch.setattr(Writer, "put", fails)
    assert main(["memory", "qwen2.5-0.5b", "--measure"]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert not any(small.iterdir())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("place", ["disk", "offload"])
def test_a_disk_too_full_for_checkpoints(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "pwrite", full)
    command = ["memory", "qwen2.5-0.5b", "--method", "mesp_tiled", "--checkpoints", place]
    assert main([*command, "--measure"]) == 2
    said = capsys.readouterr().err
    assert "a checkpoint needs" in said
    assert said.count("\n") == 1
    assert not any(folder.iterdir())


def test_packed_tensors_of_the_wrong_size(small: Path, capsys: pytest.CaptureFixture) -> None:
    """The cache's own files are checked like any others."""
    model = loading.random_checkpoint("qwen2.5-0.5b", affine=Affine(4, 32))
    assert model.path is not None
    file = model.path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    for field, value in (("bits", 8), ("group_size", 64)):
        wrong = values | {"quantization": values["quantization"] | {field: value}}
        file.write_text(json.dumps(wrong), encoding="utf-8")
        assert main(["memory", str(model.path)]) == 2
        said = capsys.readouterr().err
        assert "shape: found" in said
        assert said.count("\n") == 1


def test_groups_that_fill_no_row(tmp_path: Path) -> None:
    with pytest.raises(MespRefError, match="group_size: found 128, expected a divisor of 96"):
        write_random_checkpoint(
            Qwen2Config(64, 96, 96, 1, 3, 3, 32), tmp_path / "m", affine=Affine(4, 128)
        )
    assert not any(tmp_path.iterdir())
