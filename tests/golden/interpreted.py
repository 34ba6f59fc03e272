"""Triton's interpreter, repaired, against torch: products, fma, casts, sums of bfloat16 bit for bit."""

from typing import Any

import torch

from mesp_ref.golden.backends import interpreter

interpreter.prepare()
import triton  # noqa: E402
import triton.language as tl  # noqa: E402


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


def main() -> None:
    """Raises AssertionError where a bit differs."""
    n, rng = 64, torch.Generator().manual_seed(0)
    a, b, wide = (torch.randn(n, generator=rng) for _ in range(3))
    a, b = a.bfloat16(), b.bfloat16()
    y, z, cast = (torch.empty(n, dtype=torch.bfloat16) for _ in range(3))
    total = torch.empty(1, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, y, z, n)
    cast_kernel[(1,)](wide, cast, n)
    sum_kernel[(1,)](a, total, n)
    assert torch.equal(y, a * b)
    assert torch.equal(z, (a.double() * b.double() + a.double()).bfloat16())
    assert torch.equal(cast, wide.bfloat16())
    tree = a
    while len(tree) > 1:
        tree = tree[: len(tree) // 2] + tree[len(tree) // 2 :]
    assert torch.equal(total, tree)


if __name__ == "__main__" and interpreter.DEVICE == "cpu":
    main()
