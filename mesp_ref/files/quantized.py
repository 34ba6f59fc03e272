"""MLX affine 4-bit and 8-bit tensors: stored packed, decoded at use, bit for bit as MLX does."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from mesp_ref.ops import Array

# The most weights decoded at a time. Beside its result a decode holds 2 bytes of scratch for each of
# them, 5 with 16-bit scales (4 more in float64). With half as many, two workers hand the GIL over so
# often that each decodes at half its speed; with twice as many, scratch leaves the second cache.
CHUNK = 1 << 17

# Type of scale and bias: Veltkamp's constant 2^(24−p)+1 for its p significant bits, and a bound
# below which rounding to p bits is rounding to the type. There is none from below: a subnormal
# multiple or sum of its numbers is a number of the type already.
_ROUNDING: dict[np.dtype, tuple[float, float]] = {
    np.dtype(np.float16): (2.0**13 + 1, 65504.0),
    np.dtype(ml_dtypes.bfloat16): (2.0**16 + 1, 2.0**100),
}


class Quantized:
    """A matrix of which each group of g neighbours in a row shares a scale and a bias.

    Decode    w = scale·q + bias, product and sum each rounded to the type of the scales, then
              cast to `dtype`: the values of mx.dequantize
    Shapes    packed uint32 [out, in·bits/32], scales and biases [out, in/g] -> [out, in]
              Element j of a word is its bits j·bits … j·bits + bits − 1.
    Indexing  t[...], t[a:b], t[:, a:b], t[ids] decode just that part (columns by whole groups)
    Source    mlx 0.32, ops quantize and dequantize, mode "affine"
    """

    def __init__(
        self, packed: Array, scales: Array, biases: Array, bits: int, dtype: np.dtype,
        guard: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.packed, self.scales, self.biases, self.guard = packed, scales, biases, guard
        self.bits, self.dtype = bits, dtype
        self.shape = (len(packed), packed.shape[1] * 32 // bits)
        self.group_size = self.shape[1] // scales.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        self.guard()
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        start, stop, _ = columns.indices(self.shape[1])
        first, last = start // self.group_size, -(-stop // self.group_size)
        words = self.group_size * self.bits // 32  # of one group
        packed = self.packed[rows, first * words : last * words]
        groups = rows, slice(first, last)
        whole = np.empty((*packed.shape[:-1], (last - first) * self.group_size), self.dtype)
        self._decode(packed, self.scales[groups], self.biases[groups], whole)
        skip = first * self.group_size
        return whole[..., start - skip : stop - skip]

    def _decode(self, packed: Array, scales: Array, biases: Array, out: Array) -> None:
        """Decode rows into `out`, some at a time."""
        arrays = [a.reshape(-1, a.shape[-1]) for a in (packed, scales, biases, out)]
        step = rows_at_once(*arrays[-1].shape)
        for row in range(0, len(arrays[0]), step):
            self._decode_chunk(*(array[row : row + step] for array in arrays))

    def _decode_chunk(self, packed: Array, scales: Array, biases: Array, out: Array) -> None:
        q, narrow = unpack(packed, self.bits), self.dtype == np.float32
        values = out if narrow else np.empty(out.shape, np.float32)
        (dequantize if self._in_range else dequantize_slowly)(q, scales, biases, values)
        if not narrow:
            out[...] = values

    @cached_property
    def _in_range(self) -> bool:
        """Whether every scale·q + bias with q ≤ 255 stays in the range of its type; NaN does not."""
        _, largest = _ROUNDING.get(self.scales.dtype, (0.0, np.inf))
        parts, bound = (self.scales, self.biases), largest / 256
        return all(-bound <= float(a.min()) and float(a.max()) <= bound for a in parts)


def rows_at_once(rows: int, columns: int) -> int:
    """How many rows to decode at a time: the fewest even pieces of at most CHUNK weights, or a row."""
    most = max(1, CHUNK // max(1, columns))
    return max(1, -(-rows // max(1, -(-rows // most))))


def unpack(packed: Array, bits: int) -> Array:
    """The integers in little-endian words: uint32 [rows, words] -> uint8 [rows, words·32/bits].

    Four bits: a byte hg becomes the two bytes 0g, 0h: 16 bits hg, or'ed with hg shifted by four, masked.
    """
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return octets
    pairs = octets.astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)


def dequantize(q: Array, scales: Array, biases: Array, out: Array) -> None:
    """out = scale·q + bias, op by op in the type of scale and bias.

    For 16-bit types the arithmetic is float32's: a product is exact there, a sum is rounded to
    more than 2p + 2 bits, so rounding once more, to p bits, gives what the type itself gives.
    Shapes    q uint8 [rows, in], scales and biases [rows, in/g] -> out float32 [rows, in]
    """
    grouped = out.reshape(*scales.shape, -1)  # [rows, groups, g]
    constant, _ = _ROUNDING.get(scales.dtype, (None, None))
    scratch = None if constant is None else np.empty_like(grouped)
    np.copyto(out, q)
    for op, operand in ((np.multiply, scales), (np.add, biases)):
        op(grouped, operand.astype(np.float32)[..., None], out=grouped)
        if constant is not None and scratch is not None:
            _round(grouped, constant, scratch)


def dequantize_slowly(q: Array, scales: Array, biases: Array, out: Array) -> None:
    """`dequantize` in the arithmetic of the type itself: right for infinities and NaN too."""
    grouped = q.reshape(*scales.shape, -1).astype(scales.dtype)
    out[...] = (scales[..., None] * grouped + biases[..., None]).reshape(out.shape)


def _round(x: Array, constant: float, scratch: Array) -> None:
    """Round float32 to p bits in place, ties to even.

    Forward   t = (2^(24−p) + 1)·x;  x ← t + (x − t)
    Source    Veltkamp 1968; Boldo 2006. A tie has 24−p−1 zero bits at its end, so both inner
              roundings fall to even and so does the result (tests: every significand).
    """
    np.multiply(x, np.float32(constant), out=scratch)
    np.subtract(x, scratch, out=x)
    np.add(scratch, x, out=x)
