"""Twenty steps of each method on a tiny model, and a hash of what they leave: run on several ranks.

usage: steps.py RANKS, under mpiexec, or without it for one process with RANKS times as many batches
"""

import hashlib
import json
import sys

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import init_lora
from mesp_ref.files.models import random_model
from mesp_ref.train.ranks import ALONE, Ranks
from mesp_ref.train.rows import Cursor, Row
from mesp_ref.train.trainer import TrainConfig, Trainer, evaluate

CONFIG = Qwen2Config(
    vocab_size=97, hidden_size=24, intermediate_size=56, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, head_dim=6,
)  # fmt: skip
CASES = [
    ("mesp", "ram", 1), ("mesp", "disk", 1), ("mesp_tiled", "ram", 1), ("mesp_tiled", "disk", 1),
    ("mezo", "ram", 1), ("mesp", "ram", 2), ("mezo", "ram", 2),
]  # fmt: skip
STEPS = 20


def rows() -> list[Row]:
    """Rows of different lengths: the weights of the batches differ."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(5, 20, 31)
    return [Row(ids := rng.integers(0, 97, n), ids.copy()) for n in lengths]


class Cycle:
    """The rows over and over."""

    def __init__(self) -> None:
        self.rows, self.cursor = rows(), Cursor(0, 0, 0)
        self.at = 0

    def take(self, count: int) -> list[Row]:
        found = [self.rows[(self.at + i) % len(self.rows)] for i in range(count)]
        self.at += count
        return found


def run(method: str, checkpoints: str, accumulate: int, ranks: Ranks = ALONE) -> str:
    """The hash of parameters, optimiser and losses after 20 steps, and of an evaluation."""
    model = random_model(CONFIG, seed=1, dtype="float32")
    adapter = init_lora(CONFIG, rank=3, alpha=6.0, seed=2, dtype="float32")
    for name, array in adapter.weights.items():
        if "lora_B" in name:  # not zero, so that every gradient is there from the first step on
            array[...] = np.random.default_rng(len(name)).standard_normal(array.shape) / 9
    config = TrainConfig(
        method=method, steps=STEPS, accumulate=accumulate, checkpoints=checkpoints, lr=1e-2,
        perturbations=2 if method == "mezo" else 1, seq_len=32,
    )  # fmt: skip
    trainer = Trainer(model, adapter, Cycle(), config, ranks=ranks)
    digest = hashlib.sha256()
    for _ in range(STEPS):
        obey(ranks)
        result = trainer.advance()
        digest.update(repr((result.loss, result.grad_norm)).encode())
    for name, array in sorted(trainer.state()[0].items()):
        digest.update(name.encode() + array.tobytes())
    if ranks.rank == 0:
        held = rows()[:7]
        digest.update(repr(evaluate(model, adapter, held, 2, ranks=ranks)).encode())
    else:
        help_to_evaluate(trainer, ranks)
    return digest.hexdigest()


def obey(ranks: Ranks) -> None:
    """Hear what rank 0 does: here all know it."""
    if ranks.rank:
        assert ranks.listen()[0] == "advance"  # type: ignore[attr-defined]


def help_to_evaluate(trainer: Trainer, ranks: Ranks) -> None:
    """Rank r's part of the evaluation, for as many rounds as 4 batches take."""
    from mesp_ref.spread.ranks import score_share

    for _ in range(-(-4 // ranks.size)):
        command, first = ranks.listen()  # type: ignore[attr-defined]
        assert command == "scores"
        score_share(trainer.model, trainer.adapter, rows()[:7], 2, first, ranks)


def main() -> None:
    from mesp_ref.spread.start import join

    ranks, watch = join({}, 60)
    hashes = [run(method, place, a * ranks.size, ranks) for method, place, a in CASES]
    if ranks.rank == 0:
        print(json.dumps(hashes))
    ranks.part()
    if watch is not None:
        watch.wait()


if __name__ == "__main__":
    sys.exit(main())
