"""One cell of a table: a shape, a sequence length and a rank, and what each method costs there.

Memory is the ledger's, array by array, and needs no quiet machine; time does. What has been
measured is kept in $MESP_REF_CACHE (default ~/.cache/mesp_ref) under a digest of the engine's
sources: a run that was broken off goes on where it stopped, and a changed engine starts anew.
"""

import gc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from common import (
    SHAPES,
    Gemms,
    adapter_and_batch,
    gemms,
    interleaved,
    median,
    random_weights,
    total_flops,
)

import mesp_ref as mr
from mesp_ref.api import METHODS, OnGradients, Step, new_step
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import MESP
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.inputs import check_batch
from mesp_ref.engine.methods import mesp
from mesp_ref.engine.model import Model
from mesp_ref.files.models import cache_directory
from mesp_ref.files.output import write_aside
from mesp_ref.lean.activations import open_checkpoints
from mesp_ref.memory import Ledger, Shapes, measure, peak
from mesp_ref.ops import Array
from mesp_ref.train.ranks import Ranks

STORE_H, DISK = "mesp, h stored", "mesp_tiled, disk"
VARIANTS = (*METHODS, STORE_H, DISK)
PYTHON = 96 * 1024  # bytes of Python objects that tracemalloc may see beside the arrays
LR = 1e-4
_ENGINE = "ops", "engine", "lean", "memory"


class Cell(NamedTuple):
    """A published shape, or the same with another depth or vocabulary, at one length and rank.

    shape     a size of Qwen2.5, or the whole name of another shape
    """

    shape: str = "0.5B"
    tokens: int = 256
    rank: int = 8
    layers: int | None = None  # None: as published
    vocabulary: int | None = None

    @property
    def config(self) -> Qwen2Config:
        name = f"qwen2.5-{self.shape.lower()}"
        config = SHAPES[name if name in SHAPES else self.shape]
        if self.layers:
            kinds = config.layer_types
            if kinds:  # such that the last has no window
                end = kinds.index("full_attention") + 1
                kinds = kinds[end - self.layers : end]
            config = replace(config, num_hidden_layers=self.layers, layer_types=kinds)
        return replace(config, vocab_size=self.vocabulary) if self.vocabulary else config

    def __str__(self) -> str:
        c = self.config
        size = f"{c.num_hidden_layers} blocks, vocabulary {c.vocab_size:,}"
        return f"{self.shape}, {self.tokens} tokens, rank {self.rank}, {size}"


def mesp_dropping(drop: frozenset[str]) -> Callable[[Step], Array]:
    """methods.mesp with another drop set: its very code, to which MESP means `drop`."""
    return FunctionType(mesp.__code__, mesp.__globals__ | {"MESP": drop})


def run(model: Model, adapter: Adapter, ids: Array, variant: str, emit: OnGradients) -> None:
    """One step on a batch that is its own labels; each block's gradients go to `emit`."""
    if variant == STORE_H:
        with open_checkpoints("ram") as stack:
            batch = check_batch(model.config, ids, ids)
            step = new_step(model, adapter, *batch, emit, params=False, stack=stack)
            mesp_dropping(MESP - {"h"})(step)
        return
    checkpoints = "disk" if variant in (DISK, "mesp_streamed") else "ram"
    method = "mesp_tiled" if variant == DISK else variant
    mr.loss_and_grads(
        model, adapter, ids, ids, method=method, checkpoints=checkpoints, on_gradients=emit
    )


class Peak(NamedTuple):
    """What a step held at its fullest. Bytes."""

    total: int
    op: str  # the op that ran
    held: dict[str, int]  # alive when it was called, by the ledger's tag
    added: int  # its results and scratch
    traced: int  # tracemalloc's own peak, Python objects included
    head: int  # most while the LM head and loss ran
    predicted: int | None  # closed form; it does not know MeSP with h stored


def measure_peak(config: Qwen2Config, tokens: int, rank: int, variant: str) -> Peak:
    """The ledger of one step on weights of zeros, which no page of memory is touched for."""
    shapes = config.weight_shapes().items()
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes}
    adapter = mr.init_lora(config, rank, b_std=0.02)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens))
    owned = [*adapter.weights.values(), ids]
    model, predicted = Model(config, weights), predict(config, tokens, rank, variant)

    def found() -> Peak:
        gc.collect()
        step = partial(run, model, adapter, ids, variant, lambda *_: None)
        ledger = measure(step, owned, weights)
        return _peak(ledger, predicted)

    once = found()
    if once.traced > once.total + PYTHON:  # a table of the interpreter grew meanwhile: once more
        once = min(once, found(), key=lambda peak: peak.traced)
    if once.traced > once.total + PYTHON:  # no: more lived between two ops than in any
        added = once.traced - sum(once.held.values())
        return once._replace(total=once.traced, op="between ops", added=added)
    return once


def predict(config: Qwen2Config, tokens: int, rank: int, variant: str) -> int | None:
    """The closed form's peak in bytes."""
    if variant == STORE_H:
        return None
    shapes = Shapes(config, 1, tokens, rank, disk=variant in (DISK, "mesp_streamed"))
    return peak("mesp_tiled" if variant == DISK else variant, shapes).total


def _peak(ledger: Ledger, predicted: int | None) -> Peak:
    fullest = max(ledger.moments, key=lambda moment: moment.held + moment.added)
    traced = max(max(moment.between, moment.traced + moment.added) for moment in ledger.moments)
    head = [moment.held + moment.added for moment in ledger.moments if moment.op == "lm_loss"]
    return Peak(
        ledger.peak, fullest.op, dict(fullest.parts()), fullest.added, traced, max(head), predicted
    )


def products(config: Qwen2Config, tokens: int, rank: int, variant: str) -> Gemms:
    """Every matrix product of one step of a variant."""
    if variant == DISK:
        return gemms(config, "mesp_tiled", tokens, rank, checkpoints="disk")
    if variant != STORE_H:
        return gemms(config, variant, tokens, rank)
    shapes, rebuilt = config.weight_shapes(), Gemms()
    for path in PROJECTIONS.values():
        inner = shapes[f"model.layers.0.{path}.weight"][1]
        rebuilt[tokens, inner, rank] += config.num_hidden_layers
    return gemms(config, "mesp", tokens, rank) - rebuilt


class Time(NamedTuple):
    """What timing a variant gave: medians over the rounds, and their spread."""

    seconds: float
    least: float
    most: float
    rate: float  # FLOP/s of the GEMM probe beside it, on the step's own shapes
    flops: int

    @property
    def of_gemm(self) -> float:
        """In units of what its matrix products alone take at that rate."""
        return self.seconds * self.rate / self.flops


def step_and_update(model: Model, adapter: Adapter, ids: Array, variant: str) -> None:
    """One training step: SGD on each block's LoRA matrices as soon as their gradients are there."""

    def update(number: int, grads: dict[str, Array]) -> None:
        for name, grad in grads.items():
            grad *= LR
            adapter.weights[name] -= grad

    run(model, adapter, ids, variant, update)


@dataclass
class Cache:
    """Measurements by what was measured, in one JSON file that is replaced after each.

    rank   of several processes that measure together: each writes a file of its own, reads all
    """

    path: Path
    rank: int = 0

    def get(self, kind: str, cell: Cell, variant: str) -> Any:
        """The stored measurement, or None."""
        found = self._read().get(f"{kind}: {cell}: {variant}")
        return found and found["value"]

    def put(self, kind: str, cell: Cell, values: dict[str, Any]) -> None:
        """Store measurements of variants that belong together."""
        own = self.path.with_stem(f"{self.path.stem}-rank-{self.rank}") if self.rank else self.path
        known, today = _stored(own), date.today().isoformat()
        for variant, value in values.items():
            known[f"{kind}: {cell}: {variant}"] = {"value": value, "date": today}
        own.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(own) as aside:
            aside.write_text(json.dumps(known, indent=1), encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(self.path.parent.glob(f"{self.path.stem}*.json")):
            found |= _stored(path)
        return found


def _stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def open_cache(rank: int = 0) -> Cache:
    """The cache for this engine and this NumPy."""
    root = Path(mr.__file__).parent
    files = [file for name in _ENGINE for file in sorted((root / name).rglob("*.py"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    digest.update(f"{np.__version__} {os.cpu_count()}".encode())
    return Cache(cache_directory() / f"benchmarks-{digest.hexdigest()[:12]}.json", rank)


class Bench:
    """Measures cells once, remembers them, says what it does."""

    def __init__(self, rounds: int = 3, cache: Cache | None = None):
        self.rounds, self.cache = rounds, cache or open_cache()
        self._loaded: tuple[Qwen2Config, Model] | None = None

    def peak(self, cell: Cell, variant: str) -> Peak:
        """The measured peak of one variant."""
        stored = self.cache.get("memory", cell, variant)
        if stored is None:
            self._loaded = None
            stored = list(measure_peak(cell.config, cell.tokens, cell.rank, variant))
            print(f"memory: {cell}: {variant}: {stored[0] / 1e6:.2f} MB", flush=True)
            self.cache.put("memory", cell, {variant: stored})
        return Peak(*stored)

    def peaks(
        self, wanted: Sequence[tuple[Cell, str]], ranks: Ranks
    ) -> dict[Cell, dict[str, Peak]]:
        """The measured peaks of variants in cells, shared by all ranks."""
        found: dict[Cell, dict[str, Peak]] = {}
        peaks = ranks.shared(wanted, lambda both: self.peak(*both))
        for (cell, variant), measured in zip(wanted, peaks, strict=True):
            found.setdefault(cell, {})[variant] = measured
        return found

    def times(self, cell: Cell) -> dict[str, Time]:
        """The methods timed in turns, after one step that counts for nothing.

        The cell that most tables share also has the other variants.
        """
        variants = VARIANTS if cell == Cell() else tuple(METHODS)
        blas = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("OPENBLAS_"))
        kind = f"seconds, {self.rounds} rounds of {', '.join(variants)} {' '.join(blas)}"
        stored = {name: self.cache.get(kind, cell, name) for name in variants}
        if None in stored.values():
            print(f"time: {cell}", flush=True)
            found = self._time(cell, variants)
            stored = {name: list(time) for name, time in found.items()}
            self.cache.put(kind, cell, stored)
        return {name: Time(*values) for name, values in stored.items()}

    def _time(self, cell: Cell, variants: Sequence[str]) -> dict[str, Time]:
        config, model = cell.config, self._model(cell.config)
        adapter, ids, _ = adapter_and_batch(config, cell.tokens, cell.rank)
        probes = {name: products(config, cell.tokens, cell.rank, name) for name in variants}
        steps = {name: partial(step_and_update, model, adapter, ids, name) for name in variants}
        steps[variants[0]]()
        timed = interleaved(steps, self.rounds, 0, probes, partial(print, " ", flush=True))
        return {
            name: Time(
                median(all_of), min(all_of), max(all_of), median(timed.rates[name]),
                total_flops(probes[name]),
            )
            for name, all_of in timed.seconds.items()
        }  # fmt: skip

    def _model(self, config: Qwen2Config) -> Model:
        """Random weights, kept until another shape is asked for."""
        if self._loaded is None or self._loaded[0] != config:
            self._loaded = None
            self._loaded = config, Model(config, random_weights(config))
        return self._loaded[1]
