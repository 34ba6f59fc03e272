"""Kernels of a few lines for the test of Triton's interpreter; imported once it is prepared."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def product_kernel(a: Any, b: Any, y: Any, z: Any, n: tl.constexpr) -> None:
    """y = a·b, rounded; z = a·b + a, rounded once."""
    i = tl.arange(0, n)
    left, right = tl.load(a + i), tl.load(b + i)
    tl.store(y + i, left * right)
    tl.store(z + i, tl.fma(left, right, left))


@triton.jit
def cast_kernel(x: Any, y: Any, n: tl.constexpr) -> None:
    """y = x in the type of y."""
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def sum_kernel(x: Any, y: Any, n: tl.constexpr) -> None:
    """y = Σx in the type of x."""
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, n)), axis=0))
