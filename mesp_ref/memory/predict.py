"""Peak memory of a step from its shapes alone: the very same methods, run over ghosts.

The step is one forward and backward of LoRA over a mapped base; gradients are handed over block by
block. Nothing here knows how a method works: it runs with ghosts for arrays (ghost.py) and a ledger
listens, as it does in a real step. Of every op, and of the sums before it, the moment at which most
lives is a `Peak`. Python objects, some 100 KB, and the buffers of BLAS are not counted, persistent
parameters neither.

Letters: X = N·T·C, Q = N·T·H·D, K = N·T·G·D, M = N·T·F, P = N·H·T² elements.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.engine.adapter import Adapter, adapter_shapes
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import parse_targets
from mesp_ref.engine.methods import Step
from mesp_ref.engine.model import EMBEDDING, Model
from mesp_ref.lean.activations import Checkpoints
from mesp_ref.lean.steps import METHODS, by_block, new_step
from mesp_ref.lean.workers import Item, Result, Workers
from mesp_ref.memory.base import Base, Store
from mesp_ref.memory.ghost import GhostTable, Meter, Noise, born, on_file
from mesp_ref.memory.kinds import by_kind
from mesp_ref.memory.ledger import Ledger, Moment

Parts = dict[str, int]  # name -> bytes

_DTYPES = {2: np.float16, 4: np.float32, 8: np.float64, 16: np.complex128}
END = "what follows the last op"
_DEPTHS = 2, 3  # blocks of the steps that are run: from these on, each block adds the same


class Peak(NamedTuple):
    """The moment of an op, or of the sums before one, at which most lives."""

    op: str
    held: Parts  # alive between ops, by kind
    added: Parts  # results and scratch of the op

    @property
    def total(self) -> int:
        return sum(self.held.values()) + sum(self.added.values())

    @property
    def parts(self) -> Parts:
        return self.held | {f"{self.op}: {name}": size for name, size in self.added.items()}


class Shapes(NamedTuple):
    """All that decides the memory of a step. `counted` is the number of labels ≠ −100."""

    config: Qwen2Config
    batch: int = 1
    tokens: int = 256
    rank: int = 8
    targets: tuple[str, ...] = parse_targets("all")
    disk: bool = False
    itemsize: int = 4
    base: Base = Base()
    workers: int = 1
    offload: bool = False  # of mesp_tiled: to disk, too, what its backward would compute again

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def counted(self) -> int:
        """Rows of the head: every position but the last of each sequence."""
        return self.batch * (self.tokens - 1)

    def of(self, *widths: int) -> int:
        """Bytes of one array [N, T, width] for each width."""
        return self.rows * sum(widths) * self.itemsize

    @property
    def x(self) -> int:
        return self.of(self.config.hidden_size)

    @property
    def q(self) -> int:
        return self.of(self.config.num_attention_heads * self.config.head_dim)

    @property
    def k(self) -> int:
        return self.of(self.config.num_key_value_heads * self.config.head_dim)

    @property
    def m(self) -> int:
        return self.of(self.config.intermediate_size)

    @property
    def p(self) -> int:
        return self.of(self.config.num_attention_heads * self.tokens)

    def lora(self, targets: Iterable[str]) -> int:
        """Bytes of the LoRA gradients of one block's targets."""
        chosen = [name for name in self.targets if name in set(targets)]
        one = dataclasses.replace(self.config, num_hidden_layers=1)
        return self.itemsize * sum(map(math.prod, adapter_shapes(one, self.rank, chosen).values()))

    def h(self, targets: Iterable[str]) -> int:
        """Bytes of h = x·Aᵀ of one block's targets."""
        return self.of(*(self.rank for name in self.targets if name in set(targets)))

    def decoded(self, store: Store, *shape: int) -> int:
        """Bytes of a weight, or of a tile of it, beside its file: 0 where it is a view."""
        return store.decoded(*shape, itemsize=self.itemsize)

    def file(self, method: str) -> int:
        """Bytes of the temporary file that a method writes in a step, and reads once."""
        return _found(method, self)[1]


class _Elsewhere(Checkpoints):
    """Checkpoints on disk: no memory of the process; their bytes are counted."""

    halves = True

    def __init__(self, offload: bool):
        super().__init__()
        self.offload, self.size = offload, 0

    def keep(self, x: Any) -> Any:
        x = x.contiguous()
        self.size += x.nbytes
        return on_file(x.meter, x.shape, x.dtype)


class _Team:
    """Workers in turn, counted as if all were at their worst at once.

    beside    of each moment in the share of one worker, bytes that the others then add
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
        for span, begun, grown in shares:  # what earlier workers left is part of what they added
            self.beside |= dict.fromkeys(span, growth - grown - (begun - start))
        meter.most = max(most, start + growth)
        return found


def _model(s: Shapes, meter: Meter) -> Model:
    dtype, sizes = np.dtype(_DTYPES[s.itemsize]), s.config.weight_shapes()
    model = Model(s.config, {})

    def store(name: str, shape: tuple[int, ...]) -> Store:
        if name in (model.head, EMBEDDING):
            return s.base.head
        return s.base.matrices if len(shape) == 2 else s.base.vectors

    tables: dict[str, Any] = {
        name: GhostTable(meter, shape, dtype, store(name, shape)) for name, shape in sizes.items()
    }
    return dataclasses.replace(model, weights=tables)


def _adapter(s: Shapes, meter: Meter) -> Adapter:
    dtype, shapes = np.dtype(_DTYPES[s.itemsize]), adapter_shapes(s.config, s.rank, s.targets)
    matrices: dict[str, Any] = {
        name: on_file(meter, shape, dtype) for name, shape in shapes.items()
    }
    return Adapter(s.rank, 2.0 * s.rank, s.targets, False, matrices)


def _step(method: str, s: Shapes, meter: Meter, stack: Checkpoints, workers: Workers) -> Step:
    model, adapter = _model(s, meter), _adapter(s, meter)
    ids = np.zeros((s.batch, s.tokens), np.int64)
    step = new_step(
        model, adapter, ids, ids, lambda number, grads: None,
        params=False, method=method, stack=stack, workers=workers,
    )  # fmt: skip
    seeds: Any = (Noise(meter),)
    return step._replace(parameters=by_block(adapter.weights, model), seeds=seeds)


def _with_angles(step: Step, s: Shapes, ledger: Ledger, meter: Meter) -> Step:
    """The step with ghosts for its cosines and sines, which belong to it."""
    shape, dtype = (s.tokens, s.config.head_dim // 2), step.layers[0].cos.dtype
    cos: Any
    sin: Any
    cos, sin = (born(meter, shape, dtype) for _ in range(2))
    ledger.note("rope_tables", (cos, sin))
    layers = [layer._replace(cos=cos, sin=sin) for layer in step.layers]
    return step._replace(layers=layers)


class Run(NamedTuple):
    """A step over ghosts."""

    ledger: Ledger
    beside: dict[int, int]  # bytes that other workers add, by the number of the moment
    file: int  # bytes that went to disk


def run(method: str, s: Shapes) -> Run:
    """A step of a method over ghosts, all of its blocks."""
    meter = Meter()
    stack = _Elsewhere(s.offload) if s.disk else Checkpoints()
    ledger = Ledger(meter=meter)
    team = _Team(ledger, meter)
    workers = Workers(s.workers, team.each)
    step = _step(method, s, meter, stack, workers)
    ledger.owned, ledger.weights = [step.ids], step.model.weights
    with ledger:
        METHODS[method](_with_angles(step, s, ledger, meter))
    return Run(ledger, team.beside, getattr(stack, "size", 0))


def _at(moment: Moment, beside: int, rank: int) -> tuple[Peak, Peak]:
    """Peaks in an op, and in the sums before it."""
    held = {name: size for name, size in by_kind(moment, rank).items() if size}
    labels = sum(entry.nbytes for entry in moment.live if entry.dtype.kind == "i")  # no ghosts
    unseen = moment.traced + labels - moment.held
    before = {"sums": moment.between + labels - moment.held, "other workers": beside}
    added = {"results and scratch": moment.added, "sums before": unseen, "other workers": beside}
    return Peak(moment.op, held, added), Peak(f"what precedes {moment.op}", held, before)


def _peaks(method: str, s: Shapes) -> tuple[dict[str, Peak], int]:
    """The fullest moment of every op, and the bytes of the temporary file."""
    found = run(method, s)
    pairs = [
        _at(moment, found.beside.get(number, 0), s.rank)
        for number, moment in enumerate(found.ledger.moments)
    ]
    peaks: dict[str, Peak] = {}
    for peak in (*(peak for peak, _ in pairs), *(peak for _, peak in pairs)):  # ops come first
        if peak.op not in peaks or peak.total > peaks[peak.op].total:
            peaks[peak.op] = peak
    return peaks | {END: Peak(END, {}, {"sums": found.ledger.after})}, found.file


@lru_cache(maxsize=512)
def _found(method: str, s: Shapes) -> tuple[list[Peak], int]:
    """`_peaks` at full depth. A block adds as much as the one below it, whatever op is running, so
    a step of two blocks and one of three tell what any has."""
    depth, (few, more) = s.config.num_hidden_layers, _DEPTHS
    if depth <= more:
        found, size = _peaks(method, s)
        return list(found.values()), size
    shallow = (
        s._replace(config=dataclasses.replace(s.config, num_hidden_layers=n)) for n in _DEPTHS
    )
    (low, low_file), (high, high_file) = (_peaks(method, s) for s in shallow)
    extend = partial(_extend, times=(depth - few) // (more - few))
    peaks = [
        Peak(op, extend(low[op].held, high[op].held), extend(low[op].added, high[op].added))
        for op in high
    ]
    return peaks, extend({"file": low_file}, {"file": high_file})["file"]


def _extend(low: Parts, high: Parts, times: int) -> Parts:
    return {
        name: low.get(name, 0) + times * (high.get(name, 0) - low.get(name, 0))
        for name in {**low, **high}
    }


def _of(method: str, shapes: Shapes) -> list[Peak]:
    return _found(method, shapes)[0]


PEAKS: dict[str, Callable[[Shapes], list[Peak]]] = {
    method: partial(_of, method) for method in METHODS
}


def peak(method: str, shapes: Shapes) -> Peak:
    """The op at which a method needs most."""
    return max(PEAKS[method](shapes), key=lambda found: found.total)
