"""One optimiser step after another: accumulation, clipping, schedule, evaluation.

Everything random is a function of (seed, step), and everything else lies in the parameters, the
optimiser and the cursor of the data. So `Trainer.state` holds all that an exact continuation needs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.api import (
    METHODS,
    check_chunk,
    check_offload,
    check_perturbations,
    loss_and_grads,
    place_of,
    rows_at_once,
)
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import arrays_in_memory
from mesp_ref.engine.inputs import NotFinite
from mesp_ref.engine.methods import Step
from mesp_ref.engine.mezo import replay, two_sided_losses
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.lean.activations import KINDS, check_room
from mesp_ref.lean.chunks import file_size
from mesp_ref.lean.score import score
from mesp_ref.ops import Array
from mesp_ref.train.bounds import check_bounds, option
from mesp_ref.train.optim import (
    SCHEDULES,
    clip_by_global_norm,
    global_norm,
    learning_rate,
    make_optimizer,
)
from mesp_ref.train.ranks import ALONE, OwnTally, Ranks, Tally
from mesp_ref.train.rows import Cursor, Row, RowSource, as_batch

# Learning rates that suit LoRA: AdamW's is PEFT's usual one; MeZO's is the one of its paper.
DEFAULT_LR = {"adamw": 2e-4, "sgd": 1e-1, "mezo": 1e-4}


TOKENS_PER_STEP = 1 << 27  # of all batches of a step: their rows are in memory at once


_RATES = ", ".join(f"{rate:g} for {name}" for name, rate in DEFAULT_LR.items())


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Two runs of one config on the same model, data and machine give the same bits.

    lr, warmup   None: DEFAULT_LR of the optimiser (of mezo, if that is the method), and 5% of the
                 steps unless the schedule is constant
    accumulate   batches per step; the gradient is that of one batch of all their tokens
    clip         bound on the joint norm of all gradients; 0 for none. Without clipping and
                 accumulation each block is updated as soon as its gradients are complete, so only
                 one block's gradients are ever alive
    eps, perturbations   of MeZO: step of the two-sided difference, and how many of them a batch
                 is estimated from
    workers      threads that share each block, with one BLAS thread each

    Raises MespRefError naming the first field that is out of range.
    """

    method: str = option("mesp", "where gradients come from", choices=tuple(METHODS))
    optimizer: str = option("adamw", "what turns them into steps", choices=("adamw", "sgd"))
    lr: float | None = option(None, f"learning rate (default: {_RATES})")
    schedule: str = option("cosine", "of the learning rate", choices=SCHEDULES)
    warmup: int | None = option(
        None, "steps until the full learning rate (default: 5%% of the steps; 0 if constant)"
    )
    steps: int = option(100, "optimiser steps")
    batch_size: int = option(1, "sequences per batch")
    accumulate: int = option(4, "batches per step; the gradient is that of one large batch")
    seq_len: int = option(256, "tokens per sequence", metavar="T")
    clip: float = option(
        1.0, "bound on the gradient's norm (default: {default}). With 0 and --accumulate 1 each block "
        "is updated at once, and only one block's gradients are ever in memory",
    )  # fmt: skip
    weight_decay: float = option(0.0, "decoupled for adamw")
    momentum: float = option(0.0, "for sgd")
    eps: float = option(1e-2, "step of MeZO's difference")
    perturbations: int = option(
        1, "of MeZO per batch, two forwards each; the estimate is their mean"
    )
    workers: int = option(
        1, "threads that share each block, one BLAS thread each, for as many idle cores; their number "
        "decides the last bits",
    )  # fmt: skip
    checkpoints: str | None = option(
        None, "where block inputs wait for the backward (default: ram, and disk for mesp_streamed); "
        "disk: in TMPDIR, which should be no tmpfs; offload: results of projections, too, faster while "
        "they fit into the page cache",
        choices=KINDS,
    )  # fmt: skip
    chunk: int | None = option(
        None, "rows at once of mesp_streamed, whose memory they decide (default: 256 for each worker, "
        "at least 512 where weights are decoded)", metavar="ROWS",
    )  # fmt: skip
    seed: int = option(0, "decides the adapter's start, the data's order and MeZO's noise")

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoints", place_of(self.checkpoints, self.method))
        for name, described in self.__dataclass_fields__.items():
            allowed, found = described.metadata["choices"], getattr(self, name)
            if allowed and found not in allowed:
                raise MespRefError(f"{name}: found {found!r}, expected one of {', '.join(allowed)}")
        check_bounds(vars(self))
        tokens = self.batch_size * self.accumulate * self.seq_len
        if tokens > TOKENS_PER_STEP:
            raise MespRefError(
                f"batch_size: found {tokens:,} tokens a step with accumulate and seq_len, expected "
                f"at most {TOKENS_PER_STEP:,}"
            )
        if not (0 < self.base_lr < math.inf):
            raise MespRefError(f"lr: found {self.lr}, expected a positive number")
        if not (0 < self.eps < math.inf):
            raise MespRefError(f"eps: found {self.eps}, expected a positive number")
        if not (0 <= self.clip < math.inf):
            raise MespRefError(f"clip: found {self.clip}, expected a positive norm, or 0 for none")
        check_perturbations(self.perturbations, self.method)
        check_offload(self.checkpoints, self.method)
        check_chunk(self.chunk, self.method)
        self.lr_at(0)
        self.new_optimizer()

    @property
    def base_lr(self) -> float:
        """The learning rate that the schedule starts from."""
        if self.lr is not None:
            return self.lr
        return DEFAULT_LR["mezo" if self.method == "mezo" else self.optimizer]

    def score_chunk(self, model: Model) -> int | None:
        """Rows at once of an evaluation, which takes no more memory than a step."""
        return self.chunk or rows_at_once(model) if self.method == "mesp_streamed" else None

    @property
    def per_block(self) -> bool:
        """Whether each block is updated while the backward still runs."""
        return self.accumulate == 1 and not self.clip

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, …"""
        warmup = self.warmup
        if warmup is None:
            warmup = 0 if self.schedule == "constant" else self.steps // 20
        return learning_rate(
            step, base=self.base_lr, total=self.steps, warmup=warmup, schedule=self.schedule
        )

    def new_optimizer(self) -> Any:
        """A fresh optimiser."""
        return make_optimizer(
            self.optimizer, weight_decay=self.weight_decay, momentum=self.momentum
        )


class NonFinite(MespRefError):
    """A loss or gradient that is NaN or infinite. `torn`: some blocks had been updated already."""

    def __init__(self, message: str, torn: bool):
        super().__init__(message)
        self.torn = torn


class StepResult(NamedTuple):
    """What one step tells."""

    step: int  # steps done, this one included
    loss: float  # mean over the counted tokens of the step
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # counted tokens: those that are learned
    computed_tokens: int  # all that went through the model: prompts, padding and a row's first, too


class Trainer:
    """Parameters, optimiser and data of a run, moved on by `advance`.

    Trains the adapter's matrices, or with trainable="all" every weight of a model in memory (and
    the adapter's, where there is one), in place.

    Raises MespRefError where the file of a step of mesp_streamed would find no room.
    """

    def __init__(
        self,
        model: Model,
        adapter: Adapter | None,
        stream: RowSource,
        config: TrainConfig,
        trainable: str = "lora",
        ranks: Ranks = ALONE,
    ):
        self.model, self.adapter, self.stream = model, adapter, stream
        self.config, self.trainable, self.ranks = config, trainable, ranks
        self.params: dict[str, Array] = {}
        if trainable == "all":
            self.params |= arrays_in_memory(model.weights, "training all")
        if adapter is not None:
            self.params |= adapter.weights
        self.optimizer = config.new_optimizer()
        self.step, self.tokens = 0, 0
        if config.method == "mesp_streamed" and config.checkpoints == "disk":
            rows = config.batch_size * config.seq_len
            check_room(file_size(model.config, rows, model.dtype.itemsize))

    def advance(self) -> StepResult:
        """One optimiser step.

        Raises NonFinite before the parameters are touched, unless its `torn` says otherwise.
        """
        config = self.config
        self.ranks.call("advance")
        size = config.batch_size
        cursor = self.stream.cursor
        rows = self.stream.take(size * config.accumulate)
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        lr = config.lr_at(self.step)
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                if config.per_block:
                    value, norm = self._update_per_block(batches[0], lr)
                else:
                    value, norm = self._update_at_once(batches, lr)
        except NonFinite:
            self.stream.cursor = cursor
            raise
        self.step += 1
        tokens = sum(row.counted for row in rows)
        self.tokens += tokens
        computed = sum(len(batch) * max(len(row.ids) for row in batch) for batch in batches)
        return StepResult(self.step, value, lr, norm, tokens, computed)

    def _gradients(
        self, batch: Sequence[Row], part: int, on_gradients: Any = None, probe: Any = None
    ) -> tuple[float, dict[str, Array]]:
        config = self.config
        noise = np.random.SeedSequence([config.seed, 4, self.step, part])
        ids, labels, positions = as_batch(batch)
        try:
            return loss_and_grads(
                self.model,
                self.adapter,
                ids,
                labels,
                position_ids=positions,
                method=config.method,
                trainable=self.trainable,
                seed=int(noise.generate_state(1)[0]),
                eps=config.eps,
                on_gradients=on_gradients,
                checkpoints=config.checkpoints,
                chunk=config.chunk,
                perturbations=config.perturbations,
                workers=config.workers,
                probe=probe,
            )
        except NotFinite as error:  # mezo's forwards; its parameters are back where they were
            raise NonFinite(f"step {self.step + 1}: {error}; try a smaller --lr", False) from None

    def _update_at_once(self, batches: Sequence[Sequence[Row]], lr: float) -> tuple[float, float]:
        """Update all parameters when all gradients are there."""
        value, grads = self._accumulate(batches)
        clip = self.config.clip
        norm = clip_by_global_norm(grads, clip) if clip else global_norm(grads)
        self._require_finite("loss", value)
        self._require_finite("gradient norm", norm)
        self.optimizer.step(self.params, grads, lr)
        return value, norm

    def _update_per_block(self, batch: Sequence[Row], lr: float) -> tuple[float, float]:
        """Update each block's parameters when the backward has passed it."""
        square, touched = 0.0, False

        def update(layer: int, grads: dict[str, Array]) -> None:
            nonlocal square, touched
            square += global_norm(grads) ** 2
            self._require_finite("gradient norm", square, touched)
            self.optimizer.step(self.params, grads, lr)
            touched = True

        value, _ = self._gradients(batch, 0, update)
        self._require_finite("loss", value, touched)
        return value, math.sqrt(square)

    def _accumulate(self, batches: Sequence[Sequence[Row]]) -> tuple[float, dict[str, Array]]:
        """Loss and gradient of all batches as if they were one.

        L = Σ (nᵢ/n)·Lᵢ and g = Σ (nᵢ/n)·gᵢ with nᵢ counted tokens: a mean of means would weigh
        the tokens of short batches more.
        """
        counts = [sum(row.counted for row in batch) for batch in batches]
        weights = [count / sum(counts) for count in counts]
        if self.config.method == "mezo" and self.ranks.size > 1:
            losses, total = self._estimates(batches, weights)
        else:
            tally = self.ranks.tally(len(batches))
            own = [
                self._gradients(batches[part], part, _weighted(tally, weights[part]))[0]
                for part in self.ranks.parts(len(batches))
            ]
            total = tally.close()
            losses = self.ranks.in_order(own, len(batches))
        value = 0.0
        for weight, loss in zip(weights, losses, strict=True):  # sum() would compensate rounding
            value += weight * loss
        return value, total

    def _estimates(
        self, batches: Sequence[Sequence[Row]], weights: Sequence[float]
    ) -> tuple[list[float], dict[str, Array]]:
        """Losses and mezo's gradient over several ranks, which tell each other only losses.

        Each rank runs the forwards of its parts. It perturbs the parameters for the other parts, too,
        for that leaves rounding behind, which the parts after them would see in one process.
        """
        own: list[Any] = []

        def probe(step: Step) -> list[list[float]]:
            own.append(two_sided_losses(step))
            return []

        mine = self.ranks.parts(len(batches))
        for part, batch in enumerate(batches):
            try:
                self._gradients(batch, part, probe=probe if part in mine else replay)
            except NonFinite as error:
                own.append(str(error))  # all ranks are to hear of it, and to stop here
        found = self.ranks.in_order(own, len(batches))
        for text in found:
            if isinstance(text, str):
                raise NonFinite(text, False)
        tally = OwnTally()
        for part, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            self._gradients(batch, part, _weighted(tally, weight), _known(found[part]))
        return [float(np.asarray(np.mean(losses))) for losses in found], tally.close()

    def _require_finite(self, name: str, value: float, torn: bool = False) -> None:
        if not math.isfinite(value):
            raise NonFinite(
                f"step {self.step + 1}: {name}: found {value}, expected a finite number; "
                "try a smaller --lr, or --clip",
                torn,
            )

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """All that the steps to come depend on: arrays (live, not copies) and plain facts."""
        arrays = {f"param/{name}": array for name, array in self.params.items()}
        arrays |= {f"optimizer/{k}": array for k, array in self.optimizer.state_dict().items()}
        facts = {"step": self.step, "tokens": self.tokens, "cursor": list(self.stream.cursor)}
        return arrays, facts

    def restore(self, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` gave. Raises MespRefError for the state of another model."""
        for name, param in self.params.items():
            saved = arrays.get(f"param/{name}")
            if saved is None or saved.shape != param.shape or saved.dtype != param.dtype:
                found = "nothing" if saved is None else f"{saved.dtype} {list(saved.shape)}"
                raise MespRefError(
                    f"saved state: {name}: found {found}, expected {param.dtype} "
                    f"{list(param.shape)}"
                )
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise MespRefError(f"saved state: {name}: found NaN or infinity, expected numbers")
        prefix = "optimizer/"
        state = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
        self.optimizer.load_state_dict(state)
        self.optimizer.require_state_of(self.params if facts["step"] else {})
        for name, param in self.params.items():
            param[...] = arrays[f"param/{name}"]
        self.step, self.tokens = int(facts["step"]), int(facts["tokens"])
        self.stream.cursor = Cursor(*facts["cursor"])


def _weighted(tally: Tally, weight: float) -> Callable[[int, dict[str, Array]], None]:
    """A receiver of each block's gradients that adds them to a sum."""

    def add(layer: int, grads: dict[str, Array]) -> None:
        if weight != 1.0:
            for grad in grads.values():
                grad *= weight
        tally.add(grads)

    return add


def _known(losses: list[list[float]]) -> Callable[[Step], list[list[float]]]:
    """A probe of mezo where its losses are known."""
    return lambda step: losses


class Evaluation(NamedTuple):
    """What a model makes of some rows."""

    loss: float  # mean over the counted tokens
    tokens: int  # counted tokens
    accuracy: float  # share of them that the model holds for the likeliest


def evaluate(
    model: Model,
    adapter: Adapter | None,
    rows: Iterable[Row],
    batch_size: int = 1,
    progress: Callable[[int], object] = lambda rows_done: None,
    ranks: Ranks = ALONE,
    chunk: int | None = None,
) -> Evaluation:
    """Mean loss and accuracy over all counted tokens of some rows. Forward only.

    `progress` is called with the number of rows done and may raise to stop. Several `ranks` take a
    batch each, and what they find is added in the order of the batches. With `chunk` a longer batch is
    walked in chunks of so many rows, as mesp_streamed does.
    Raises MespRefError when no token counts.
    """
    total, tokens, right, done, number = 0.0, 0, 0, 0, 0
    coming = iter(rows)
    while taken := list(islice(coming, batch_size * ranks.size)):
        batches = [taken[i : i + batch_size] for i in range(0, len(taken), batch_size)]
        found = ranks.scores(
            number, batches, lambda batch: score_batch(model, adapter, batch, chunk)
        )
        for batch, (value, first) in zip(batches, found, strict=True):
            counted = sum(row.counted for row in batch)
            total, right = total + counted * value, right + first
            tokens += counted
        done, number = done + len(taken), number + len(batches)
        progress(done)
    if not tokens:
        raise MespRefError("evaluation: found no token to count, expected at least one")
    return Evaluation(total / tokens, tokens, right / tokens)


def score_batch(
    model: Model, adapter: Adapter | None, batch: Sequence[Row], chunk: int | None = None
) -> tuple[float, int]:
    """Mean loss of one batch and how many of its tokens the model holds for the likeliest."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        value, first = score(model, adapter, *as_batch(batch), chunk=chunk)
    return value, first


def perplexity(value: float) -> float:
    """exp(loss): how many tokens the model hesitates between. Infinity instead of an overflow."""
    return math.exp(value) if value < 700 else math.inf
