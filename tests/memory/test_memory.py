"""Memory to the byte: the ledger against the closed form, tracemalloc against both."""

import functools
import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.engine.config import FAMILIES, Qwen2Config
from mesp_ref.engine.init import random_arrays
from mesp_ref.lean.activations import KINDS, DiskCheckpoints
from mesp_ref.memory import PEAKS, Ledger, Shapes, at, cost, measure, peak
from mesp_ref.memory.dry_run import dry_run
from mesp_ref.memory.predict import END

PYTHON = 96 * 1024  # bytes of Python objects and small temporaries beside the arrays

_WINDOWED = {
    "traits": FAMILIES["gemma3_text"], "sliding_window": 37, "attention_scale": 0.2,
    "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
}  # fmt: skip

# (config, batch, tokens, rank): no two axes alike; "batch" without shared heads
CASES = {
    "grouped": (Qwen2Config(3001, 96, 336, 3, 6, 2, 24), 1, 97, 4),
    "long": (Qwen2Config(1009, 64, 160, 2, 8, 4, 16), 1, 301, 2),  # two tiles of the vocabulary
    "batch": (Qwen2Config(1201, 80, 700, 2, 3, 3, 32, tie_word_embeddings=False), 3, 50, 16),
    "qwen3": (Qwen2Config(1009, 64, 160, 2, 6, 3, 16, traits=FAMILIES["qwen3"]), 1, 83, 4),
    "gemma3": (Qwen2Config(601, 72, 208, 3, 4, 2, 20, **_WINDOWED), 2, 101, 4),
}


@functools.cache
def run(case: str, method: str, checkpoints: str, targets: Any = "all") -> tuple[Ledger, Shapes]:
    """The ledger of one step, everything that persists left out, and its shapes."""
    config, batch, tokens, rank = CASES[case]
    weights = random_arrays(config)
    adapter = mr.init_lora(config, rank=rank, b_std=0.1, targets=targets)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens))
    model = mr.Model(config, weights)

    def step() -> None:
        mr.loss_and_grads(
            model, adapter, ids, ids, method=method, checkpoints=checkpoints,
            on_gradients=lambda layer, grads: None,
        )  # fmt: skip

    step()  # caches of Python and NumPy fill once
    gc.collect()
    ledger = measure(step, [*adapter.weights.values(), ids], weights)
    return ledger, at(Shapes(config, batch, tokens, rank, adapter.targets), checkpoints)


def traced_peak(ledger: Ledger) -> int:
    """tracemalloc's peak over a step, in ops and between them."""
    return max(max(m.between, m.traced + m.added) for m in ledger.moments)


PLACES_OF = {"mebp": ("ram", "disk"), "mesp": ("ram", "disk"), "mesp_tiled": KINDS}
PLACES_OF |= {"mesp_streamed": ("ram", "disk")}
ALL = [
    (case, method, checkpoints)
    for case in CASES
    for method in PEAKS
    for checkpoints in KINDS
    if checkpoints in PLACES_OF.get(method, ("ram",))
]


def held(ledger: Ledger) -> list[tuple[str, int]]:
    """Every op, and what is held when it is called; the tables of angles are made before ghosts are."""
    return [(moment.op, moment.held) for moment in ledger.moments if moment.op != "rope_tables"]


@pytest.mark.parametrize(("case", "method", "checkpoints"), ALL)
def test_ghosts_live_as_long_as_arrays(case: str, method: str, checkpoints: str) -> None:
    """A real step and one over ghosts: the same ops in the same order, and the same bytes at each."""
    ledger, shapes = run(case, method, checkpoints)
    assert held(dry_run(method, shapes).ledger) == held(ledger)


@pytest.mark.parametrize(("case", "method", "checkpoints"), ALL)
def test_peak_is_what_tracemalloc_counts(case: str, method: str, checkpoints: str) -> None:
    """tracemalloc's peak = ledger + named scratch of the running op + a bounded constant.

    A table of the interpreter that happens to grow during the step (the one of interned strings
    takes 2 MB) is not the step's: then the second run tells.
    """
    ledger, shapes = run(case, method, checkpoints)
    predicted = peak(method, shapes).total
    if traced_peak(ledger) > predicted + PYTHON:
        ledger, _ = run.__wrapped__(case, method, checkpoints)
    assert 0 <= traced_peak(ledger) - predicted <= PYTHON, peak(method, shapes)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("case", "method", "checkpoints"), ALL)
def test_file_is_what_goes_to_disk(
    case: str, method: str, checkpoints: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of all that is kept there in a step."""
    config, batch, tokens, rank = CASES[case]
    model = mr.Model(config, random_arrays(config))
    adapter, kept = mr.init_lora(config, rank=rank), []
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens))
    keep, room = DiskCheckpoints.keep, DiskCheckpoints.room

    def counted(stack: DiskCheckpoints, x: np.ndarray) -> np.ndarray:
        kept.append(x.nbytes)
        return keep(stack, x)

    def made(stack: DiskCheckpoints, shape: tuple[int, ...], dtype: Any, like: Any = None) -> Any:
        kept.append(int(np.prod(shape)) * dtype.itemsize)
        return room(stack, shape, dtype, like)

    monkeypatch.setattr(DiskCheckpoints, "keep", counted)
    monkeypatch.setattr(DiskCheckpoints, "room", made)
    mr.loss_and_grads(
        model, adapter, ids, ids, method=method, checkpoints=checkpoints,
        workers=workers,
    )  # fmt: skip
    shapes = at(Shapes(config, batch, tokens, rank, workers=workers), checkpoints)
    assert sum(kept) == cost(method, shapes).file


@pytest.mark.parametrize("perturbations", [1, 5])
@pytest.mark.parametrize(("rank", "op"), [(4, "attention"), (512, END)])
def test_averaged_perturbations_need_no_more_memory(perturbations: int, rank: int, op: str) -> None:
    """One block's estimate and two tensors of noise, however many: by tracemalloc, to the byte."""
    config = CASES["grouped"][0]
    model = mr.Model(config, random_arrays(config))
    adapter = mr.init_lora(config, rank=rank, b_std=0.1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 97))
    peaks = []
    for _ in range(2):  # caches of Python and NumPy fill once
        tracemalloc.start()
        mr.loss_and_grads(
            model, adapter, ids, ids, method="mezo", perturbations=perturbations,
            on_gradients=lambda layer, grads: None,
        )  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    expected = peak("mezo", Shapes(config, 1, 97, rank))
    assert expected.op == op
    assert 0 <= min(peaks) - expected.total <= PYTHON


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("k_proj",), ("gate_proj", "o_proj")])
@pytest.mark.parametrize("method", ["mebp", "mesp", "mesp_tiled"])
def test_ghosts_know_the_targets(method: str, targets: tuple[str, ...]) -> None:
    ledger, shapes = run("grouped", method, "ram", targets)
    assert held(dry_run(method, shapes).ledger) == held(ledger)


@pytest.mark.parametrize(
    "tokens",
    [1024, 2048, *(pytest.param(t, marks=pytest.mark.slow) for t in (4096, 16384))],
)
def test_tiled_memory_grows_linearly_with_the_sequence(tokens: int) -> None:
    """Beyond 1024 tokens twice the tokens need at most twice the memory: no T² term."""
    config = Qwen2Config(151936, 896, 4864, 24, 14, 2, 64)
    one, two = (
        peak("mesp_tiled", Shapes(config, 1, t, disk=True)).total for t in (tokens, 2 * tokens)
    )
    assert two <= 2.05 * one


def test_published_shapes_fit_their_budgets() -> None:
    """Sequence 256, rank 8, checkpoints on disk: 10, 18 and 24 MB; in RAM 32; 1024 tokens 32."""
    small = Qwen2Config(151936, 896, 4864, 24, 14, 2, 64)
    middle = Qwen2Config(151936, 1536, 8960, 28, 12, 2, 128)
    large = Qwen2Config(151936, 2048, 11008, 36, 16, 2, 128)
    for config, budget in ((small, 10), (middle, 18), (large, 24)):
        assert peak("mesp_tiled", Shapes(config, disk=True)).total <= budget * 1e6
    assert peak("mesp_tiled", Shapes(small)).total <= 32e6
    assert peak("mesp_tiled", Shapes(small, tokens=1024, disk=True)).total <= 32e6


def test_a_buffer_counts_once_and_views_keep_it_alive() -> None:
    from mesp_ref import ops

    def step() -> None:
        x = np.ones((4, 8), np.float32)
        y = ops.linear(x[:2], np.ones((3, 8), np.float32))[0]
        ops.linear(y, np.ones((5, 3), np.float32))
        ops.linear(x[2:], np.ones((3, 8), np.float32))

    first, second, third = measure(step).moments
    assert first.held == 4 * 8 * 4 + 3 * 8 * 4  # all of x, and w
    assert second.held == 4 * 8 * 4 + 2 * 3 * 4 + 5 * 3 * 4  # the first w is gone
    assert third.held == 4 * 8 * 4 + 2 * 3 * 4 + 3 * 8 * 4


def test_command_predicts_and_measures(tiny_model_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """Standard output holds one JSON object; measured lies just above predicted."""
    command = ["memory", str(tiny_model_dir), "--seq-len", "64", "--rank", "2", "--json"]
    assert main([*command, "--measure", "--method", "mesp_tiled", "--method", "mesp"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods.keys() == {"mesp_tiled", "mesp"}
    for found in methods.values():
        assert sum(found["parts"].values()) == found["predicted_peak_bytes"]
        assert found["predicted_peak_bytes"] <= found["measured_peak_bytes"]


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_command_draws_a_timeline(tiny_model_dir: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"timeline{suffix}"
    assert main(["memory", str(tiny_model_dir), "--seq-len", "8", "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    "wrong", [["qwen2.5-9b"], ["qwen2.5-3b", "--rank", "0"], ["qwen2.5-3b", "--plot", "x.gif"]]
)
def test_mistakes_are_one_line(wrong: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["memory", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1
