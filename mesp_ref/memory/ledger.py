"""What is alive between ops, counted array by array while a step runs.

The ledger listens to Python's calls (`sys.setprofile`), so the engine holds no line for it. When an
op is called it writes down every array that an earlier op took or returned and that still lives:
its tag, shape, dtype and bytes. A buffer counts once, however many views it has; mapped files and
the arrays given as `owned` (weights, adapter, inputs) do not count. tracemalloc, to which NumPy
reports every allocation, tells what the op itself adds: its results and its scratch. An op of a
projection is named after the weight that it was given.

The same ledger is kept of ghosts (ghost.py), whose meter stands for tracemalloc.
"""

import inspect
import sys
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import lean, ops
from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.lean.shards import Window
from mesp_ref.lean.tiled_weight import TiledWeight
from mesp_ref.memory.ghost import Ghost, Meter
from mesp_ref.ops import Array, Table

# The code of every op: the public functions of `ops` and of `lean`, plain helpers of theirs aside.
_OPS = frozenset(
    f.__code__
    for package in (ops, lean)
    for f in vars(package).values()
    if inspect.isfunction(f) and not Path(f.__code__.co_filename).name.startswith(("_", "widths"))
)
_ARRAYS = np.ndarray | Ghost


class Entry(NamedTuple):
    """One living buffer."""

    tag: str  # who made it, or the argument as which it was first seen
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int


@dataclass
class Moment:
    """One op: what lived when it was called, and what it added at most while it ran."""

    op: str
    live: list[Entry]
    added: int = 0  # bytes above `live`: results and scratch
    traced: int = 0  # tracemalloc's own count of `live`
    between: int = 0  # most that lived, by tracemalloc, between the op before and this one
    flops: int = 0  # of its products, where ghosts tell

    @property
    def most(self) -> int:
        """Most that lived, in the op or before it."""
        return max(self.traced + self.added, self.between)

    @property
    def held(self) -> int:
        """Bytes alive between ops."""
        return sum(entry.nbytes for entry in self.live)

    def parts(self) -> Counter[str]:
        """Bytes alive by tag."""
        found: Counter[str] = Counter()
        for entry in self.live:
            found[entry.tag] += entry.nbytes
        return found


@dataclass
class Ledger:
    """Every op of what runs inside `with`, in order.

    with Ledger(adapter.weights.values(), model.weights) as ledger: ...

    owned     arrays that do not count
    weights   base weights by name, which do not count either: they name the ops of projections
    meter     of ghosts; None for tracemalloc
    """

    owned: Iterable[Array] = ()
    weights: Mapping[str, Table] = field(default_factory=dict)
    meter: Meter | None = None
    moments: list[Moment] = field(default_factory=list)
    after: int = 0  # most that lived after the last op

    def __enter__(self) -> "Ledger":
        self._parts = {id(table): _part(name) for name, table in self.weights.items()}
        self._trace: Any = self.meter or tracemalloc
        self._alive: dict[int, tuple[weakref.ref[Any], Entry]] = {}
        frozen = [table for table in self.weights.values() if isinstance(table, np.ndarray)]
        self._skip = {id(_buffer(array)) for array in (*self.owned, *frozen)}
        self._op: FrameType | None = None
        self._started = self.meter is None and not tracemalloc.is_tracing()
        if self._started:
            tracemalloc.start()
        # What is not the step's: what was there before it, and our own notes.
        self._own = self._trace.get_traced_memory()[0]
        self._trace.reset_peak()
        self._before = sys.getprofile()
        sys.setprofile(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        self.after = self._trace.get_traced_memory()[1] - self._own
        self._alive.clear()
        if self._started:
            tracemalloc.stop()

    @property
    def peak(self) -> int:
        """Most bytes alive at once, results and scratch of the running op included."""
        return max((moment.held + moment.added for moment in self.moments), default=0)

    def _listen(self, frame: FrameType, event: str, value: Any) -> None:
        if event == "call" and self._op is None and frame.f_code in _OPS:
            self._op = frame
            self._called(frame)
        elif event == "return" and frame is self._op:
            self._op = None
            self._returned(frame, value)

    def _called(self, frame: FrameType) -> None:
        current, peak = self._trace.get_traced_memory()
        name = self._name(frame)
        for argument, value in frame.f_locals.items():
            self.note(f"{name}({argument})", value)
        live = [entry for ref, entry in self._alive.values() if ref() is not None]
        done = self.meter.flops if self.meter else 0
        self.moments.append(
            Moment(name, live, 0, current - self._own, peak - self._own, flops=-done)
        )
        self._own += self._trace.get_traced_memory()[0] - current
        self._trace.reset_peak()

    def _returned(self, frame: FrameType, value: Any) -> None:
        current, peak = self._trace.get_traced_memory()
        moment = self.moments[-1]
        moment.added = peak - self._own - moment.traced
        moment.flops += self.meter.flops if self.meter else 0
        self.note(moment.op, value)
        self._own += self._trace.get_traced_memory()[0] - current
        self._trace.reset_peak()

    def _name(self, frame: FrameType) -> str:
        """The op, and which of the seven projections it was given the weight of, or a part of it:
        lora_linear mlp.gate_proj."""
        table = frame.f_locals.get("w")
        while isinstance(table, Window | TiledWeight):
            table = table.table
        return f"{frame.f_code.co_name} {self._parts.get(id(table), '')}".rstrip()

    def note(self, tag: str, value: Any) -> None:
        """Write down the arrays in `value` that are not known yet, as made or first seen by `tag`."""
        for name, array in _arrays(tag, value):
            owner = _buffer(array)
            known = self._alive.get(id(owner))
            if owner is None or id(owner) in self._skip or (known and known[0]() is owner):
                continue
            if not owner.nbytes:  # LoRA matrices of a projection that has none
                continue
            entry = Entry(name, owner.shape, owner.dtype, owner.nbytes)
            self._alive[id(owner)] = weakref.ref(owner), entry


def _buffer(array: Any) -> Any:
    """The array that owns the memory of a view; None when a mapped file does."""
    if isinstance(array, Ghost):
        return array.buffer
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array if array.base is None else None


def _arrays(tag: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every array in a tuple, each under the name of its field."""
    if isinstance(value, _ARRAYS):
        yield tag, value
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        for index, item in enumerate(value):
            yield from _arrays(f"{tag}.{names[index]}" if names else tag, item)


def _part(name: str) -> str:
    """The projection whose weight a tensor is, self_attn.q_proj; "" for any other."""
    module = name.removesuffix(".weight")
    return next((part for part in PROJECTIONS.values() if module.endswith(part)), "")


def measure(
    run: Callable[[], object],
    owned: Iterable[Array] = (),
    weights: Mapping[str, Table] = MappingProxyType({}),
) -> Ledger:
    """The ledger of one call of `run`, with `owned` and `weights` as a Ledger takes them."""
    with Ledger(owned, weights) as ledger:
        run()
    return ledger
