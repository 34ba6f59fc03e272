"""Every method from one seed on one model and the same batches: what each costs, what it gives."""

import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.api import METHODS, loss_and_grads
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import init_lora, parse_targets
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.figure import METHOD_COLOURS, new_figure
from mesp_ref.files.models import load_model
from mesp_ref.files.output import write_aside
from mesp_ref.job.directory import finite
from mesp_ref.job.metrics import Event
from mesp_ref.job.report import Reporter
from mesp_ref.job.state import model_fingerprint
from mesp_ref.ops import Array
from mesp_ref.train.data import DataFile
from mesp_ref.train.opening import open_stream
from mesp_ref.train.ranks import ALONE, Ranks
from mesp_ref.train.rows import Batch, Cursor, Row, as_batch
from mesp_ref.train.trainer import DEFAULT_LR, TOKENS_PER_STEP, TrainConfig, Trainer

REFERENCE = "store_all"


@dataclass(frozen=True)
class CompareOptions:
    """What `mesp-ref compare` is told, see its --help."""

    model: str | None
    data: Path
    train: TrainConfig = field(default_factory=TrainConfig)
    mezo_lr: float = DEFAULT_LR["mezo"]
    perturbations: int = 1
    rank: int = 8
    alpha: float = 16.0
    targets: str = "all"
    dtype: str = "float32"
    form: str = "auto"
    packing: str = "auto"


def compare(
    options: CompareOptions,
    report: Callable[[Event], object] = lambda event: None,
    ranks: Ranks = ALONE,
) -> dict[str, Event]:
    """Facts by method: gradient agreement, peak memory, losses, seconds per step.

    Gradients   of the first batch, at an adapter whose B is random (at B = 0 all of dA is 0),
                against store_all's; losses and times from the usual start
    Memory      tracemalloc's peak of one step above weights, LoRA and optimiser, each block's
                gradients used as they come
    Time        median over the steps; the methods take turns, so a slow minute slows all of them
    Ranks       several share out the methods, each with store_all's gradients beside its own
    Raises      MespRefError for whatever is wrong with model, data or options
    """
    report = Reporter(report)
    model = load_model(options.model, dtype=options.dtype)
    rows, data = _rows(options, model)
    ranks.alike({"model": model_fingerprint(model), "data": data.sha256})
    names = list(METHODS)
    own = [names[part] for part in ranks.parts(len(names))]
    trainers = {name: _trainer(options, model, rows, name) for name in own}
    batch = as_batch(rows[: options.train.batch_size])
    found: dict[str, Event] = {name: {} for name in own}
    report({"event": "comparing", "what": "gradients"})
    start = _adapter(options, model, b_std=0.02)
    reference = _gradients(model, start, batch, REFERENCE, options)
    for name, facts in found.items():
        facts |= agreement(
            _gradients(model, start.astype(options.dtype), batch, name, options), reference
        )
    for name, facts in found.items():
        facts["peak_bytes"] = _peak(model, _adapter(options, model), batch, name, options)
    for name, raced in _race(trainers, options.train.steps, report).items():
        found[name] |= raced
    return dict(zip(names, ranks.in_order(list(found.values()), len(names)), strict=True))


def _adapter(options: CompareOptions, model: Model, b_std: float = 0.0) -> Adapter:
    return init_lora(
        model.config, rank=options.rank, alpha=options.alpha, seed=options.train.seed,
        targets=parse_targets(options.targets), b_std=b_std, dtype=options.dtype,
    )  # fmt: skip


class _Replay:
    """Rows drawn once, for every method to train on."""

    def __init__(self, rows: list[Row]):
        self.rows, self.cursor = rows, Cursor()

    def take(self, count: int) -> list[Row]:
        first = self.cursor.row
        self.cursor = Cursor(row=first + count)
        return self.rows[first : first + count]


def _rows(options: CompareOptions, model: Model) -> tuple[list[Row], DataFile]:
    """All that is trained on, and where it comes from."""
    train = options.train
    needed = train.steps * train.batch_size * train.seq_len
    if needed > TOKENS_PER_STEP:  # kept, for every method sees the same
        raise MespRefError(
            f"steps: found {needed:,} tokens with batch_size and seq_len, expected at most "
            f"{TOKENS_PER_STEP:,}"
        )
    stream = open_stream(
        model, options.data, seq_len=train.seq_len, form=options.form,
        packing=options.packing, seed=train.seed,
    )  # fmt: skip
    stream.require_full_row()
    return stream.take(train.steps * train.batch_size * train.accumulate), stream.data


def _settings(options: CompareOptions, method: str) -> TrainConfig:
    """What a method trains with: MeZO has a rate of its own, and alone averages."""
    train = replace(options.train, method=method, checkpoints=None)
    if method != "mezo":
        return train
    return replace(train, lr=options.mezo_lr, perturbations=options.perturbations)


def _trainer(options: CompareOptions, model: Model, rows: list[Row], method: str) -> Trainer:
    return Trainer(model, _adapter(options, model), _Replay(rows), _settings(options, method))


def _gradients(
    model: Model, adapter: Adapter, batch: Batch, method: str, options: CompareOptions, **more: Any
) -> dict[str, Array]:
    train = _settings(options, method)
    return loss_and_grads(
        model, adapter, batch.ids, batch.labels, method=method, seed=train.seed, eps=train.eps,
        perturbations=train.perturbations, checkpoints=train.checkpoints,
        position_ids=batch.positions, **more,
    )[1]  # fmt: skip


def agreement(grads: Mapping[str, Array], reference: Mapping[str, Array]) -> Event:
    """How near gradients are to the reference, all tensors taken as one vector.

    Returns   bit_identical; cosine (None where one of the two is 0); largest_difference of any
              entry; relative_difference, that over the largest entry of the reference;
              within_rounding, whether that is at most 1024 units of the last place: mesp_tiled on
              the default checkpoint differs by 6 of them
    """
    dot = square = size = worst = largest = 0.0
    same = True
    for name, want in reference.items():
        got = grads[name]
        same = same and got.tobytes() == want.tobytes()
        g, r = got.astype(np.float64).reshape(-1), want.astype(np.float64).reshape(-1)
        dot, square, size = dot + float(g @ r), square + float(g @ g), size + float(r @ r)
        worst = float(np.maximum(worst, np.abs(g - r).max()))  # NaN stays; max() drops it
        largest = max(largest, float(np.abs(r).max()))
    relative = worst / largest if largest else worst
    product = float(np.sqrt(square) * np.sqrt(size))
    return {
        "bit_identical": same,
        "cosine": finite(dot / product) if product else None,
        "largest_difference": finite(worst),
        "relative_difference": finite(relative),
        "within_rounding": relative <= 1024 * float(np.finfo(want.dtype).eps),
    }


def describe_gradient(method: str, facts: Event) -> str:
    """What `agreement` found, in two words."""
    if method == REFERENCE:
        return "the reference"
    if facts["bit_identical"]:
        return "bit-identical"
    if method == "mezo":
        return "an estimate"
    return "within rounding" if facts["within_rounding"] else "ANOTHER GRADIENT"


def _peak(
    model: Model, adapter: Adapter, batch: Batch, method: str, options: CompareOptions
) -> int:
    """Most bytes that NumPy held at once during one step."""
    if tracemalloc.is_tracing():
        raise MespRefError("tracemalloc: found it running, expected it off to measure peaks")
    tracemalloc.start()
    try:
        _gradients(model, adapter, batch, method, options, on_gradients=lambda block, grads: None)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _race(
    trainers: Mapping[str, Trainer], steps: int, report: Callable[[Event], object]
) -> dict[str, Event]:
    """Train by every method, one step each in turn."""
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for step in range(1, steps + 1):
        for name, trainer in trainers.items():
            begin = time.perf_counter()
            losses[name].append(trainer.advance().loss)
            seconds[name].append(time.perf_counter() - begin)
        report({"event": "comparing", "what": "training", "step": step, "of": steps})
    return {
        name: {"seconds_per_step": statistics.median(seconds[name]), "losses": losses[name]}
        for name in trainers
    }


def plot_comparison(
    path: Path, found: Mapping[str, Event], title: str, overwrite: bool = True
) -> None:
    """Losses, memory and time in one figure."""
    with new_figure(figsize=(11, 4.4), dpi=120, layout="constrained") as figure:
        figure.suptitle(title)
        _draw(figure, found)
        with write_aside(path, overwrite=overwrite) as aside:
            figure.savefig(aside, format="png")


def _draw(figure: Any, found: Mapping[str, Event]) -> None:
    """Curves on the left, bars beside them."""
    curves, memory, clock = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    names = list(found)
    for i, name in enumerate(names):
        losses = found[name]["losses"]  # equal curves lie on each other: thick below thin
        width = 1.3 + 1.8 * (len(names) - 1 - i)
        label = f"{name}: {describe_gradient(name, found[name])}"
        curves.plot(
            range(1, len(losses) + 1), losses, color=METHOD_COLOURS[name], lw=width, label=label
        )
    curves.set(title="loss", xlabel="step", ylabel="training loss, nats per token")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(alpha=0.3)
    figure.legend(
        *curves.get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=3,
        fontsize=8, title="gradient of the first batch", alignment="left",
    )  # fmt: skip  # below, where no curve crosses it
    bars = (
        (memory, "peak memory, MB", [found[n]["peak_bytes"] / 1e6 for n in names]),
        (clock, "seconds per step", [found[n]["seconds_per_step"] for n in names]),
    )
    for axes, label, values in bars:
        drawn = axes.barh(names, values, color=[METHOD_COLOURS[name] for name in names])
        axes.bar_label(drawn, fmt="%.3g", padding=3)
        axes.set(
            title=label.partition(",")[0].removeprefix("peak "),
            xlabel=label,
            xlim=(0, 1.4 * max(values)),
        )
        axes.invert_yaxis()
