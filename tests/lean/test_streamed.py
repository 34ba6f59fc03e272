"""mesp_streamed beside mesp_tiled and mesp, and what its chunks and its file are."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref import lean, ops
from mesp_ref.api import rows_at_once, step_shapes
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.model import shift
from mesp_ref.engine.positions import layers
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.job.finetune import FinetuneOptions, finetune
from mesp_ref.lean.activations import DiskCheckpoints, check_room
from mesp_ref.lean.chunks import Rooms, chunks, file_size, stream
from mesp_ref.lean.score import score
from mesp_ref.registry import OPS, Sizes
from mesp_ref.train.trainer import TrainConfig

SIZES = Sizes(n=2, t=11, past=7, c=13, g=2, share=3, d=6, f=17, v=29, r=3)


@pytest.mark.parametrize("tile", [1, 4, 64])
@pytest.mark.parametrize("keys", [1, 3, 7, 64])
@pytest.mark.parametrize("row", ["attention", "packed_attention"])
def test_attention_does_not_depend_on_its_tiles(row: str, keys: int, tile: int) -> None:
    """A chunk that sees earlier keys, and rows of several documents: as the plain op has them."""
    given = OPS[row].sample(np.random.default_rng(0), SIZES, np.float64)
    do = np.random.default_rng(1).standard_normal(given["q"].shape)
    options = {"first": given["first"], "tile": tile, "keys": keys}
    (o, res), (expected, plain) = lean.streamed_attention(**given, tile=tile, keys=keys), ops.attention(
        **given
    )  # fmt: skip
    np.testing.assert_allclose(o, expected, rtol=0, atol=1e-14)
    found = lean.streamed_attention_bwd(do, res, **options)
    for got, wanted in zip(found, ops.attention_bwd(do, plain), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)


def test_keys_of_other_documents_are_not_read() -> None:
    """A chunk whose documents begin in it, or in the last of the earlier tiles: NaN elsewhere."""
    rng, seen = np.random.default_rng(0), 40
    q, do = rng.standard_normal((2, 1, 12, 4, 6))
    k, v = rng.standard_normal((2, 1, 60, 2, 6))
    first = np.full((1, 12), seen + 5)
    first[:, 7:] = 55
    k[:, :seen], v[:, :seen] = np.nan, np.nan
    o, res = lean.streamed_attention(q, k, v, first=first, tile=3, keys=20)
    dq, dk, dv = lean.streamed_attention_bwd(do, res, first=first, tile=3, keys=20)
    assert all(np.isfinite(x).all() for x in (o, dq, dk, dv))
    assert not dk[:, : seen + 5].any()
    assert not dv[:, : seen + 5].any()


def case(dtype: str, shape: tuple[int, int], **changed: Any) -> tuple[Any, ...]:
    """A model with an adapter, and a batch of which some labels are ignored."""
    config = Qwen2Config(
        **{
            "vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
        }
        | changed
    )  # fmt: skip
    model = mr.random_model(config, dtype=dtype, std=0.2)
    adapter = mr.init_lora(config, rank=3, b_std=0.2, dtype=dtype)
    ids = np.random.default_rng(0).integers(0, 53, shape)
    return model, adapter, ids, np.where(np.arange(shape[1]) % 5 == 1, -100, ids)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("shape", "tied", "trainable"),
    [((2, 11), True, "lora"), ((3, 70), False, "all"), ((1, 300), True, "all")],
)
@pytest.mark.parametrize("documents", [False, True])
def test_one_chunk_has_the_bits_of_mesp_tiled(
    dtype: str, workers: int, shape: tuple[int, int], tied: bool, trainable: str, documents: bool
) -> None:
    """One, and several uneven, tiles of queries; loss, and gradients of LoRA and base weights."""
    given = case(dtype, shape, tie_word_embeddings=tied)
    positions = np.tile(np.arange(shape[1]) % 37, (shape[0], 1)) if documents else None
    options = {"trainable": trainable, "workers": workers, "position_ids": positions}
    loss, grads = mr.loss_and_grads(*given, method="mesp_tiled", **options)
    for chunk in (shape[0] * shape[1], 4096):
        again, found = mr.loss_and_grads(*given, method="mesp_streamed", chunk=chunk, **options)
        assert again == loss
        assert found.keys() == grads.keys()
        for name, expected in grads.items():
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("chunk", [1, 4, 11, 25, 30])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_several_chunks_agree_with_mesp(
    chunk: int, place: str, documents: bool, workers: int
) -> None:
    """Every gradient of LoRA and base weights, in float64 to 1e-12 of its largest entry."""
    given = case("float64", (3, 11), tie_word_embeddings=place == "ram")
    positions = np.tile([*range(4), 0, *range(6)], (3, 1)) if documents else None
    options = {"trainable": "all", "position_ids": positions}
    loss, grads = mr.loss_and_grads(*given, method="mesp", **options)
    again, found = mr.loss_and_grads(
        *given, method="mesp_streamed", chunk=chunk, checkpoints=place, workers=workers, **options
    )
    assert abs(again - loss) <= 1e-14 * loss
    assert found.keys() == grads.keys()
    for name, expected in grads.items():
        limit = 1e-12 * np.abs(expected).max()  # measured: 2e-14
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=limit, err_msg=name)


def test_a_packed_base_in_chunks(tmp_path: Path) -> None:
    """Weights of 4 bits, decoded once a chunk: one has the bits of mesp_tiled, several its values."""
    model, adapter, ids, labels = case("float32", (2, 30), hidden_size=64, intermediate_size=96)
    save_checkpoint(model.config, model.weights, tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", 4, 32)
    given = mr.load_model(tmp_path / "packed"), adapter, ids, labels
    loss, grads = mr.loss_and_grads(*given, method="mesp_tiled")
    assert mr.loss_and_grads(*given, method="mesp_streamed")[0] == loss
    _, one = mr.loss_and_grads(*given, method="mesp_streamed", workers=1)
    _, several = mr.loss_and_grads(*given, method="mesp_streamed", chunk=8)
    for name, expected in grads.items():
        np.testing.assert_array_equal(one[name], expected, err_msg=name)
        limit = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(several[name], expected, rtol=0, atol=limit, err_msg=name)


def test_a_chunk_is_larger_where_weights_are_decoded(tmp_path: Path) -> None:
    """Once a chunk; and where several workers share it."""
    model, *_ = case("float32", (1, 2), hidden_size=64, intermediate_size=96)
    save_checkpoint(model.config, model.weights, tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", 4, 32)
    for folder, workers, expected in (
        ("dense", 1, 256), ("dense", 2, 512), ("packed", 1, 512), ("packed", 3, 768),
    ):  # fmt: skip
        found = mr.load_model(tmp_path / folder)
        assert rows_at_once(found, workers) == expected
        adapter = mr.init_lora(found.config, rank=2)
        assert step_shapes(found, adapter, 1, 10_000, workers).at_once == expected


def test_rows_without_a_label() -> None:
    """A chunk of which nothing counts adds nothing; where nothing counts at all the loss is 0."""
    model, adapter, ids, labels = case("float64", (1, 12))
    labels[:, 4:9] = -100
    loss, grads = mr.loss_and_grads(model, adapter, ids, labels, method="mesp")
    again, found = mr.loss_and_grads(model, adapter, ids, labels, method="mesp_streamed", chunk=4)
    assert again == pytest.approx(loss, rel=1e-14)
    assert all(np.abs(found[n] - g).max() <= 1e-12 * np.abs(g).max() for n, g in grads.items())
    nothing = np.full_like(labels, -100)
    loss, grads = mr.loss_and_grads(model, adapter, ids, nothing, method="mesp_streamed", chunk=4)
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize(
    ("shape", "rows"), [((1, 10), 3), ((4, 5), 5), ((5, 4), 9), ((2, 3), 100), ((3, 7), 1)]
)
def test_chunks_are_all_rows_once(shape: tuple[int, int], rows: int) -> None:
    """In the order of the tokens; whole sequences, or tokens of one, whose rows stand side by side."""
    numbers = np.arange(shape[0] * shape[1]).reshape(shape)
    parts = [numbers[at] for at in chunks(shape, rows)]
    assert max(part.size for part in parts) <= rows
    assert all(part.flags.c_contiguous for part in parts)
    np.testing.assert_array_equal(
        np.concatenate([p.ravel() for p in parts]), np.arange(numbers.size)
    )


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rows", [3, 5, 24])
def test_a_chunk_has_the_angles_and_targets_of_its_rows(documents: bool, rows: int) -> None:
    """Those of the whole batch, cut: to the bit."""
    model, adapter, _, labels = case("float32", (2, 12))
    positions = (
        np.array([[*range(7), 0, *range(4)], [*range(2), *range(10)]]) if documents else None
    )
    whole = layers(model, adapter, 0, 12, positions)[1]
    expected = shift(labels if positions is None else np.where(positions == 0, -100, labels))
    found = stream(model, adapter, labels, positions, DiskCheckpoints(), rows)
    for at in found.chunks:
        part, cut = found.layer(1, at), at if documents else at[1:]
        assert part.number == 1
        np.testing.assert_array_equal(part.cos, whole.cos[cut])
        np.testing.assert_array_equal(part.sin, whole.sin[cut])
        np.testing.assert_array_equal(found.labels(at), expected[at])
        if documents:
            np.testing.assert_array_equal(part.first, whole.first[at])
        else:
            assert part.first is None


def traced(given: tuple[Any, ...], tokens: int) -> int:
    """tracemalloc's peak of a step over the first tokens."""
    model, adapter, ids, labels = given
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        mr.loss_and_grads(
            model, adapter, ids[:, :tokens], labels[:, :tokens], method="mesp_streamed", chunk=128,
            on_gradients=lambda layer, grads: None,
        )  # fmt: skip
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_memory_is_flat_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: three times as many tokens take no more than a twentieth more, Python included."""
    given = case(
        "float32", (1, 900), hidden_size=256, intermediate_size=512, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    monkeypatch.setattr(sys.modules["mesp_ref.lean.streamed_attention"], "KEYS", 128)
    traced(given, 256)  # caches of Python and NumPy fill once
    short, long = traced(given, 300), traced(given, 900)
    assert long <= 1.05 * short


def test_the_file_is_as_large_as_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for before the first chunk is what the step then takes, to the byte."""
    asked, taken = [], []
    monkeypatch.setattr(DiskCheckpoints, "need", lambda stack, size: asked.append(size))
    real = DiskCheckpoints._reserve
    monkeypatch.setattr(
        DiskCheckpoints, "_reserve", lambda stack, size: (taken.append(size), real(stack, size))[1]
    )
    for workers in (1, 2):
        asked.clear(), taken.clear()
        model, *rest = case("float64", (2, 11))
        mr.loss_and_grads(model, *rest, method="mesp_streamed", chunk=4, workers=workers)
        assert asked == [sum(taken)] == [file_size(model.config, 22, 8)]


def test_no_room_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the number, and before anything is written."""
    given = case("float32", (1, 50))
    size = file_size(given[0].config, 50, 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    monkeypatch.setattr(DiskCheckpoints, "_reserve", lambda *_: pytest.fail("written"))
    with pytest.raises(mr.MespRefError, match=f"found {size - 1} bytes free, expected {size} for"):
        mr.loss_and_grads(*given, method="mesp_streamed")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    check_room(size)


def test_a_run_says_so_before_it_evaluates(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    options = FinetuneOptions(
        model=str(tiny_model_dir), data=str(text_file), out=str(tmp_path / "run"), rank=2,
        train=TrainConfig(method="mesp_streamed", steps=1, seq_len=64),
    )  # fmt: skip
    with pytest.raises(mr.MespRefError, match="found 10000 bytes free, expected") as refused:
        finetune(options, told.append)
    assert "\n" not in str(refused.value)
    assert not [event for event in told if event.get("event") in ("eval", "step")]
    assert not (tmp_path / "run").exists()


FILLS_UP = """
import resource, sys
import mesp_ref.lean.activations as activations
activations._ROOM = 4096
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from mesp_ref.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file")
def test_a_file_that_fills_up_in_the_middle(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """A real write that fails after many that did not: one line, exit 2, nothing left in TMPDIR."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [
        "finetune", "--model", tiny_model_dir, "--data", text_file, "--method", "mesp_streamed",
        "--rank", "2", "--steps", "1", "--seq-len", "512", "--batch-size", "8", "--chunk", "64",
        "--accumulate", "1", "--no-sample", "--eval-rows", "0", "--quiet", "--out", tmp_path / "run",
    ]  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-c", FILLS_UP, *map(str, command)], capture_output=True, text=True,
        check=False, env=os.environ | {"TMPDIR": str(scratch)},
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    assert re.fullmatch(
        r"[^\n]*: a checkpoint needs \d+ bytes: File too large; [^\n]*\n", found.stderr
    )
    assert not any(scratch.iterdir())


@pytest.mark.parametrize("failing", [1, 2, 9])
def test_a_write_that_fails_is_one_line(
    failing: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whichever write it is; with workers, too, and nothing is left."""
    from mesp_ref.lean import activations

    real, calls = activations.os.pwrite, [0]

    def pwrite(*args: Any) -> int:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(activations.os, "pwrite", pwrite)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(mr.MespRefError, match=r"a checkpoint needs .* No space left") as refused:
        mr.loss_and_grads(*case("float32", (2, 30)), method="mesp_streamed", chunk=7, workers=2)
    assert "\n" not in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_rooms_are_written_and_read_in_pieces() -> None:
    rng = np.random.default_rng(0)
    with DiskCheckpoints() as stack:
        rooms, arrays = (
            Rooms(stack, (2, 9)),
            {name: rng.standard_normal((2, 9, 3)) for name in "xk"},
        )
        for at in chunks((2, 9), 4):
            for name, array in arrays.items():
                rooms.write(name, at, array[at])
        for name, array in arrays.items():
            np.testing.assert_array_equal(rooms.whole(name)[:], array)
            assert not rooms.whole(name)[0, 2:5].flags.writeable
        rooms.clear("k", slice(1, 2), arrays["k"][1:, :4])
        assert not rooms.read("k", (slice(1, 2), slice(0, 9))).any()
        np.testing.assert_array_equal(rooms.whole("k")[0], arrays["k"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk: found 0, expected 1 to 1048576 rows"),
        ({"chunk": -3}, "chunk: found -3, expected 1 to"),
        ({"chunk": 2**20 + 1}, "chunk: found 1048577, expected 1 to"),
        ({"chunk": 8, "method": "mesp"}, "chunk: found 8 with mesp, expected none"),
        (
            {"checkpoints": "offload"},
            "found 'offload' with mesp_streamed, expected 'ram' or 'disk'",
        ),
    ],
)
def test_impossible_chunks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mr.MespRefError, match=re.escape(message)):
        mr.loss_and_grads(*case("float32", (1, 5)), **{"method": "mesp_streamed"} | options)


@pytest.mark.parametrize("documents", [False, True])
def test_an_evaluation_in_chunks(documents: bool) -> None:
    """The loss and the hits of one that holds all rows."""
    model, adapter, ids, labels = case("float64", (3, 11))
    positions = np.tile([*range(4), 0, *range(6)], (3, 1)) if documents else None
    loss, right = score(model, adapter, ids, labels, positions)
    for chunk in (2, 7, 25):
        again, hits = score(model, adapter, ids, labels, positions, chunk=chunk)
        assert again == pytest.approx(loss, rel=1e-13)
        assert hits == right
    assert score(model, adapter, ids, labels, positions, chunk=33) == (loss, right)
