"""Killed, full, read-only, shared, changed underneath: every fault leaves the last good state."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.job.directory import RunDirectory, write_json
from mesp_ref.job.finetune import FinetuneOptions, finetune
from mesp_ref.job.lock import DirectoryLock
from mesp_ref.job.state import load_state, save_state
from mesp_ref.lean.activations import DiskCheckpoints
from mesp_ref.train.trainer import TrainConfig
from mesp_ref.verify.samples import sample_batch, sample_model, small_config

resource = pytest.importorskip("resource")
HERE = Path(__file__).parents[1]
CONFIG = small_config(vocab_size=512, hidden_size=64, intermediate_size=64)


# SIGKILL


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_sigkill_while_saving_loses_nothing_that_was_saved(kills: int) -> None:
    command = [sys.executable, str(HERE / "faults.py"), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["lost"] == 0
    assert found["kills"] == kills
    assert kills < 100 or found["in_the_middle_of_a_file"] > 10  # else nothing was tried


# A full disk


@contextlib.contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a disk that is full; Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def numbers(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full((64, 64), value, np.float32)}


def adapter_of(value: float) -> mr.Adapter:
    adapter = mr.init_lora(CONFIG, rank=8)
    for array in adapter.weights.values():
        array[...] = value
    return adapter


def long_ago(file: Path) -> None:
    """Set a file's time back: a clock that ticks every 10 ms would hide a change made at once."""
    os.utime(file, (1e9, 1e9))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


Write = Callable[[Path, float], object]
WRITERS: dict[str, Write] = {
    "state": lambda folder, v: save_state(folder / "state", numbers(v), {"step": v}),
    "adapter": lambda folder, v: mr.save_adapter(adapter_of(v), folder / "adapter"),
    "json": lambda folder, v: write_json(folder / "a.json", [v] * 10_000),
    "checkpoint": lambda folder, v: save_checkpoint(
        CONFIG, {n: np.full(s, v, "f4") for n, s in CONFIG.weight_shapes().items()}, folder / "m"
    ),
    "merge": lambda folder, v: mr.merge(
        sample_model(np.random.default_rng(0), CONFIG, "float32"), adapter_of(v), folder / "merged",
        overwrite=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("room", [0, 1000, 10_000])
def test_a_full_disk_keeps_the_old_files(name: str, room: int, tmp_path: Path) -> None:
    WRITERS[name](tmp_path, 1.0)
    before = everything(tmp_path)
    with full_after(room), pytest.raises(mr.MespRefError, match="cannot be written") as caught:
        WRITERS[name](tmp_path, 2.0)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert everything(tmp_path) == before


def test_a_full_disk_while_quantising_leaves_nothing(tmp_path: Path) -> None:
    WRITERS["checkpoint"](tmp_path, 1.0)
    with full_after(1000), pytest.raises(mr.MespRefError, match="cannot be written"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "q")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("room", [1000, 1 << 27])
def test_a_full_disk_refuses_a_block_checkpoint(room: int, tmp_path: Path) -> None:
    """With room for the first ones only; what was kept before is what it was, nothing is left."""
    array, kept = np.arange(1 << 22, dtype=np.float32), []
    needs = pytest.raises(mr.MespRefError, match="a checkpoint needs 16777216 bytes")
    with DiskCheckpoints(tmp_path) as stack, full_after(room), needs:
        for _ in range(9):
            kept.append(stack.keep(array))
    assert len(kept) == room // array.nbytes
    assert all(np.array_equal(twin, array) for twin in kept)
    assert not any(tmp_path.iterdir())


def test_twins_on_disk_are_their_arrays(tmp_path: Path) -> None:
    """Of any type, shape and order in memory, kept by two threads at once, and read-only."""
    rng = np.random.default_rng(0)
    shapes = [(3,), (1 << 14,), (70_001,), (5, 7, 2), (), (0, 4)]
    arrays = [rng.standard_normal(shape) for shape in shapes for _ in range(20)]
    arrays += [a.astype(np.complex128) for a in arrays] + [a.astype(np.float32).T for a in arrays]
    with DiskCheckpoints(tmp_path) as stack, ThreadPoolExecutor(2) as pool:
        twins = list(pool.map(stack.keep, arrays))
    for array, twin in zip(arrays, twins, strict=True):
        assert twin.dtype == array.dtype
        np.testing.assert_array_equal(twin, array)
        assert not twin.flags.writeable


def test_a_write_of_fewer_bytes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, array = os.pwrite, np.arange(100, dtype=np.float64)
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:7], at))
    with DiskCheckpoints(tmp_path) as stack:
        np.testing.assert_array_equal(stack.keep(array), array)


def test_after_a_piece_that_found_no_room_the_next_array_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first, small = np.arange(10.0), np.full(8, 7.0)
    with DiskCheckpoints(tmp_path) as stack:
        twin = stack.keep(first)
        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", full)
            with pytest.raises(mr.MespRefError, match="No space left"):
                stack.keep(np.ones(1 << 24))
        np.testing.assert_array_equal(stack.keep(small), small)
        np.testing.assert_array_equal(twin, first)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["disk", "offload"])
def test_a_step_that_fails_leaves_no_file(
    kind: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while its exception is looked at."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = small_config()
    model, adapter = mr.random_model(config), mr.init_lora(config, rank=2)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 40))

    def interrupt(layer: int, grads: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        mr.loss_and_grads(
            model, adapter, ids, ids, method="mesp_tiled", checkpoints=kind, workers=workers,
            on_gradients=interrupt,
        )  # fmt: skip
    assert caught.value is not None
    held = [str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
    assert not [path for path in held if str(tmp_path) in path]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


# A run on a small model


@pytest.fixture
def options(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> FinetuneOptions:
    train = TrainConfig(steps=6, seq_len=16, accumulate=1)
    return FinetuneOptions(
        model=str(tiny_model_dir), data=str(text_file), out=str(tmp_path / "run"), train=train,
        save_every=2, sample_tokens=0, rank=2,
    )  # fmt: skip


def at(kind: str, step: int, act: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    """A report function that acts once, when an event comes."""

    def report(event: dict[str, Any]) -> None:
        if (event["event"], event.get("step")) == (kind, step):
            act()

    return report


def test_a_disk_that_fills_up_in_a_run_keeps_the_last_save(
    options: FinetuneOptions, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        fill = at("step", 3, lambda: stack.enter_context(full_after(2000)))
        with pytest.raises(mr.MespRefError, match="cannot be written"):
            finetune(options, fill)
    arrays, facts = load_state(tmp_path / "run" / "state.safetensors")
    assert facts["step"] == 2
    adapter = mr.load_adapter(tmp_path / "run" / "adapter")
    for name, array in adapter.weights.items():
        np.testing.assert_array_equal(array, arrays[f"param/{name}"])
    finetune(options.__class__(**vars(options) | {"resume": True}))
    assert load_state(tmp_path / "run" / "state.safetensors")[1]["step"] == 6


# Places that cannot be written


def test_a_file_where_the_directory_should_be(options: FinetuneOptions, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(mr.MespRefError, match="--out: found a file, expected a directory"):
        finetune(options)
    below = options.__class__(**vars(options) | {"out": str(tmp_path / "run" / "deeper")})
    with pytest.raises(mr.MespRefError, match="cannot be written"):
        finetune(below)
    assert (tmp_path / "run").read_text() == "mine"
    for write in WRITERS.values():
        with pytest.raises(mr.MespRefError, match="cannot be written"):
            write(tmp_path / "run" / "deeper", 1.0)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder without write permission; as root, who has it always, a read-only mount."""
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    if shutil.which("mount") is None:
        pytest.skip("root writes to every directory, and there is no mount here")
    mounts = (["--bind", str(folder), str(folder)], ["-o", "remount,ro,bind", str(folder)])
    for arguments in mounts:
        if subprocess.run(["mount", *arguments], capture_output=True).returncode:
            subprocess.run(["umount", str(folder)], capture_output=True)
            pytest.skip("root writes to every directory, and read-only mounts are not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_directory(options: FinetuneOptions, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    WRITERS["state"](place, 1.0)
    with read_only(place):
        with pytest.raises(mr.MespRefError, match="cannot be written"):
            WRITERS["state"](place, 2.0)
        with pytest.raises(mr.MespRefError, match="cannot be written"):
            finetune(options.__class__(**vars(options) | {"out": str(place / "run")}))
        assert load_state(place / "state")[1] == {"step": 1.0}


# Two runs in one directory


def test_the_second_run_is_told_who_has_the_directory(
    options: FinetuneOptions, tmp_path: Path
) -> None:
    """While a run is at step 3, another process cannot start there, resume there or overwrite it."""
    told: list[str] = []

    def second() -> None:
        for flag in ("--overwrite", "--resume"):
            command = [sys.executable, "-m", "mesp_ref", "finetune", "--model", str(options.model),
                       "--data", str(options.data), "--out", str(options.out), flag]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 2
            told.append(done.stderr)

    finetune(options, at("step", 3, second))
    for text in told:
        assert f"in use by process {os.getpid()} since 20" in text
        assert text.count("\n") == 1
    assert len(told) == 2
    assert not (tmp_path / "run" / ".lock").exists()
    finetune(options.__class__(**vars(options) | {"overwrite": True}))


def test_a_dead_process_blocks_nobody(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mesp_ref.job.lock import DirectoryLock\n"
        "lock = DirectoryLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(mr.MespRefError, match=f"in use by process {holder.pid} since 20"):
        DirectoryLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / ".lock").exists()
    DirectoryLock(tmp_path).release()
    assert not (tmp_path / ".lock").exists()


def test_a_directory_that_filled_up_meanwhile_is_not_cleared(tmp_path: Path) -> None:
    """Two runs look at a place that does not exist yet; the one that is late gives way."""
    late, early = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    early.create({})
    with pytest.raises(mr.MespRefError, match="in use by process"):
        late.create({})
    early.release()
    with pytest.raises(mr.MespRefError, match="exists and is not empty"):
        late.create({})
    assert early.file("run.json").is_file()
    late.release()


# Weights that change while they are mapped


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    other.replace(file)


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write(b"\1" * 8)


CHANGES = (truncate, replace, overwrite, Path.unlink)


@pytest.fixture(params=["dense", "packed"])
def mapped(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = sample_model(np.random.default_rng(0), CONFIG, "float32")
    save_checkpoint(CONFIG, model.weights, tmp_path / "dense")
    if request.param == "packed":
        quantize_checkpoint(tmp_path / "dense", tmp_path / "packed")
    folder = tmp_path / str(request.param)
    long_ago(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_weights_that_change_in_use_stop_the_next_request(
    mapped: Path, change: Callable[[Path], object]
) -> None:
    model, file = mr.load_model(mapped), mapped / "model.safetensors"
    ids, labels = sample_batch(np.random.default_rng(1), CONFIG)
    mr.loss(model, None, ids, labels)
    change(file)
    for method in ("mesp", "mesp_tiled", "mesp_streamed", "mezo"):
        adapter = mr.init_lora(CONFIG, rank=2)
        with pytest.raises(mr.MespRefError, match=r"model\.safetensors: changed while in use"):
            mr.loss_and_grads(model, adapter, ids, labels, method=method)
    with pytest.raises(mr.MespRefError, match=r"model\.safetensors: changed while in use"):
        mr.logits(model, ids)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_run_whose_weights_change_keeps_the_last_save(
    options: FinetuneOptions, tiny_model_dir: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in tiny_model_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    long_ago(copy / "model.safetensors")
    options = options.__class__(**vars(options) | {"model": str(copy)})
    with pytest.raises(mr.MespRefError, match="changed while in use"):
        finetune(options, at("step", 3, lambda: change(copy / "model.safetensors")))
    arrays, facts = load_state(tmp_path / "run" / "state.safetensors")
    assert facts["step"] == 2
    for name, array in mr.load_adapter(tmp_path / "run" / "adapter").weights.items():
        np.testing.assert_array_equal(array, arrays[f"param/{name}"])


def test_a_process_may_move_while_it_uses_a_model(
    mapped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mapped.parent)
    model = mr.load_model(mapped.name)
    monkeypatch.chdir("/")
    assert np.isfinite(mr.logits(model, [[1, 2]])).all()


def test_data_that_changes_in_use_stops_the_run(options: FinetuneOptions, tmp_path: Path) -> None:
    from mesp_ref.train.data import open_data

    long_ago(Path(str(options.data)))
    data = open_data(str(options.data))
    text = data.path.read_bytes()
    data.path.write_bytes(text[::-1])
    with pytest.raises(mr.MespRefError, match="changed while in use"):
        data.read(0)
