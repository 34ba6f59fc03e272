"""Inputs that are stated instead of stored: numbers that any language makes alike in a few lines.

    uint32_t hash(uint32_t i, uint32_t stream) {       // murmur3's last mixing, on a counter
        uint32_t h = i * 0x9E3779B9u + stream * 0x85EBCA6Bu;
        h ^= h >> 16;  h *= 0x85EBCA6Bu;
        h ^= h >> 13;  h *= 0xC2B2AE35u;
        return h ^ (h >> 16);
    }

Entry i of an array, counted row by row, is ((hash(i, stream) >> 24) − 128)·scale + offset: at most eight
bits, so exact in every precision. A ramp adds ramp·⌊16·column/columns⌋/16 along the last axis.
hash(0…3, 1) is 3413276431, 38592188, 2897251479, 2882871877.
Source    Appleby 2011, MurmurHash3 (fmix32)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesp_ref.ops import IGNORED, Array

PROJECTIONS = 32  # one for each bit of a hash
SIGNS, PLACES = (
    1 << 20,
    1 << 21,
)  # the streams of signs and of sampled places, plus the tensor's own
_PIECE = 1 << 18


def hashes(index: Array, stream: int) -> Array:
    """The hash of every index, modulo 2³²."""
    seed = np.uint32(stream * 0x85EBCA6B & 0xFFFFFFFF)
    h = index.astype(np.uint32) * np.uint32(0x9E3779B9) + seed
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def numbers(
    shape: list[int],
    stream: int,
    scale: float,
    offset: float = 0.0,
    rows: bool = False,
    ramp: float = 0.0,
) -> Array:
    """Numbers of a stream; with `rows`, one for each row, repeated along the last axis."""
    size = int(np.prod(shape[:-1] if rows else shape))
    h = hashes(np.arange(size), stream)
    values = ((h >> np.uint32(24)).astype(np.float64) - 128) * scale + offset
    if rows:
        return np.repeat(values, shape[-1]).reshape(shape)
    values = values.reshape(shape)
    if ramp:
        values = values + ramp / 16 * (np.arange(shape[-1]) * 16 // shape[-1])
    return values


def integers(shape: list[int], stream: int, high: int, ignored: int = 0) -> Array:
    """hash mod high; every `ignored`-th, the last of each, is −100."""
    index = np.arange(int(np.prod(shape)))
    found = (hashes(index, stream) % np.uint32(high)).astype(np.int64)
    if ignored:
        found[index % ignored == ignored - 1] = IGNORED
    return found.reshape(shape)


def made(entry: Mapping[str, Any]) -> Array:
    """One input from its entry in the manifest."""
    given = {name: value for name, value in entry.items() if name != "kind"}
    array: Array = numbers(**given) if entry["kind"] == "numbers" else integers(**given)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)


def places(size: int, count: int, stream: int) -> Array:
    """Which entries of a tensor are stored: hash mod size, and the first and the last."""
    found = hashes(np.arange(count), PLACES + stream).astype(np.int64) % size
    found[:2] = 0, size - 1
    return found


def projections(array: Array, stream: int) -> Array:
    """Σ ±a over 32 sets of signs: bit j of hash(i) turns the sign of entry i in sum j."""
    flat, sums = array.reshape(-1), np.zeros(PROJECTIONS)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(np.float64)
        bits = hashes(np.arange(start, start + piece.size), SIGNS + stream)
        signs = np.unpackbits(bits.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        sums += piece.sum() - 2 * (piece @ signs)
    return sums


def row_sums(array: Array) -> Array:
    """Σ |a| along the last axis: roundings cancel in it, what is wrong for a whole row does not."""
    return np.abs(array.astype(np.float64)).reshape(-1, array.shape[-1]).sum(axis=1)
