"""Training by several methods from one seed on the same batches: training and held-out loss."""

import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import init_lora
from mesp_ref.engine.model import Model
from mesp_ref.ops import Array
from mesp_ref.train.data import open_data, split_pages
from mesp_ref.train.opening import open_encoder
from mesp_ref.train.rows import Row, RowStream
from mesp_ref.train.trainer import NonFinite, TrainConfig, Trainer, evaluate

HELD_FRACTION = 0.1


class Text(NamedTuple):
    """A text file cut into rows: an endless shuffled stream to train on, and rows held out."""

    stream: Callable[[], RowStream]
    held: list[Row]
    sha256: str
    size: int


class Curve(NamedTuple):
    """What one method did with one learning rate."""

    method: str
    lr: float
    losses: list[float]  # of each step's batch, before the step
    held: list[tuple[int, float]]  # (steps done, held-out loss)
    diverged: bool
    digest: str  # SHA-256 of the losses' and the final adapter's bytes


def open_text(model: Model, path: Path, seq_len: int, held_rows: int, seed: int) -> Text:
    """A tenth of the pages is held out, of those the first `held_rows` rows are used."""
    data = open_data(path, seq_len=seq_len, vocab_size=model.config.vocab_size)
    encoder = open_encoder(model, data.kinds, datetime.now())
    train, held = split_pages(data.pages, HELD_FRACTION, seed)
    rows = RowStream(data, encoder, held, seq_len=seq_len, shuffle=False).once(held_rows)
    return Text(
        lambda: RowStream(data, encoder, train, seq_len=seq_len, seed=seed),
        list(rows), data.sha256, data.size,
    )  # fmt: skip


def race(
    model: Model,
    text: Text,
    config: TrainConfig,
    rank: int,
    every: int,
    report: Callable[[str], object],
) -> tuple[Curve, Adapter]:
    """Train a fresh adapter as `config` says, evaluated before, every `every` steps and after."""
    adapter = init_lora(model.config, rank=rank, alpha=2.0 * rank, seed=config.seed)
    trainer = Trainer(model, adapter, text.stream(), config)
    losses: list[float] = []
    held: list[tuple[int, float]] = []
    diverged = False
    for step in range(config.steps + 1):
        if step % every == 0 or step == config.steps:
            held.append((step, evaluate(model, adapter, text.held, batch_size=4).loss))
            report(
                f"{config.method}, lr {config.base_lr:g}: {step} steps, held out {held[-1][1]:.4f}"
            )
        if step == config.steps:
            break
        try:
            losses.append(trainer.advance().loss)
        except NonFinite:
            diverged = True
            break
    curve = Curve(config.method, config.base_lr, losses, held, diverged, digest(losses, adapter))
    return curve, adapter


def digest(losses: Sequence[float], adapter: Adapter) -> str:
    """SHA-256 over the bits of all losses and of the adapter: equal runs, equal digests."""
    found = hashlib.sha256(np.array(losses).tobytes())
    for name, array in adapter.weights.items():
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()


def smooth(values: Sequence[float], width: int) -> Array:
    """Centred running mean of an odd width; at the ends over the values that there are."""
    half = width // 2
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
