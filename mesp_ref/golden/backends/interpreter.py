"""Triton's interpreter on a CPU, with what it lacks for other people's kernels.

`interpreter.prepare()` before a library of kernels is imported; with a GPU it does nothing. Measured in
triton 3.4 and 3.9, the interpreter

- does arithmetic on bfloat16 as on the unsigned integers that its bits spell: 1·1 is 2;
- cuts off the digits of a float32 that becomes bfloat16, where the hardware rounds to nearest even;
- sums 16-bit numbers in more bits than a kernel asks for;
- has none of libdevice's functions, no `.to` on floats that are arguments of a kernel, and no timer
  to tune by.

Here bfloat16 is widened to float32 for an operation and its result rounded once, and a sum of 16-bit
numbers is a tree that is rounded at every step, as on a GPU. Nothing of a kernel is changed: only how
its primitives are computed.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import torch

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = ml_dtypes.bfloat16
LIBDEVICE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "exp": np.exp,
    "exp2": np.exp2,
    "fast_expf": np.exp,
    "fast_dividef": np.divide,
    "div_rn": np.divide,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}


@cache
def prepare() -> None:
    """Choose the interpreter where there is no GPU, and give it what it lacks.

    Raises ModuleNotFoundError without triton, MespRefError where it was imported to compile
    """
    if DEVICE == "cuda":
        return
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise MespRefError("triton is imported already: set TRITON_INTERPRET=1 before it is")
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    import triton.language as tl
    from triton.runtime import interpreter

    _operations(interpreter, tl)
    _casts(interpreter, tl)
    _reductions(interpreter, tl)
    _scalars(interpreter, tl)
    _libdevice(interpreter, tl)
    _autotuner()


@contextmanager
def device() -> Iterator[str]:
    """What libraries ask of torch about a GPU before they start a kernel; yields the device's name.

    Where there is none, the answers are those of a small one: blocks and warps are chosen by them.
    """
    if DEVICE == "cuda":
        yield DEVICE
        return
    small = SimpleNamespace(
        multi_processor_count=4,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        major=8,
        minor=0,
    )
    eager = torch.compiler.set_stance("force_eager")
    with (
        eager,
        patch.multiple(
            torch.cuda,
            current_device=lambda: 0,
            device=lambda _: nullcontext(),
            get_device_capability=lambda _=None: (8, 0),
            get_device_properties=lambda _=None: small,
        ),
    ):
        yield DEVICE


def _autotuner() -> None:
    """The first configuration of a kernel: there is nothing to time."""
    from triton.runtime.autotuner import Autotuner

    made = Autotuner.__init__

    def without_keys(
        self: Any, fn: Any, names: Any, configs: Any, key: Any, *args: Any, **kw: Any
    ) -> None:
        made(self, fn, names, configs, [], *args, **kw)

    Autotuner.__init__ = without_keys
    Autotuner.prune_configs = lambda self, kwargs: self.configs[:1]
    Autotuner._bench = lambda *args, **kwargs: [0.0, 0.0, 0.0]


def _widened(handle: Any, tl: Any) -> Array:
    """The numbers of a handle; those of bfloat16 as float32."""
    data: Array = np.asarray(handle.data)
    if handle.dtype.scalar == tl.bfloat16 and data.dtype == np.uint16:
        return data.view(BF16).astype(np.float32)
    return data


def _narrowed(data: Array) -> Array:
    """Numbers as the bits of bfloat16, rounded to nearest even."""
    with np.errstate(all="ignore"):
        return np.asarray(data).astype(BF16).view(np.uint16)


def _operations(interpreter: Any, tl: Any) -> None:
    """Right arithmetic on bfloat16: in float32 and rounded once, fma in float64."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    fma, dot = builder.create_fma, builder.create_dot

    def elementwise(name: str) -> None:
        plain = getattr(builder, name)

        def op(self: Any, *args: Any) -> Any:
            *handles, function = args
            if all(h.dtype.scalar != tl.bfloat16 for h in handles) or function is np.where:
                return plain(self, *args)
            data, dtype = function(*(_widened(h, tl) for h in handles)), handles[-1].dtype.scalar
            is_stored = dtype == tl.bfloat16 and data.dtype.kind == "f"  # or it is a comparison
            return handle(_narrowed(data) if is_stored else data, dtype)

        setattr(builder, name, op)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.bfloat16:
            return fma(self, x, y, z)
        a, b, c = (_widened(h, tl).astype(np.float64) for h in (x, y, z))
        return handle(_narrowed(a * b + c), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (
            handle(_widened(h, tl), tl.float32) if h.dtype.scalar == tl.bfloat16 else h
            for h in (a, b)
        )
        return dot(self, a, b, d, *rest)

    for name in ("binary_op", "unary_op", "ternary_op"):
        elementwise(name)
    builder.create_fma, builder.create_dot = create_fma, create_dot


def _casts(interpreter: Any, tl: Any) -> None:
    """Casts from and to bfloat16, rounded to nearest even."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, converted = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        data, target = _widened(src, tl), dst_type.scalar
        if target == tl.bfloat16:
            return handle(_narrowed(data), target)
        return handle(data.astype(interpreter._get_np_dtype(dst_type)), target)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return converted(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _reductions(interpreter: Any, tl: Any) -> None:
    """Sums of 16-bit numbers rounded at every step; other reductions of bfloat16 in float32."""
    reduce = interpreter.ReduceOps
    plain, plain_sum = reduce.apply_impl, reduce.sum

    def apply_impl(self: Any, inputs: Any) -> Any:
        if inputs[0].dtype.scalar != tl.bfloat16 or self.combine_fn is tl.standard._sum_combine:
            return plain(self, inputs)
        cast = interpreter.interpreter_semantic.cast
        wide = tuple(cast(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in inputs)
        found = plain(self, wide)
        many = isinstance(found, list | tuple)
        narrow = [cast(t, tl.bfloat16) if t.dtype.scalar == tl.float32 else t
                  for t in (found if many else [found])]  # fmt: skip
        return tuple(narrow) if many else narrow[0]

    def tree_sum(self: Any, x: Any) -> Any:
        if x.dtype.scalar not in (tl.bfloat16, tl.float16):
            return plain_sum(self, x)
        data = np.asarray(x.handle.data)
        data = data.view(BF16) if x.dtype.scalar == tl.bfloat16 else data
        axis = self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        while data.shape[axis] > 1:  # a power of two, as all of Triton's axes
            first, second = np.split(data, 2, axis)
            data = first + second
        if not self.keep_dims:
            data = data.squeeze(axis)
        elif self.axis is None:
            data = data.reshape((1,) * x.handle.data.ndim)
        data = data.view(np.uint16) if x.dtype.scalar == tl.bfloat16 else data
        return self.to_tensor(data if data.shape else data[()], x.dtype)

    reduce.apply_impl, reduce.sum = apply_impl, tree_sum


def _scalars(interpreter: Any, tl: Any) -> None:
    """A float that is an argument of a kernel is a float32 scalar, as when it is compiled.

    And tl.cast works under a name that a library has given it, too.
    """
    plain, cast = interpreter._implicit_cvt, tl.cast

    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, float):
            scalar = interpreter.TensorHandle(np.array([arg], np.float32), tl.float32)
            return tl.tensor(scalar, tl.float32)
        return plain(arg)

    def cast_anywhere(*args: Any, **kwargs: Any) -> Any:
        return cast(*args, **{"_semantic": interpreter.interpreter_semantic} | kwargs)

    interpreter._implicit_cvt, tl.cast = implicit_cvt, cast_anywhere


def _libdevice(interpreter: Any, tl: Any) -> None:
    """libdevice's functions in NumPy, under both names by which kernels import them."""
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import libdevice as cuda_libdevice

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **_: Any) -> Any:
            tensors = [interpreter.interpreter_semantic.to_tensor(arg) for arg in args]
            first = tensors[0]
            data = function(*(t.handle.data for t in tensors)).astype(first.handle.data.dtype)
            return tl.tensor(interpreter.TensorHandle(data, first.dtype), first.type)

        return call

    for name, function in LIBDEVICE.items():
        setattr(libdevice, name, made(function))
        setattr(cuda_libdevice, name, made(function))
