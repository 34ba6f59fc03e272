"""Kinds of tensors: every buffer of every method has one, and it is the right one."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.memory import KINDS, PEAKS, Shapes, by_kind, measure
from mesp_ref.memory.kinds import kind
from mesp_ref.memory.ledger import Entry, Ledger

CONFIG = Qwen2Config(1201, 96, 336, 3, 6, 2, 24)
TOKENS, RANK = 97, 5


def ledger(method: str, checkpoints: str = "ram", targets: Any = "all") -> Ledger:
    model = mr.random_model(CONFIG)
    adapter = mr.init_lora(CONFIG, rank=RANK, b_std=0.1, targets=targets)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, TOKENS))
    owned = [*adapter.weights.values(), ids]

    def step() -> None:
        mr.loss_and_grads(
            model, adapter, ids, ids, method=method, checkpoints=checkpoints,
            on_gradients=lambda layer, grads: None,
        )  # fmt: skip

    return measure(step, owned, model.weights)


def test_projections_without_lora_have_no_kind_of_their_own() -> None:
    """Their matrices of rank 0 are no buffers."""
    for method in PEAKS:
        for moment in ledger(method, targets=("q_proj", "down_proj")).moments:
            assert sum(by_kind(moment, RANK).values()) == moment.held


@pytest.mark.parametrize(
    ("method", "checkpoints"),
    [*((m, kind) for m in PEAKS for kind in ("ram", "disk")), ("mesp_tiled", "offload")],
)
def test_every_living_buffer_has_a_kind(method: str, checkpoints: str) -> None:
    for moment in ledger(method, checkpoints).moments:
        found = by_kind(moment, RANK)
        assert found.keys() <= set(KINDS)
        assert sum(found.values()) == moment.held


def test_kinds_are_what_the_shapes_say() -> None:
    """At the head, store_all holds all residuals of three blocks and nothing else."""
    head = next(m for m in ledger("store_all").moments if m.op == "lm_loss")
    s, found = Shapes(CONFIG, 1, TOKENS, RANK), by_kind(head, RANK)
    expected = {
        "residual stream": 7 * s.x,  # inputs and sums of three blocks, and the last one's output
        "norms": 7 * s.x,
        "q, k, v": 3 * (s.q + 2 * s.k),
        "probabilities": 3 * s.p,
        "attention output": 3 * s.q,
        "gate, up": 6 * s.m,
        "silu, z": 6 * s.m,
        "h": 3 * s.h(s.targets),
        "labels, angles, loss": 8 * TOKENS + TOKENS * CONFIG.head_dim * 4,
    }
    assert found == Counter(expected)


def test_lora_gradients_are_told_from_activation_gradients() -> None:
    """When the last block's attention goes backward, its MLP and o_proj have theirs."""
    moment = next(m for m in ledger("mesp").moments if m.op == "attention_bwd")
    s, found = Shapes(CONFIG, 1, TOKENS, RANK), by_kind(moment, RANK)
    assert found["LoRA gradients"] == s.lora(("gate_proj", "up_proj", "down_proj", "o_proj"))
    assert found["activation gradients"] == 2 * s.x + s.q  # dy, da and do
    assert found["silu, z"] == found["h"] == found["gate, up"] == 0


def test_a_tag_of_no_op_is_refused() -> None:
    with pytest.raises(KeyError):
        kind(Entry("gelu", (2, 3), np.dtype(np.float32), 24), RANK)
