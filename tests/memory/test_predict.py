"""A step over ghosts: every depth, workers at once, and whatever the engine becomes."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.engine.block import MESP, block, block_bwd
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import random_arrays
from mesp_ref.engine.methods import checkpointed_forward
from mesp_ref.files.affine import Affine
from mesp_ref.files.models import named_shape
from mesp_ref.lean.steps import METHODS
from mesp_ref.memory import SCHEDULES, Base, Schedule, Shapes, cost, measure, peak, predict
from mesp_ref.memory.dry_run import dry_run
from mesp_ref.memory.predict import run_cost

CONFIG = Qwen2Config(1301, 96, 352, 7, 6, 2, 16)
MEZO = Schedule("mezo", "ram")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("affine", [None, Affine(4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("schedule", [*SCHEDULES, MEZO], ids=str)
def test_a_deep_model_is_two_and_three_blocks(
    schedule: Schedule, affine: Affine | None, workers: int
) -> None:
    """Every op of seven blocks, run whole: the same peaks, and the same file."""
    base = Base.uniform(CONFIG, "float16", affine) if affine else Base()
    shapes = schedule.shapes(Shapes(CONFIG, 2, 60, 4, base=base, workers=workers))
    whole, found = run_cost(schedule.method, shapes), schedule.cost(shapes)
    assert {op: peak.total for op, peak in found.peaks.items()} == {
        op: peak.total for op, peak in whole.peaks.items()
    }
    assert found[1:] == whole[1:]


def test_the_parts_are_the_whole() -> None:
    """At the peak, kind by kind, a deep model's bytes are those of its run."""
    shapes = Shapes(CONFIG, 2, 60, 4)
    for method in METHODS:
        top = peak(method, shapes)
        assert top.parts == run_cost(method, shapes).peaks[top.op].parts


def mesp_with_qkv(step: Any) -> Any:
    """MeSP that keeps q, k and v: a method that nobody told the prediction of."""
    loss, dx, _ = checkpointed_forward(step)
    for layer in reversed(step.layers):
        res = block(step.checkpoints.pop(), layer, halves=step.halves, drop=MESP - {"q", "k", "v"})[
            1
        ]
        dx, grads = block_bwd(dx, res, layer, halves=step.halves)
        step.emit(layer.number, grads)
        del grads, res
    return loss


def test_a_changed_method_is_predicted_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of the prediction knows what a method keeps: q, k and v are seen at every op."""
    monkeypatch.setitem(METHODS, "mesp", mesp_with_qkv)
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    weights, adapter = random_arrays(config), mr.init_lora(config, 4, b_std=0.1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 50))

    def step() -> None:
        mr.loss_and_grads(
            mr.Model(config, weights), adapter, ids, ids, on_gradients=lambda layer, grads: None
        )

    ledger, shapes = (
        measure(step, [*adapter.weights.values(), ids], weights),
        Shapes(config, 1, 50, 4),
    )
    ghosts = dry_run("mesp", shapes).ledger
    assert [(m.op, m.held) for m in ghosts.moments] == [
        (m.op, m.held) for m in ledger.moments if m.op != "rope_tables"
    ]
    monkeypatch.undo()
    plain = dry_run("mesp", shapes).ledger
    with_qkv, without = (
        max(m.held for m in ledger.moments if m.op == "swiglu_bwd") for ledger in (ghosts, plain)
    )
    assert with_qkv - without == shapes.q + 2 * shapes.k


@pytest.mark.parametrize(
    ("batch", "tokens", "chunk"),
    [(1, 1500, 100), (3, 1290, 128), (7, 100, 230), (2, 90, 90), (1, 1201, 64)],
)  # fmt: skip
def test_a_long_row_is_three_short_ones(batch: int, tokens: int, chunk: int) -> None:
    """Every chunk of every sequence, run whole: the same peak, file and arithmetic."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    shapes = Shapes(config, batch, tokens, 4, disk=True, chunk=chunk)
    whole, found = run_cost("mesp_streamed", shapes), cost("mesp_streamed", shapes)
    tops = [max(peak.total for peak in c.peaks.values()) for c in (whole, found)]
    assert tops[0] == tops[1]
    assert found[1:] == whole[1:]


@pytest.mark.parametrize(
    ("changed", "window"),
    [({"tokens": 4501}, 0), ({"tokens": 4400, "packed": True, "offload": True}, 0),
     ({"batch": 2, "tokens": 9001, "workers": 2}, 0), ({"tokens": 7000}, 300)],
)  # fmt: skip
def test_a_long_row_of_tiles_is_three_short_ones(
    changed: dict[str, Any], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile run: the same bytes of every op, file and arithmetic, with and without a window."""
    kinds = ("sliding_attention", "full_attention") if window else ()
    config = Qwen2Config(
        301, 64, 352, 2, 16, 1, 4, layer_types=kinds, sliding_window=window or None
    )
    shapes = Shapes(config, rank=4, disk=True)._replace(**changed)
    seen = []
    monkeypatch.setattr(predict, "dry_run", lambda m, s: seen.append(s.tokens) or dry_run(m, s))
    found = run_cost("mesp_tiled", shapes)
    assert len(seen) == 3
    assert max(seen) < shapes.tokens / 2.5
    monkeypatch.setattr(predict, "_NARROW", shapes.tokens)
    assert found == run_cost("mesp_tiled", shapes)
    assert seen[3:] == [shapes.tokens]


def test_memory_of_chunks_does_not_grow_with_length() -> None:
    """Of Qwen2.5-0.5B and 3B, dense and on 4 bits: one number at any length; and how small."""
    for name, affine, most in (
        ("qwen2.5-0.5b", None, 12e6), ("qwen2.5-0.5b", Affine(4, 64), 18e6), ("qwen2.5-3b", None, 32e6),
    ):  # fmt: skip
        config = named_shape(name)
        base = Base.uniform(config, "bfloat16", affine) if affine else Base()
        tops = [
            peak("mesp_streamed", Shapes(config, 1, tokens, disk=True, base=base)).total
            for tokens in ((256, 8192, 131_072) if name == "qwen2.5-0.5b" else (32_768,))
        ]
        assert tops[0] <= tops[-1] <= most
        assert len(set(tops[1:])) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_documents_in_a_row(method: str) -> None:
    """Kept apart they need angles for every row, and no probabilities: op by op, and at the peak."""
    config, tokens = dataclasses.replace(CONFIG, num_hidden_layers=2), 120
    weights, adapter = random_arrays(config), mr.init_lora(config, 4, b_std=0.1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, tokens))
    one, two = np.tile(np.arange(tokens), (2, 1)), np.tile(np.arange(tokens) % 70, (2, 1))
    shapes = Shapes(config, 2, tokens, 4, packed=True)
    expected = [m for m in dry_run(method, shapes).ledger.moments if m.op != "rope_tables"]
    for positions, uncounted in ((one, 0), (two, 2)):  # first tokens, which are no targets

        def step(positions: np.ndarray = positions) -> None:
            mr.loss_and_grads(
                mr.Model(config, weights), adapter, ids, ids, method=method,
                on_gradients=lambda layer, grads: None, position_ids=positions, checkpoints="ram",
            )  # fmt: skip

        step()
        owned = [*adapter.weights.values(), ids, positions]
        ledger = measure(step, owned, weights)
        moments = [m for m in ledger.moments if m.op != "rope_tables"]
        for seen, ghosts in zip(moments, expected, strict=True):
            assert seen.op == ghosts.op
            assert 0 <= ghosts.held - seen.held <= 4 * uncounted, seen.op
        most = max(m.most for m in ledger.moments)
        assert -70_000 < most - peak(method, shapes).total <= 96 * 1024
    apart, whole = (peak(method, shapes._replace(packed=packed)).total for packed in (True, False))
    assert apart > whole if method in ("mesp_tiled", "mesp_streamed") else apart < whole


@pytest.mark.parametrize("method", METHODS)
def test_workers_need_more_than_one(method: str) -> None:
    """Whatever they share, each has scratch of its own; the least that they need together grows."""
    tops = [peak(method, Shapes(CONFIG, 1, 60, 4, workers=w)).total for w in (1, 2)]
    assert tops[0] <= tops[1] <= 2 * tops[0]


def test_parts_of_a_weight_have_its_name() -> None:
    """A worker's window of a weight names the op as the weight does, whoever calls it."""
    one, two = (dry_run("mesp", Shapes(CONFIG, 1, 60, 4, workers=w)).ledger for w in (1, 2))
    names = [{m.op for m in ledger.moments if "_proj" in m.op} for ledger in (one, two)]
    assert names[0] == names[1]
    assert "lora_linear_bwd self_attn.q_proj" in names[0]
    assert len(names[0]) == 14


def test_four_bytes_are_twice_two() -> None:
    """In two-byte numbers a step needs half, all but the labels and the masks of a byte."""
    for method in METHODS:
        two, four = (peak(method, Shapes(CONFIG, itemsize=n)).total for n in (2, 4))
        assert four / 2 <= two <= four / 2 + 8 * 256 + 256 * 256


def test_nothing_listens_any_longer() -> None:
    """The profile function that was there is there again."""
    import sys

    heard: list[str] = []

    def listen(frame: Any, event: str, value: Any) -> None:
        heard.append(event)

    sys.setprofile(listen)
    try:
        dry_run("mesp", Shapes(CONFIG, 1, 8, 2))
        assert sys.getprofile() is listen
    finally:
        sys.setprofile(None)
