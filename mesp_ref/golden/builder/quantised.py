"""quant/: MLX affine weights: codes, scales, biases, decoded values, and gradients through them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mesp_ref.golden.builder.draw import generator, representable, stored
from mesp_ref.golden.builder.ops import certified
from mesp_ref.golden.suite import Case, Tensor, Vectors
from mesp_ref.ops import Array
from mesp_ref.registry import OPS

SOURCE = (
    "decoded code by code in the type of the scales; y and dx enclosed by ball arithmetic at 400 bits, "
    "proven to be correctly rounded"
)


class Quantised(NamedTuple):
    """One way to store a matrix [out, in]."""

    name: str
    bits: int
    group_size: int
    scale_dtype: Any
    outputs: int = 3
    inputs: int = 64


CASES = (
    Quantised("bits_4_group_64_float16", 4, 64, np.float16),
    Quantised("bits_4_group_32_bfloat16", 4, 32, ml_dtypes.bfloat16),
    Quantised("bits_8_group_64_float16", 8, 64, np.float16),
)


def pack(codes: Array, bits: int) -> Array:
    """Codes [out, in] into words [out, in·bits/32], the first code in the lowest bits."""
    per_word = 32 // bits
    words = codes.reshape(len(codes), -1, per_word).astype(np.uint64)
    shifted = words << (np.arange(per_word, dtype=np.uint64) * np.uint64(bits))
    return shifted.sum(axis=-1).astype(np.uint32)


def decode(codes: Array, scales: Array, biases: Array) -> Array:
    """scale·q + bias, product and sum each rounded to the type of the scales, one at a time."""
    w, dtype = np.empty(codes.shape), scales.dtype.type
    group = codes.shape[1] // scales.shape[1]
    for i, j in np.ndindex(*codes.shape):
        product = dtype(scales[i, j // group] * dtype(int(codes[i, j])))
        w[i, j] = dtype(product + biases[i, j // group])
    return w


def make_quantised(q: Quantised) -> tuple[Case, Vectors]:
    """Random codes with every value of the range among them, scales of both signs."""
    rng, name = generator(f"quant/{q.name}"), f"quant/{q.name}"
    codes = rng.integers(0, 2**q.bits, (q.outputs, q.inputs))
    codes[0, :2] = 0, 2**q.bits - 1
    groups = q.outputs, q.inputs // q.group_size
    scales = (rng.standard_normal(groups) * 2.0**-q.bits).astype(q.scale_dtype)
    biases = rng.standard_normal(groups).astype(q.scale_dtype)
    w = decode(codes, scales, biases)
    x = representable(rng.standard_normal((1, 2, q.inputs)))
    dy = representable(rng.standard_normal((1, 2, q.outputs)))
    args = {"x": x, "w": w, "b": None}
    exact, undecided = certified(OPS["linear"], args, dy)
    want = {"w": w, "y": exact["y"], "dx": exact["dx"]}
    size = np.abs(w)
    mag = {"w": size, "y": np.abs(x) @ size.T, "dx": np.abs(dy) @ size}
    tensors = (
        Tensor("w", w.shape, "inner", "forward", 0, 0),
        Tensor("y", want["y"].shape, "result", "forward", q.inputs, 1),
        Tensor("dx", want["dx"].shape, "result", "backward", q.outputs, 1),
    )
    inputs = {"packed": pack(codes, q.bits), "codes": stored(codes), "x": stored(x)}
    inputs |= {"scales": stored(scales.astype(np.float64)), "dy": stored(dy)}
    inputs |= {"biases": stored(biases.astype(np.float64))}
    dtype = np.dtype(q.scale_dtype).name
    attributes = {"bits": q.bits, "group_size": q.group_size, "scale_dtype": dtype}
    note = f"{q.bits} bits in groups of {q.group_size}, scales in {dtype}"
    covered = ("float64", "float32", dtype)
    case = Case(
        name,
        "quant",
        f"{name}.safetensors",
        note,
        SOURCE,
        covered,
        attributes,
        tensors,
        {},
        undecided,
    )
    return case, Vectors(inputs, want, mag)


def quantised_cases() -> Iterator[tuple[Case, Vectors]]:
    """Every way to store a matrix."""
    for case in CASES:
        yield make_quantised(case)
