"""Ghosts: arrays without numbers, whose bytes are counted from birth to death.

A ghost answers NumPy's own protocols (`__array_ufunc__`, `__array_function__`), so an op that is given
ghosts runs as it stands, in the same order, and leaves behind what it needs: views share a buffer,
`out=` makes nothing new, a copy is a new buffer, and what no name holds any more is gone.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.lib.stride_tricks import as_strided

from mesp_ref.ops import Array

_BYTE = np.zeros(1, np.uint8)


class Meter:
    """Bytes of living ghosts and their peak, which are asked for as tracemalloc is; and FLOPs."""

    def __init__(self) -> None:
        self.live = self.most = self.flops = 0

    def book(self, size: int) -> None:
        self.live += size
        self.most = max(self.most, self.live)

    def pass_by(self, size: int) -> None:
        """Scratch that is gone again."""
        self.most = max(self.most, self.live + size)

    def get_traced_memory(self) -> tuple[int, int]:
        return self.live, self.most

    def reset_peak(self) -> None:
        self.most = self.live


@lru_cache(maxsize=1024)
def _form(shape: tuple[int, ...]) -> Array:
    """A C-contiguous array over nothing, of one byte an element: for its shape and strides alone."""
    strides = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return as_strided(_BYTE, shape, strides, writeable=False)


_broadcast = lru_cache(maxsize=1024)(np.broadcast_shapes)


@lru_cache(maxsize=1024)
def _dtype(ufunc: np.ufunc, *given: Any) -> np.dtype:
    """The dtype of a ufunc's result."""
    found: np.dtype = ufunc.resolve_dtypes((*given, None))[-1]
    return found


class Buffer:
    """The memory of an array and its views: booked as long as one of them lives."""

    def __init__(self, meter: Meter, shape: tuple[int, ...], dtype: np.dtype):
        self.meter, self.shape, self.dtype = meter, shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        meter.book(self.nbytes)

    def __del__(self) -> None:
        self.meter.live -= self.nbytes


class Ghost(NDArrayOperatorsMixin):
    """An array without numbers.

    form      a NumPy array over nothing that has its shape and strides, so views are NumPy's own
    buffer    None for what is not counted: a mapped file, or a parameter
    """

    def __init__(self, meter: Meter, form: Array, dtype: np.dtype, buffer: Buffer | None):
        self.meter, self.form, self.dtype, self.buffer = meter, form, dtype, buffer
        self.shape = form.shape

    def new(self, shape: tuple[int, ...], dtype: Any = None) -> "Ghost":
        """Another array, on the same meter."""
        return born(self.meter, shape, np.dtype(dtype or self.dtype))

    def _view(self, form: Array) -> "Ghost":
        return Ghost(self.meter, form, self.dtype, self.buffer)

    @property
    def nbytes(self) -> int:
        return self.form.size * self.dtype.itemsize

    @property
    def size(self) -> int:
        return self.form.size

    @property
    def T(self) -> "Ghost":
        return self._view(self.form.T)

    @property
    def real(self) -> "Ghost":
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator["Ghost"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> "Ghost":
        at = index if type(index) is tuple else (index,)
        for i in at:
            if type(i) is np.ndarray:
                return self._chosen(at)
        return Ghost(self.meter, self.form[index], self.dtype, self.buffer)

    def _chosen(self, at: tuple[Array, ...]) -> "Ghost":
        """Elements by number, along the first axes: a copy."""
        return self.new(_broadcast(*(i.shape for i in at)) + self.shape[len(at) :])

    def __setitem__(self, index: Any, value: Any) -> None:
        """Numbers are written; there are none."""

    def reshape(self, *shape: Any) -> "Ghost":
        wanted = shape[0] if type(shape[0]) is tuple else shape
        try:
            return self._view(self.form.reshape(wanted, copy=False))
        except ValueError:  # no strides say it: the numbers move
            known = -math.prod(wanted)
            return self.new(tuple(self.size // known if n < 0 else n for n in wanted))

    def transpose(self, *axes: int) -> "Ghost":
        return self._view(self.form.transpose(axes))

    def swapaxes(self, a: int, b: int) -> "Ghost":
        return self._view(self.form.swapaxes(a, b))

    def contiguous(self) -> "Ghost":
        """As np.ascontiguousarray gives it."""
        return self if self.form.flags.c_contiguous else self.new(self.shape)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Any:
        if axis is None:
            return self.dtype.type(0)
        shape = list(self.shape)
        shape[axis : axis % len(shape) + 1] = [1] if keepdims else []
        return self.new(tuple(shape))

    max = sum

    def any(self) -> bool:
        """No number is out of the ordinary."""
        return False

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *given: Any, out: Any = None, **options: Any
    ) -> Any:
        if method != "__call__":  # np.add.at, which works in place
            return None
        if ufunc is np.matmul:
            shape = self._product(*given)
        elif out is None:
            shape = _broadcast(*[getattr(x, "shape", ()) for x in given])
        if out is not None:
            return out[0]
        types: Any = [getattr(x, "dtype", type(x)) for x in given]
        return self.new(shape, options.get("dtype") or _dtype(ufunc, *types))

    def _product(self, a: Any, b: Any) -> tuple[int, ...]:
        """The shape of a·b, whose multiply-adds are counted."""
        (*left, rows, inner), (*right, _, columns) = a.shape, b.shape
        shape = (*_broadcast(tuple(left), tuple(right)), rows, columns)
        self.meter.flops += 2 * math.prod(shape) * inner
        return shape

    def __array_function__(
        self, function: Callable[..., Any], types: Any, given: Any, options: dict[str, Any]
    ) -> Any:
        if function not in _FUNCTIONS:
            return NotImplemented  # NumPy says which
        return _FUNCTIONS[function](self, *given, **options)


def born(meter: Meter, shape: tuple[int, ...], dtype: np.dtype) -> Ghost:
    """A new array."""
    return Ghost(meter, _form(shape), dtype, Buffer(meter, shape, dtype))


def uncounted(meter: Meter, shape: tuple[int, ...], dtype: np.dtype) -> Ghost:
    """An array that does not count: in a mapped file, or a parameter."""
    return Ghost(meter, _form(shape), dtype, None)


def _result_type(_: Ghost, *given: Any) -> np.dtype:
    return np.result_type(*(x.dtype if isinstance(x, Ghost) else x for x in given))


def _new(ghost: Ghost, shape: Any, dtype: Any = None) -> Ghost:
    return ghost.new(shape if isinstance(shape, tuple) else (shape,), dtype)


def _like(_: Ghost, given: Ghost, dtype: Any = None) -> Ghost:
    return given.new(given.shape, dtype)


def _concatenate(ghost: Ghost, given: Any, axis: int = 0) -> Ghost:
    shape = list(given[0].shape)
    shape[axis] = sum(x.shape[axis] for x in given)
    return ghost.new(tuple(shape))


def _where(ghost: Ghost, *given: Any) -> Ghost:
    shape = _broadcast(*(getattr(x, "shape", ()) for x in given))
    return ghost.new(shape, _result_type(ghost, *given[1:]))


def _einsum(ghost: Ghost, subscripts: str, *given: Ghost) -> Ghost:
    """The shape that the letters of the result say, an ellipsis being all other axes."""
    letters, result = subscripts.split("->")
    lengths: dict[str, int] = {}
    for names, x in zip(letters.replace("...", "").split(","), given, strict=True):
        lengths |= zip(names, x.shape[-len(names) :], strict=True)
    others = ghost.shape[: -len(names)] if "..." in result else ()
    return ghost.new((*others, *(lengths[name] for name in result.replace("...", ""))))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.empty: _new,
    np.zeros: _new,
    np.full: lambda ghost, shape, _, dtype, **options: _new(ghost, shape, dtype),
    np.tri: lambda ghost, n, **options: ghost.new((n, options["M"]), options["dtype"]),
    np.arange: lambda ghost, n: ghost.new((n,), np.intp),
    np.empty_like: _like,
    np.zeros_like: _like,
    np.result_type: _result_type,
    np.where: _where,
    np.einsum: _einsum,
    np.concatenate: _concatenate,
    np.copyto: lambda *given, **options: None,
    np.take: lambda *given, out, **options: out,
}
