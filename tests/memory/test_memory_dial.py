"""The memory dial: the order is arithmetic, the choice fits, and what fits is kept."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.api import choose_schedule, step_shapes
from mesp_ref.cli import main
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import random_arrays
from mesp_ref.errors import MespRefError
from mesp_ref.job.finetune import FinetuneOptions, finetune
from mesp_ref.job.limit import within
from mesp_ref.lean.activations import DiskCheckpoints
from mesp_ref.memory import (
    SCHEDULES,
    Schedule,
    Shapes,
    choose,
    cost,
    megabytes,
    need,
    parse_size,
    resident,
)
from mesp_ref.memory.schedule import OVERHEAD, by_speed, held_gradients
from mesp_ref.train.trainer import TrainConfig, Trainer

CONFIG = Qwen2Config(1301, 96, 704, 4, 6, 2, 16)
HALF_B = Qwen2Config(151936, 896, 4864, 24, 14, 2, 64)
STORE_ALL, TILED_DISK = Schedule("store_all", "ram"), Schedule("mesp_tiled", "disk")
OFFLOAD = Schedule("mesp_tiled", "offload")


class Counting(np.ndarray):
    """An array that counts the multiply-adds of every matrix product that it takes part in."""

    flops = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc is np.matmul:
            a, b = inputs
            stack = math.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
            Counting.flops += 2 * stack * a.shape[-2] * a.shape[-1] * b.shape[-1]
        out = kwargs.get("out")
        if out is not None:
            kwargs["out"] = tuple(map(_plain, out))
        kwargs = {name: _plain(value) for name, value in kwargs.items()}
        result = getattr(ufunc, method)(*map(_plain, inputs), **kwargs)
        if out is not None:
            return out[0]
        return result.view(Counting) if isinstance(result, np.ndarray) else result

    def __array_function__(self, *given: Any) -> Any:
        """New arrays `like` this one count, too."""
        result = super().__array_function__(*given)
        return result.view(Counting) if type(result) is np.ndarray else result


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, Counting) else value


@pytest.mark.parametrize("targets", ["all", ("q_proj", "down_proj"), ("gate_proj", "o_proj")])
@pytest.mark.parametrize(
    ("config", "batch", "tokens"),
    [
        (Qwen2Config(301, 96, 352, 3, 6, 2, 16), 1, 97),
        (Qwen2Config(401, 96, 704, 2, 3, 3, 32, tie_word_embeddings=False), 3, 50),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_flops_are_the_multiply_adds_of_a_step(
    schedule: Schedule, config: Qwen2Config, batch: int, tokens: int, targets: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    keep = DiskCheckpoints.keep
    monkeypatch.setattr(DiskCheckpoints, "keep", lambda *given: keep(*given).view(Counting))
    arrays = {name: array.view(Counting) for name, array in random_arrays(config).items()}
    adapter = mr.init_lora(config, rank=4, b_std=0.1, targets=targets)
    adapter.weights = {name: array.view(Counting) for name, array in adapter.weights.items()}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens))
    Counting.flops = 0
    mr.loss_and_grads(
        mr.Model(config, arrays), adapter, ids, ids,
        method=schedule.method, checkpoints=schedule.checkpoints,
    )  # fmt: skip
    shapes = schedule.shapes(Shapes(config, batch, tokens, 4, adapter.targets))
    assert Counting.flops == cost(schedule.method, shapes).flops


def test_the_order_at_a_published_shape() -> None:
    """One forward and backward is least, then with a file for what it keeps; tiles recompute less
    than a whole block does."""
    ranked = by_speed(Shapes(HALF_B))
    assert ranked[:3] == [STORE_ALL, OFFLOAD, TILED_DISK]
    assert {s.method for s in ranked[-2:]} == {"mesp"}  # q, k, v a third time


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MB", 64_000_000), ("64MiB", 2**26), ("1.5 GB", 1_500_000_000), ("123456", 123456),
        ("10kB", 10_000), ("2KiB", 2048), ("7b", 7), ("64mb", 64_000_000), (999, 999),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


WRONG = ["", "MB", "-5MB", "0", "64M", "64 MBs", "1e9", "nan", "inf", "٦٤MB", "64MB;", "9" * 60]


@pytest.mark.parametrize("text", WRONG)
def test_malformed_sizes_name_the_option(text: str) -> None:
    with pytest.raises(MespRefError, match=r"^--memory-limit: found .*, expected a size such as"):
        parse_size(text, "--memory-limit")


@pytest.mark.parametrize("hold", [False, True])
def test_the_fastest_that_fits(hold: bool) -> None:
    """For each need, one byte more or less decides; below the least it is refused by name."""
    shapes = Shapes(CONFIG, 1, 97, 4)
    ranked = by_speed(shapes)
    needs = [need(s, shapes, hold_gradients=hold) for s in ranked]
    for limit in sorted({size + by for size in needs for by in (-1, 0, 1)}):
        fits = [s for s, size in zip(ranked, needs, strict=True) if size <= limit]
        if fits:
            choice = choose(shapes, limit, hold_gradients=hold)
            assert choice.schedule == fits[0]
            assert choice.need <= limit
        else:
            with pytest.raises(MespRefError, match=f"at least {min(needs)} bytes") as refused:
                choose(shapes, limit, hold_gradients=hold)
            assert str(ranked[needs.index(min(needs))]) in str(refused.value)


def test_held_gradients_are_said_and_counted() -> None:
    """0.5B, rank 8 on seven projections: 17.6 MB of LoRA gradients."""
    shapes = Shapes(HALF_B)
    assert round(held_gradients(shapes) / 1e6, 1) == 17.6
    assert need(TILED_DISK, shapes, hold_gradients=True) - need(TILED_DISK, shapes) == (
        held_gradients(shapes)
    )
    assert "LoRA gradients held" in str(choose(shapes, 64_000_000, hold_gradients=True))


class _Rows:
    """Rows of random tokens without end."""

    cursor = None

    def take(self, count: int) -> list[Any]:
        from mesp_ref.train.rows import Row

        rng = np.random.default_rng(0)
        ids = [rng.integers(0, CONFIG.vocab_size, 97) for _ in range(count)]
        return [Row(row, row) for row in ids]


def _traced(trainer: Trainer) -> int:
    """tracemalloc's peak of a step above what stood before it."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        trainer.advance()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "train",
    [
        {"clip": 0.0, "accumulate": 1},
        {"clip": 1.0, "accumulate": 1},
        {"clip": 1.0, "accumulate": 3},
    ],
    ids=["per block", "clipped", "accumulated"],
)
def test_a_step_of_the_trainer_keeps_the_need(schedule: Schedule, train: dict[str, Any]) -> None:
    """Whatever the schedule: the optimiser's state stands before the step that is measured."""
    config = TrainConfig(
        method=schedule.method, checkpoints=schedule.checkpoints, seq_len=97, **train
    )
    model = mr.random_model(CONFIG)
    adapter = mr.init_lora(CONFIG, rank=4, b_std=0.1)
    trainer = Trainer(model, adapter, _Rows(), config)  # type: ignore[arg-type]
    trainer.advance()
    shapes = Shapes(CONFIG, 1, 97, 4, adapter.targets)
    limit = need(schedule, shapes, hold_gradients=not config.per_block)
    traced = _traced(trainer)
    assert traced <= limit
    assert traced >= 0.5 * (limit - OVERHEAD)  # and the need is no empty bound


@pytest.mark.parametrize("limit", ["1.6MB", "3MB", "6MB", "64MB"])
def test_a_limit_is_kept(limit: str) -> None:
    train = TrainConfig(clip=0.0, accumulate=1, seq_len=97)
    model = mr.random_model(CONFIG)
    adapter = mr.init_lora(CONFIG, rank=4, b_std=0.1)
    train, choice = within(limit, train, model, adapter)
    assert (train.method, train.checkpoints) == choice.schedule
    trainer = Trainer(model, adapter, _Rows(), train)  # type: ignore[arg-type]
    trainer.advance()
    assert _traced(trainer) <= parse_size(limit)


_LIMITED = """
import resource, sys
import numpy as np
import mesp_ref as mr
from mesp_ref.memory import resident
from mesp_ref.job.finetune import FinetuneOptions
from mesp_ref.job.finetune import finetune
from mesp_ref.train.trainer import TrainConfig
model, data, out, limit, spare, method = sys.argv[1:]
x = np.ones((512, 512), np.float32) @ np.ones((512, 512), np.float32)  # BLAS takes its buffers
import mesp_ref.job.curves, matplotlib.figure
from matplotlib.backends import backend_agg
train = TrainConfig(steps=3, seq_len=97, batch_size=4, clip=0.0, accumulate=1, optimizer="sgd",
                    **({"method": method} if method != "dial" else {}))
most = resident().data + int(limit) + int(spare)
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
options = FinetuneOptions(model=model, data=data, out=out, train=train, val_fraction=0.2,
                          memory_limit=int(limit) if method == "dial" else None, rank=4,
                          eval_rows=4, sample_tokens=8)
print(finetune(options)["method"])
"""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model whose steps take tens of MB in store_all and a few in tiles."""
    from helpers import write_model

    config = Qwen2Config(tokenizer.get_vocab_size(), 128, 2048, 8, 4, 2, 32, eos_token_id=0)
    return write_model(tmp_path_factory.mktemp("wide") / "model", config, tokenizer)


@pytest.mark.skipif(not resident().data, reason="no /proc/self/status")
def test_the_limit_holds_against_the_kernel(
    wide_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """RLIMIT_DATA at the process's own memory + the limit + 16 MiB: the dial's run completes.

    The 16 MiB are the interpreter's and the allocator's: files, threads, fragments. store_all,
    which needs more than that, is stopped by the same limit: it binds.
    """
    limit, spare = 12_000_000, 16 * 2**20
    shapes = Shapes(mr.load_model(wide_model).config, 4, 97, 4)
    assert need(STORE_ALL, shapes) > limit + 2 * spare
    outcomes = {}
    for method in ("dial", "store_all"):
        given = [wide_model, text_file, tmp_path / method, limit, spare, method]
        outcomes[method] = subprocess.run(
            [sys.executable, "-c", _LIMITED, *map(str, given)],
            capture_output=True, text=True, check=False,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
    assert outcomes["dial"].returncode == 0, outcomes["dial"].stderr
    assert outcomes["dial"].stdout.strip() == "mesp_tiled"
    assert outcomes["store_all"].returncode != 0
    assert "MemoryError" in outcomes["store_all"].stderr


def test_the_python_door() -> None:
    """What it names runs, and the gradients are those of any exact method."""
    model = mr.random_model(CONFIG, dtype="float64")
    adapter = mr.init_lora(CONFIG, rank=4, b_std=0.1, dtype="float64")
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 41))
    choice = mr.choose_schedule(model, adapter, ids.shape, "3MB", hold_gradients=True)
    method, where = choice.schedule
    assert method == "mesp_tiled"
    _, grads = mr.loss_and_grads(model, adapter, ids, ids, method=method, checkpoints=where)
    _, exact = mr.loss_and_grads(model, adapter, ids, ids, method="store_all")
    for name, grad in exact.items():
        assert np.abs(grads[name] - grad).max() <= 1e-12 * np.abs(grad).max()  # measured 1e-15


def test_finetune_tells_what_it_chose(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    command = ["finetune", "--model", str(tiny_model_dir), "--data", str(text_file), "--steps", "1",
               "--seq-len", "32", "--rank", "2", "--out", str(out), "--json"]  # fmt: skip
    assert main([*command, "--memory-limit", "1MB"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["method"] == "store_all"
    assert "memory   store_all: needs " in said.err
    assert "of 1.00 MB" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory-limit", "10kB"], "expected at least"),
        (["--memory-limit", "lots"], "expected a size such as 64MB"),
        (["--memory-limit", "1MB", "--method", "mesp"], "--method: found beside --memory-limit"),
        (["--memory-limit", "1MB", "--checkpoints", "disk"], "--checkpoints: found beside"),
    ],
)
def test_finetune_refuses_before_it_starts(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
    options: list[str], message: str,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    command = [
        "finetune",
        "--model",
        str(tiny_model_dir),
        "--data",
        str(text_file),
        "--out",
        str(out),
    ]
    assert main([*command, *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert not list(tmp_path.glob("run*"))


def test_samples_that_need_more_are_left_out(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    train = TrainConfig(steps=1, seq_len=8, clip=0.0, accumulate=1)
    options = FinetuneOptions(
        model=str(tiny_model_dir), data=str(text_file), out=str(tmp_path / "a"), train=train,
        rank=2, sample_tokens=400,
    )  # fmt: skip
    import dataclasses

    tight = dataclasses.replace(options, memory_limit="400kB", out=str(tmp_path / "b"))
    assert finetune(options)["after"]["sample"] is not None
    assert finetune(tight)["after"]["sample"] is None


def test_a_file_needs_room() -> None:
    """Offloading is left out where its file finds no room, and all that lies on disk without any."""
    shapes, limit = Shapes(HALF_B), 40_000_000
    size = OFFLOAD.cost(shapes).file
    # inputs of both halves, q, k, v and the attention output, its log-sum-exp, gate and up
    assert size == 24 * 256 * 4 * (2 * 896 + 2 * 896 + 2 * 128 + 14 + 2 * 4864)
    assert choose(shapes, limit).schedule == OFFLOAD
    assert f"and {megabytes(size)} of a temporary file" in str(choose(shapes, limit))
    assert choose(shapes, limit, room=size).schedule == OFFLOAD
    assert choose(shapes, limit, room=size - 1).schedule == TILED_DISK
    assert choose(shapes, limit, room=0).schedule == Schedule("mesp_tiled", "ram")
    with pytest.raises(mr.MespRefError, match="for mesp_tiled, checkpoints in RAM"):
        choose(shapes, 20_000_000, room=0)


def test_a_run_looks_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mr.random_model(Qwen2Config(61, 32, 64, 2, 2, 1, 16))
    adapter = mr.init_lora(model.config, rank=2)
    limit = need(OFFLOAD, step_shapes(model, adapter, 1, 300))
    assert choose_schedule(model, adapter, (1, 300), limit).schedule.checkpoints != "ram"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(mr.MespRefError, match="checkpoints in RAM"):
        choose_schedule(model, adapter, (1, 300), limit)


def test_a_run_goes_on_as_it_began(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when by now another schedule would be chosen, since there is no room for files."""
    train, out = TrainConfig(steps=2, seq_len=64, schedule="constant"), tmp_path / "run"
    model = mr.load_model(tiny_model_dir)
    given = train, model, mr.init_lora(model.config, rank=2)
    shapes = step_shapes(*given[1:], train.batch_size, train.seq_len)
    shapes = shapes._replace(packed=True)  # a text's pages are
    limit = need(OFFLOAD, shapes, hold_gradients=True)
    options = FinetuneOptions(
        model=str(tiny_model_dir), data=str(text_file), out=str(out), train=train, sample_tokens=0,
        rank=2, memory_limit=limit,
    )  # fmt: skip
    finetune(options)
    assert within(limit, *given, packed=True)[1].schedule == OFFLOAD
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(mr.MespRefError, match=r"activations on disk fits with .* free"):
        within(limit, *given, packed=True)
    more = dataclasses.replace(train, steps=3)
    finetune(dataclasses.replace(options, train=more, resume=True))
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["steps"] == 3
