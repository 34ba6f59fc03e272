"""What is alive between ops, counted array by array while a step runs.

The ledger listens to Python's calls (`sys.setprofile`), so the engine holds no line for it. When an
op is called it writes down every array that an earlier op took or returned and that still lives:
its tag, shape, dtype and bytes. A buffer counts once, however many views it has; mapped files and
the arrays given as `owned` (weights, adapter, inputs) do not count. tracemalloc, to which NumPy
reports every allocation, tells what the op itself adds: its results and its scratch.
"""

import inspect
import sys
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import lean, ops
from mesp_ref.ops import Array

# The code of every op: the public functions of `ops` and of `lean`, plain helpers of theirs aside.
_OPS = frozenset(
    f.__code__
    for package in (ops, lean)
    for f in vars(package).values()
    if inspect.isfunction(f) and not Path(f.__code__.co_filename).name.startswith("_")
)


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

    with Ledger(owned=adapter.weights.values()) as ledger: ...
    """

    owned: Iterable[Array] = ()
    moments: list[Moment] = field(default_factory=list)

    def __enter__(self) -> "Ledger":
        self._alive: dict[int, tuple[weakref.ref[Any], Entry]] = {}
        self._skip = {id(_buffer(array)) for array in self.owned}
        self._op: FrameType | None = None
        self._started = not tracemalloc.is_tracing()
        if self._started:
            tracemalloc.start()
        # What is not the step's: what was there before it, and our own notes.
        self._own = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        sys.setprofile(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
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
        current, peak = tracemalloc.get_traced_memory()
        name = _name(frame)
        for argument, value in frame.f_locals.items():
            self._note(f"{name}({argument})", value)
        live = [entry for ref, entry in self._alive.values() if ref() is not None]
        self.moments.append(Moment(name, live, 0, current - self._own, peak - self._own))
        self._own += tracemalloc.get_traced_memory()[0] - current
        tracemalloc.reset_peak()

    def _returned(self, frame: FrameType, value: Any) -> None:
        current, peak = tracemalloc.get_traced_memory()
        moment = self.moments[-1]
        moment.added = peak - self._own - moment.traced
        self._note(moment.op, value)
        self._own += tracemalloc.get_traced_memory()[0] - current
        tracemalloc.reset_peak()

    def _note(self, tag: str, value: Any) -> None:
        """Write down the arrays in `value` that are not known yet."""
        for name, array in _arrays(tag, value):
            owner = _buffer(array)
            known = self._alive.get(id(owner))
            if owner is None or id(owner) in self._skip or (known and known[0]() is owner):
                continue
            entry = Entry(name, owner.shape, owner.dtype, owner.nbytes)
            self._alive[id(owner)] = weakref.ref(owner), entry


def _buffer(array: Array) -> Array | None:
    """The array that owns the memory of a view; None when a mapped file does."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array if array.base is None else None


def _arrays(tag: str, value: Any) -> Iterator[tuple[str, Array]]:
    """Every array in a tuple, each under the name of its field."""
    if isinstance(value, np.ndarray):
        yield tag, value
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        for index, item in enumerate(value):
            yield from _arrays(f"{tag}.{names[index]}" if names else tag, item)


def _name(frame: FrameType) -> str:
    """The op, and which of the seven projections it computes: lora_linear mlp.gate_proj."""
    caller = frame.f_back
    if caller is None or not caller.f_code.co_name.startswith("project"):
        return frame.f_code.co_name
    return f"{frame.f_code.co_name} {caller.f_locals['part']}"


def measure(run: Callable[[], object], owned: Iterable[Array] = ()) -> Ledger:
    """The ledger of one call of `run`."""
    with Ledger(owned) as ledger:
        run()
    return ledger
