"""A long run does not grow: 2,000 steps, every byte counted. Slow: some minutes."""

import gc
import tracemalloc
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.config import Qwen2Config
from mesp_ref.memory import Ledger, resident
from mesp_ref.train.rows import Row
from mesp_ref.train.trainer import TrainConfig, Trainer

CONFIG = Qwen2Config(211, 32, 96, 2, 4, 2, 8)
STEPS, LOOK = 2000, 200


class _Rows:
    """Rows of random tokens without end."""

    cursor = None

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def take(self, count: int) -> list[Row]:
        found = [self.rng.integers(0, CONFIG.vocab_size, 24) for _ in range(count)]
        return [Row(ids, ids) for ids in found]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", ["ram", "disk"])
def test_memory_is_flat_over_two_thousand_steps(checkpoints: str, capsys: Any) -> None:
    """tracemalloc and the ledger of a step are the same after 2,000 steps; RssAnon within 2%."""
    config = TrainConfig(method="mesp_tiled", steps=STEPS + 1, seq_len=24, checkpoints=checkpoints,
                         schedule="constant")  # fmt: skip
    adapter = mr.init_lora(CONFIG, rank=4, b_std=0.1)
    trainer = Trainer(mr.random_model(CONFIG), adapter, _Rows(), config)  # type: ignore[arg-type]
    seen: list[tuple[int, int, int]] = []  # tracemalloc between steps, its peak, RssAnon
    for _ in range(LOOK):  # caches fill
        trainer.advance()
    first = _ledger(trainer)
    tracemalloc.start()
    try:
        trainer.advance()
        for _ in range(STEPS // LOOK):
            tracemalloc.reset_peak()
            for _ in range(LOOK):
                trainer.advance()
            gc.collect()
            seen.append((*tracemalloc.get_traced_memory(), resident().anonymous))
    finally:
        tracemalloc.stop()
    with capsys.disabled():
        print(
            f"\n{checkpoints}: traced, peak, RssAnon: {seen[0]} after {LOOK} steps, "
            f"{seen[-1]} after {STEPS}"
        )
    arrays = [a.nbytes for a in adapter.weights.values()]
    assert seen[-1][0] - seen[0][0] < min(arrays)  # not even the smallest array more
    assert seen[-1][1] - seen[0][1] < min(arrays)
    assert _ledger(trainer) == first
    assert seen[-1][2] <= 1.02 * seen[0][2]


def _ledger(trainer: Trainer) -> list[tuple[str, int]]:
    """Every op of a step and the bytes that live when it is called."""
    model, adapter = trainer.model, trainer.adapter
    assert adapter is not None
    optimizer = trainer.optimizer.state_dict().values()
    weights = [model.weights(name) for name in model.weights.names()]
    with Ledger([*weights, *adapter.weights.values(), *optimizer]) as ledger:
        trainer.advance()
    return [(moment.op, moment.held) for moment in ledger.moments]
