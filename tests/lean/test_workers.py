"""Workers that share a block: the same gradients, repeatable bits, memory as predicted."""

import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import random_arrays
from mesp_ref.files.affine import Affine
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.models import named_shape
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.lean.shards import (
    Window,
    attention_cuts,
    join,
    mlp_cuts,
    part_adapter,
    ranges,
    share_rows,
)
from mesp_ref.lean.workers import blas_threads, hire
from mesp_ref.memory import Base, Shapes, Store, at, choose, peak
from mesp_ref.memory.dry_run import GhostTable
from mesp_ref.memory.ghost import Meter
from mesp_ref.verify.planted import original, planted

# Heads that workers cannot share evenly, a width that is no multiple of 128, an untied head.
CONFIGS = {
    "grouped": Qwen2Config(211, 48, 300, 2, 6, 3, 8, tie_word_embeddings=False),
    "two": Qwen2Config(307, 32, 416, 2, 4, 2, 8),
    "one": Qwen2Config(101, 32, 20, 1, 2, 1, 16),
}
SHAPES = {"column": (1, 33), "batch": (3, 20), "rows": (2, 280)}


def step(config: Qwen2Config, shape: tuple[int, int], dtype: str, **options: Any) -> Any:
    """Loss and gradients of one seeded case, some labels ignored."""
    model = mr.Model(config, random_arrays(config, dtype=dtype, std=0.2))
    adapter = mr.init_lora(config, rank=3, b_std=0.2, dtype=dtype)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, config.vocab_size, shape)
    labels = np.where(rng.random(shape) < 0.6, ids, -100)
    return mr.loss_and_grads(model, adapter, ids, labels, **options)


EXACT = sorted(set(mr.METHODS) - {"mezo"})
PLACED = [(method, "ram") for method in EXACT]
PLACED += [("mesp", "disk"), ("mesp_tiled", "disk"), ("mesp_tiled", "offload")]


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_those_of_one(config: str, shape: str, workers: int) -> None:
    """In float64, every weight's, of every exact method: what differs is the order of sums."""
    case = CONFIGS[config], SHAPES[shape], "float64"
    loss, want = step(*case, trainable="all")
    for method, checkpoints in PLACED:
        value, got = step(
            *case, trainable="all", method=method, workers=workers, checkpoints=checkpoints
        )
        assert value == pytest.approx(loss, rel=1e-13)
        assert got.keys() == want.keys()
        for name, grad in got.items():
            assert grad.shape == want[name].shape, name
            size = np.abs(want[name]).max()
            if name.endswith("k_proj.bias"):  # a sum that nearly cancels
                size += np.abs(want[name.replace("k_proj", "q_proj")]).max()
            assert np.abs(grad - want[name]).max() <= 1e-12 * size, (method, name)


@pytest.mark.parametrize("shape", ["column", "rows"])
@pytest.mark.parametrize("method", mr.METHODS)
def test_bits_repeat(method: str, shape: str) -> None:
    """Who is done first decides nothing."""
    case = CONFIGS["grouped"], SHAPES[shape], "float32"
    runs = [step(*case, method=method, workers=3) for _ in range(5)]
    for loss, grads in runs[1:]:
        assert loss == runs[0][0]
        assert all(np.array_equal(g, runs[0][1][name]) for name, g in grads.items())


@pytest.mark.parametrize("workers", [2, 5])
def test_store_all_mebp_and_mesp_agree_bit_for_bit(workers: int) -> None:
    """With any number of workers they call the same ops in the same order."""
    case = CONFIGS["grouped"], SHAPES["batch"], "float32"
    loss, want = step(*case, method="store_all", workers=workers)
    for method in ("mebp", "mesp"):
        value, got = step(*case, method=method, workers=workers)
        assert value == loss
        assert all(np.array_equal(got[name], grad) for name, grad in want.items())


def test_losses_of_mezo_are_those_of_one() -> None:
    """Its estimate is their difference by 2·eps, times the same noise."""
    case = CONFIGS["grouped"], SHAPES["column"], "float64"
    (one, want), (loss, got) = (step(*case, method="mezo", workers=w) for w in (1, 3))
    assert loss == pytest.approx(one, rel=1e-13)
    for name, grad in want.items():
        np.testing.assert_allclose(got[name], grad, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("length", "parts", "unit"),
    [(4864, 2, 128), (300, 3, 128), (7, 3, 1), (2, 2, 1), (640, 5, 128)],
)
def test_bounds_cover_all_once(length: int, parts: int, unit: int) -> None:
    found = ranges(length, parts, unit)
    assert [i for a, b in found for i in range(a, b)] == list(range(length))
    assert len(found) == parts
    assert all(a % unit == 0 and a < b for a, b in found)


@pytest.mark.parametrize("kind", [attention_cuts, mlp_cuts])
def test_parts_are_cuts_of_the_whole(kind: Any) -> None:
    """Put side by side, the parts' weights and LoRA matrices are the layer's, tiles too."""
    config = CONFIGS["grouped"]
    weights, adapter = random_arrays(config), mr.init_lora(config, 3, b_std=0.2)
    prefix, parts = "model.layers.1.", kind(config, 3)
    for part, cut in parts[0].items():
        axis, whole = cut.axis, weights[f"{prefix}{part}.weight"]
        views = [Window(whole, cuts[part]) for cuts in parts]
        np.testing.assert_array_equal(np.concatenate([v[...] for v in views], axis), whole)
        for view, cuts in zip(views, parts, strict=True):
            a, b = cuts[part][1:]
            part_of_whole = whole[a:b] if axis == 0 else whole[:, a:b]
            assert view.shape == part_of_whole.shape
            np.testing.assert_array_equal(view[2:5], part_of_whole[2:5])
            np.testing.assert_array_equal(view[:, 2:5], part_of_whole[:, 2:5])
            assert np.shares_memory(view[...], part_of_whole)
        pairs = [part_adapter(adapter, prefix, cuts).pair(prefix + part) for cuts in parts]
        A, B = adapter.pair(prefix + part) or (None, None)
        joined = np.concatenate([pair[1 - axis] for pair in pairs if pair], axis)
        np.testing.assert_array_equal(joined, A if axis else B)
        assert all(pair and np.array_equal(pair[axis], B if axis else A) for pair in pairs)


def test_join_adds_what_is_shared() -> None:
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    down = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    ones = [
        {name.format(m): np.full((2, 2), i) for name in (q, down) for m in "AB"} for i in (1, 2)
    ]
    found = join(ones)
    assert {name: grad.shape for name, grad in found.items()} == {
        q.format("A"): (2, 2), q.format("B"): (4, 2),
        down.format("A"): (2, 4), down.format("B"): (2, 2),
    }  # fmt: skip
    assert found[q.format("A")].tolist() == found[down.format("B")].tolist() == [[3, 3], [3, 3]]


def test_an_error_of_any_worker_arrives_and_blas_has_its_threads_again() -> None:
    before = blas_threads()

    def work(i: int) -> int:
        if i == 2:
            raise MemoryError(str(i))
        return i

    with hire(3) as team:
        assert blas_threads() == 1
        assert team.each(lambda i: i * i, range(3)) == [0, 1, 4]
        with pytest.raises(MemoryError, match="2"):
            team.each(work, range(3))
    assert blas_threads() == before


def test_workers_see_the_callers_errstate() -> None:
    """NumPy's warnings are errors in these tests; what the caller allows must be allowed there."""
    with hire(2) as team, np.errstate(over="ignore"):
        found = team.each(lambda x: np.exp(np.float32(x)), [100.0, 100.0])
    assert np.isinf(found).all()


MEMORY = {
    "columns": (Qwen2Config(3001, 128, 640, 3, 8, 2, 16), 1, 160, 4),
    "rows": (Qwen2Config(1201, 64, 384, 3, 4, 2, 16), 2, 300, 4),
    "head": (Qwen2Config(20011, 96, 128, 2, 4, 2, 24), 1, 200, 2),
    "attention": (Qwen2Config(257, 64, 128, 2, 8, 2, 16), 1, 500, 2),
}
THIN = Qwen2Config(257, 192, 200, 3, 12, 6, 16)  # whose sums of six workers are larger than its MLP


@pytest.mark.parametrize(
    ("method", "checkpoints"),
    [("store_all", "ram"), ("mebp", "ram"), ("mesp", "ram"), ("mezo", "ram"),
     ("mesp_tiled", "disk"), ("mesp_tiled", "offload")],
)  # fmt: skip
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_as_predicted(
    case: str, bits: int | None, method: str, checkpoints: str, tmp_path: Path
) -> None:
    """tracemalloc's peak with two workers: at most the closed form and Python's own objects.

    That is of two at the worst place at once. These tasks are so short that one may end before the
    other begins, so what one of them needs is the least.
    """
    config, batch, tokens, rank = MEMORY[case]
    model = mr.Model(config, random_arrays(config))
    base = Base()
    if bits:
        save_checkpoint(config, random_arrays(config), tmp_path / "dense")
        quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", bits, 32, "float16")
        model = mr.load_model(tmp_path / "packed")
        base = Base.of(model.weights, model.head)
    adapter = mr.init_lora(config, rank=rank, b_std=0.1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens))
    seen = traced_peaks(model, adapter, ids, method=method, checkpoints=checkpoints, workers=2)
    shapes = Shapes(config, batch, tokens, rank, adapter.targets, base=base, workers=2)
    found = peak(method, at(shapes, checkpoints))
    assert found.total / 2 <= min(seen), (found.op, seen)
    assert max(seen) <= found.total + 192 * 1024, (found.op, seen)


def traced_peaks(model: mr.Model, adapter: mr.Adapter, ids: Any, **options: Any) -> list[int]:
    """tracemalloc's peaks of three steps, once caches of Python and NumPy are filled."""
    seen = []
    for _ in range(4):
        tracemalloc.start()
        try:
            mr.loss_and_grads(
                model, adapter, ids, ids, on_gradients=lambda layer, grads: None, **options
            )
            seen.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return seen[1:]


@pytest.mark.parametrize("method", mr.METHODS)
def test_memory_of_many_workers(method: str) -> None:
    """Each has a sum of its own: where the MLP is narrow, those are the peak."""
    model = mr.Model(THIN, random_arrays(THIN))
    adapter = mr.init_lora(THIN, rank=4, b_std=0.1)
    ids = np.random.default_rng(0).integers(0, THIN.vocab_size, (8, 50))
    found = peak(method, Shapes(THIN, 8, 50, 4, adapter.targets, workers=6))
    seen = traced_peaks(model, adapter, ids, method=method, workers=6)
    assert max(seen) <= found.total + 6 * 64 * 1024, (found, seen)


def test_cuts_inside_a_packed_group_decode_all_of_it() -> None:
    """o_proj of 0.5B, 896 columns cut at 448, in groups of 128: 512 columns for each of two workers."""
    config, store = named_shape("qwen2.5-0.5b"), Store("float16", Affine(4, 128))
    for part, columns in (("self_attn.o_proj", 1024), ("self_attn.q_proj", 896)):
        meter = Meter()
        table = GhostTable(meter, (896, 896), np.dtype(np.float32), store)
        cuts = [cut[part] for cut in attention_cuts(config, 2)]
        parts = [Window(table, cut)[...] for cut in cuts]
        assert sum(math.prod(part.shape) for part in parts) == 896 * 896
        assert meter.live == 896 * columns * 4


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("gate_proj",), None])
@pytest.mark.parametrize("method", EXACT)
def test_some_projections_without_lora(method: str, targets: tuple[str, ...] | None) -> None:
    """And no adapter at all, where only the base weights learn."""
    config, rng = CONFIGS["grouped"], np.random.default_rng(1)
    model = mr.Model(config, random_arrays(config, dtype="float64", std=0.2))
    adapter = targets and mr.init_lora(config, 3, b_std=0.2, dtype="float64", targets=targets)
    ids = rng.integers(0, config.vocab_size, (2, 13))
    (loss, want), (value, got) = (
        mr.loss_and_grads(model, adapter, ids, ids, method, "all", workers=w) for w in (1, 3)
    )
    assert value == pytest.approx(loss, rel=1e-13)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        np.testing.assert_allclose(got[name], grad, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("method", EXACT)
def test_updates_in_place_do_not_reach_the_rest_of_the_step(method: str) -> None:
    """Gradients are those of the parameters before, whatever `on_gradients` does to them."""
    config, rng = CONFIGS["two"], np.random.default_rng(2)
    model = mr.Model(config, random_arrays(config, dtype="float64", std=0.2))
    adapter = mr.init_lora(config, 3, b_std=0.2, dtype="float64")
    ids = rng.integers(0, config.vocab_size, (1, 20))
    _, want = mr.loss_and_grads(model, adapter, ids, ids, method, workers=2)
    got: dict[str, Any] = {}

    def update(layer: int, grads: dict[str, Any]) -> None:
        got.update(grads)
        for name in grads:
            adapter.weights[name] -= 1.0

    mr.loss_and_grads(model, adapter, ids, ids, method, workers=2, on_gradients=update)
    for name, grad in want.items():
        np.testing.assert_array_equal(got[name], grad, err_msg=name)


@pytest.mark.parametrize("method", mr.METHODS)
def test_an_error_in_a_step_arrives(method: str) -> None:
    """From whichever worker: BLAS has its threads again, and mezo's parameters are as they were."""
    config, before = CONFIGS["two"], blas_threads()
    model = mr.Model(config, random_arrays(config))
    adapter = mr.init_lora(config, 3, b_std=0.2)
    kept = {name: array.copy() for name, array in adapter.weights.items()}
    calls = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("in a worker")
        return real(*args, **options)

    real = original("engine.half:project")
    with (
        planted({"engine.half:project": failing}),
        pytest.raises(MemoryError, match="in a worker"),
    ):
        mr.loss_and_grads(model, adapter, [[1, 2, 3]], [[1, 2, 3]], method, workers=2)
    assert blas_threads() == before
    for name, array in kept.items():
        np.testing.assert_allclose(adapter.weights[name], array, atol=1e-8, err_msg=name)


def test_share_rows_needs_enough_of_them() -> None:
    assert share_rows(1, 1)
    assert share_rows(512, 2)
    assert not share_rows(511, 2)


def test_no_workers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["finetune", "--steps", "1", "--out", str(tmp_path / "run"), "--workers", "0"]
    assert main(command) == 2
    assert "workers: found 0, expected at least 1" in capsys.readouterr().err
    with pytest.raises(mr.MespRefError, match="workers: found 0, expected at least 1"):
        step(CONFIGS["one"], (1, 4), "float32", workers=0)


@pytest.mark.parametrize("method", ["mesp_tiled", "mesp", "mezo"])
def test_a_run_with_workers(
    method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Trained, resumed with the same number, refused with another."""
    text = tmp_path / "text.txt"
    text.write_text("Lily had a red ball. She gave it to Tom.\n" * 60, encoding="utf-8")
    run = ["finetune", "--data", str(text), "--method", method, "--workers", "2", "--quiet",
           "--seq-len", "32", "--eval-rows", "1", "--sample-tokens", "0",
           "--schedule", "constant"]  # fmt: skip
    out = ["--out", str(tmp_path / "run")]
    assert main([*run, "--steps", "2", *out]) == 0
    assert main([*run, "--steps", "3", *out, "--resume"]) == 0
    other = [option.replace("2", "3") if option == "2" else option for option in run]
    assert main([*other, "--steps", "4", *out, "--resume"]) == 2
    assert "workers" in capsys.readouterr().err


def test_memory_says_what_workers_need(capsys: pytest.CaptureFixture[str]) -> None:
    """A second worker of the 0.5B shape has a sum and tiles of its own, below the goal of 10 MB."""
    told = ["memory", "qwen2.5-0.5b", "--method", "mesp_tiled", "--checkpoints", "disk", "--json"]
    needs = []
    for workers in ("1", "2"):
        assert main([*told, "--workers", workers]) == 0
        answer = json.loads(capsys.readouterr().out)
        needs.append(answer["methods"]["mesp_tiled"]["predicted_peak_bytes"])
    assert needs[0] < needs[1] < 10e6
    assert main([*told[:-1], "--workers", "2", "--plot", "x.png"]) == 2
    assert "--workers: found beside --plot" in capsys.readouterr().err


def test_the_dial_counts_workers() -> None:
    """Between what one worker needs and what two do, a run of two is refused."""
    config = named_shape("qwen2.5-0.5b")
    least = []
    for workers in (1, 2):
        with pytest.raises(mr.MespRefError) as refused:
            choose(Shapes(config, workers=workers), 1000)
        least.append(int(re.findall(r"at least (\d+) bytes", str(refused.value))[0]))
    assert least[0] < least[1]
    one, two = (Shapes(config, workers=workers) for workers in (1, 2))
    assert choose(one, least[1] - 1).schedule.method == "mesp_tiled"
    assert choose(two, least[1]).schedule.method == "mesp_streamed"
    with pytest.raises(mr.MespRefError, match="memory_limit"):
        choose(two, least[1] - 1)
