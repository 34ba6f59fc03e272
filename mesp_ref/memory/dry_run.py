"""A step of a method over ghosts: nothing is computed, and a ledger is kept as of a real one.

Nothing here knows how a method works. It gets the step that it always gets, of the same halves and the
same head, with ghosts for arrays, weights and noise.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import adapter_shapes
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.methods import Step
from mesp_ref.engine.model import EMBEDDING, Model
from mesp_ref.files.checkpoint import is_gain
from mesp_ref.lean.activations import Checkpoints
from mesp_ref.lean.chunks import Chunk, Stream
from mesp_ref.lean.steps import METHODS, by_block, new_step
from mesp_ref.lean.workers import Item, Result, Workers
from mesp_ref.memory.base import Store
from mesp_ref.memory.ghost import Ghost, Meter, born, uncounted
from mesp_ref.memory.ledger import Ledger
from mesp_ref.memory.shapes import Shapes

_DTYPES = {2: np.float16, 4: np.float32, 8: np.float64, 16: np.complex128}  # by bytes


class DryRun(NamedTuple):
    """What a step over ghosts tells."""

    ledger: Ledger
    beside: dict[int, int]  # by the number of a moment: bytes that other workers add to it
    file: int  # bytes that went to a temporary file
    flops: int  # of products of matrices, two for a multiply-add


def dry_run(method: str, s: Shapes) -> DryRun:
    """A step of a method over ghosts, all of its blocks."""
    meter = Meter()
    stack = _Elsewhere(s.offload) if s.disk else Checkpoints()
    ledger = Ledger(meter=meter)
    team = _Team(ledger, meter)
    step = _step(method, s, meter, stack, Workers(s.workers, team.each))
    ledger.owned, ledger.weights = [step.ids], step.model.weights
    with ledger:
        METHODS[method](_with_angles(step, ledger, meter, s.packed))
    return DryRun(ledger, team.beside, getattr(stack, "size", 0), meter.flops)


class GhostTable:
    """A frozen weight without numbers: indexing books what decoding that part of its file takes."""

    def __init__(
        self, meter: Meter, shape: tuple[int, ...], dtype: np.dtype, store: Store,
        gain: bool = False,
    ):  # fmt: skip
        self.meter, self.shape, self.dtype, self._store = meter, shape, dtype, store
        self._gain = (
            gain and store.dtype is not None
        )  # 1 + w of a file is formed when it is asked for

    def __getitem__(self, index: Any) -> Ghost:
        given, store = uncounted(self.meter, self.shape, self.dtype)[index], self._store
        size = self.dtype.itemsize
        fresh = self._gain or store.decoded(1, itemsize=size)
        if isinstance(index, np.ndarray) or not fresh:
            return given
        if store.affine is None:
            return born(self.meter, given.shape, self.dtype)
        columns, g = (
            slice(None) if not isinstance(index, tuple) else index[1],
            store.affine.group_size,
        )
        start, stop, _ = columns.indices(self.shape[1])
        width, skip = -(-stop // g) * g - start // g * g, start % g  # columns come by whole groups
        whole = born(self.meter, (len(given), width), self.dtype)
        self.meter.pass_by(store.scratch(len(given), width, size))
        return whole[:, skip : skip + stop - start]


class Noise(np.random.Generator):
    """A generator whose normal numbers are ghosts; `np.random.default_rng` takes it for a seed."""

    def __init__(self, meter: Meter):
        super().__init__(np.random.PCG64(0))
        self._meter = meter

    def standard_normal(self, size: Any = None, dtype: Any = None, out: Any = None) -> Any:
        return born(self._meter, size, np.dtype(dtype))


class _Elsewhere(Checkpoints):
    """Checkpoints on disk: no memory of the process; their bytes are counted."""

    halves = True

    def __init__(self, offload: bool):
        super().__init__()
        self.offload, self.size = offload, 0

    def keep(self, x: Any) -> Any:
        x = x.contiguous()  # what is written; a copy lives as long as that takes
        self.size += x.nbytes
        return uncounted(x.meter, x.shape, x.dtype)

    def room(self, shape: tuple[int, ...], dtype: np.dtype, like: Any = None) -> Any:
        self.size += math.prod(shape) * dtype.itemsize
        return uncounted(like.meter, shape, dtype)


class _Team:
    """Workers in turn, counted as if all were at their worst at once: a bound from above.

    beside    by the number of a moment in one worker's share: bytes that the others add to it
    """

    def __init__(self, ledger: Ledger, meter: Meter):
        self._ledger, self._meter = ledger, meter
        self.beside: dict[int, int] = {}

    def each(self, f: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        meter, moments = self._meter, self._ledger.moments
        most, start, found, shares = meter.most, meter.live, [], []
        for item in items:
            begun, first = meter.live, len(moments)
            meter.reset_peak()
            found.append(f(item))
            top = max([meter.most, *(moment.most for moment in moments[first:])])
            shares.append((range(first, len(moments)), begun, top - begun))
        growth = sum(grown for _, _, grown in shares)
        for span, begun, grown in shares:  # what those before left is part of what they added
            self.beside |= dict.fromkeys(span, growth - grown - (begun - start))
        meter.most = max(most, start + growth)
        return found


def _step(method: str, s: Shapes, meter: Meter, stack: Checkpoints, workers: Workers) -> Step:
    """The step that a method gets, of ghosts."""
    model, adapter = _model(s, meter), _adapter(s, meter)
    ids = np.zeros((s.batch, s.tokens), np.int64)
    positions = ids + np.arange(s.tokens) if s.packed else None  # one document sees the most keys
    step = new_step(
        model, adapter, ids, ids, lambda number, grads: None,
        params=False, method=method, stack=stack, workers=workers, positions=positions,
        chunk=s.at_once,
    )  # fmt: skip
    seeds: Any = (Noise(meter),)
    return step._replace(parameters=by_block(adapter.weights, model), seeds=seeds)


def _model(s: Shapes, meter: Meter) -> Model:
    model, dtype = Model(s.config, {}), np.dtype(_DTYPES[s.itemsize])

    def store(name: str, shape: tuple[int, ...]) -> Store:
        if name in (model.head, EMBEDDING):
            return s.base.head
        return s.base.matrices if len(shape) == 2 else s.base.vectors

    tables: dict[str, Any] = {
        name: GhostTable(meter, shape, dtype, store(name, shape), is_gain(name, s.config))
        for name, shape in s.config.weight_shapes().items()
    }
    return dataclasses.replace(model, weights=tables)


def _adapter(s: Shapes, meter: Meter) -> Adapter:
    dtype, shapes = np.dtype(_DTYPES[s.itemsize]), adapter_shapes(s.config, s.rank, s.targets)
    matrices: dict[str, Any] = {n: uncounted(meter, shape, dtype) for n, shape in shapes.items()}
    return Adapter(s.rank, 2.0 * s.rank, s.targets, False, matrices)


def _with_angles(step: Step, ledger: Ledger, meter: Meter, packed: bool) -> Step:
    """The step with ghosts for its cosines and sines, which belong to it or to a chunk: a pair for
    each kind of layer."""
    if isinstance(step.checkpoints, Stream):
        return step._replace(
            checkpoints=_with_angles_of_chunks(step.checkpoints, ledger, meter, packed)
        )
    angles: dict[int, Any] = {}
    for layer in step.layers:
        if id(layer.cos) not in angles:
            pair = tuple(born(meter, layer.cos.shape, layer.cos.dtype) for _ in "cs")
            angles[id(layer.cos)] = pair
            if not packed:  # else they were taken from the op's tables, by position
                ledger.note("rope_tables", pair)
    pairs = [(layer, angles[id(layer.cos)]) for layer in step.layers]
    layers = [layer._replace(cos=cos, sin=sin) for layer, (cos, sin) in pairs]
    return step._replace(layers=layers)


def _with_angles_of_chunks(stream: Stream, ledger: Ledger, meter: Meter, packed: bool) -> Stream:
    """The stream with ghosts for the cosines and sines of every chunk."""

    def layer(number: int, chunk: Chunk) -> Layer:
        found = stream.layer(number, chunk)
        angles: list[Any] = [born(meter, x.shape, x.dtype) for x in (found.cos, found.sin)]
        if not packed:
            ledger.note("rope_tables", tuple(angles))
        return found._replace(cos=angles[0], sin=angles[1])

    return stream._replace(layer=layer)
