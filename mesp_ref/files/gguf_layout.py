"""The layout of a GGUF file, walked once before anything believes it.

The gguf package trusts counts and lengths: an array that says it has 2^60 elements keeps it busy
until memory runs out. Here each is held against the bytes that are left.
Format    magic, version, counts; then name, type and value of each key; then name, dimensions, type
          and place of each tensor; then the data. Source: ggml, docs/gguf.md
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import open_regular

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_STRING, _ARRAY = 8, 9
_NAME_LIMIT, _AXES = 1 << 16, 4
_ALIGNMENT, _ALIGNMENT_LIMIT, _UINT32 = 32, 1 << 20, 4


class _Walk:
    """A place in a mapped file that only moves on over bytes that are there."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def skip(self, size: int, what: str) -> int:
        """Move on by `size` bytes; returns where they begin."""
        if size > len(self.data) - self.at:
            raise MespRefError(
                f"{self.path}: {what}: found {size} bytes at {self.at}, expected at most "
                f"{len(self.data) - self.at}; truncated or damaged, fetch the file again"
            )
        start, self.at = self.at, self.at + size
        return start

    def number(self, layout: str, what: str) -> int:
        """A little-endian number: "<I" of 4 bytes, "<Q" of 8."""
        start = self.skip(struct.calcsize(layout), what)
        value: int = struct.unpack_from(layout, self.data, start)[0]
        return value

    def string(self, what: str) -> bytes:
        size = self.number("<Q", what)
        start = self.skip(size, what)
        return self.data[start : start + size] if size <= _NAME_LIMIT else b""

    def value(self, kind: int, key: str) -> None:
        """Step over a value; MespRefError for a type that is none and for arrays of arrays."""
        if kind in _SIZES:
            self.skip(_SIZES[kind], key)
        elif kind == _STRING:
            self.string(key)
        elif kind == _ARRAY:
            inner, count = self.number("<I", key), self.number("<Q", key)
            if inner in _SIZES:
                self.skip(count * _SIZES[inner], key)
            elif inner == _STRING:
                for _ in range(count):  # each takes 8 bytes or more: ends where the file does
                    self.string(key)
            else:
                self.refuse(f"{key}: type {inner} of an array")
        else:
            self.refuse(f"{key}: type {kind}")

    def refuse(self, what: str) -> None:
        raise MespRefError(f"{self.path}: found {what}, expected one that GGUF defines; damaged")

    def name(self, what: str) -> str:
        found = self.string(what)
        try:
            return found.decode("utf-8")
        except ValueError:
            raise MespRefError(
                f"{self.path}: {what}: found {shown(found)}, expected UTF-8"
            ) from None


class _Place(NamedTuple):
    """Where a tensor lies: its first byte, counted from the data's, and how many it has."""

    offset: int
    size: int
    name: str


def check_layout(path: Path) -> None:
    """Raise MespRefError for a file whose parts do not lie inside it, each in its place.

    Offsets   count from the header's end, rounded up to the alignment; so is the end of each tensor,
              and there the next one begins, as llama.cpp demands
    """
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(path, data)
        walk.skip(4, "magic")
        version = walk.number("<I", "version")
        if version not in _VERSIONS:
            raise MespRefError(f"{path}: version: found {version}, expected 2 or 3")
        tensors, keys = walk.number("<Q", "tensors"), walk.number("<Q", "keys")
        alignment = _walk_keys(walk, keys)
        places = [_walk_tensor(walk, alignment) for _ in range(tensors)]
        held = len(data) - _rounded_up(walk.at, alignment)
        _check_places(path, places, held, alignment)


def _rounded_up(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _walk_keys(walk: _Walk, count: int) -> int:
    """Step over the metadata; returns the alignment that it states."""
    alignment, seen = _ALIGNMENT, set[str]()
    for _ in range(count):
        key = walk.name("a key")
        if key in seen:
            walk.refuse(f"{shown(key)} twice")
        seen.add(key)
        kind = walk.number("<I", shown(key))
        start = walk.at
        walk.value(kind, shown(key))
        if key == "general.alignment":
            alignment = struct.unpack_from("<I", walk.data, start)[0] if kind == _UINT32 else 0
            if not 8 <= alignment <= _ALIGNMENT_LIMIT or alignment & (alignment - 1):
                walk.refuse(f"general.alignment {alignment} of type {kind}")
    return alignment


def _walk_tensor(walk: _Walk, alignment: int) -> _Place:
    """Step over a tensor's description; its size is 0 where its type is one that GGUF has not."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = shown(walk.name("a tensor's name"))
    axes = walk.number("<I", name)
    if axes > _AXES:
        walk.refuse(f"{name}: {axes} dimensions")
    shape = [walk.number("<Q", name) for _ in range(axes)]
    if prod(shape) > 16 * len(walk.data):  # the smallest type has two bits a weight
        walk.refuse(f"{name}: {prod(shape)} weights in a file of {len(walk.data)} bytes")
    kind, offset = walk.number("<I", name), walk.number("<Q", name)
    if kind not in list(GGMLQuantizationType):
        walk.refuse(f"{name}: type {kind}")
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]  # of a block
    if shape and shape[0] % weights:
        walk.refuse(f"{name}: rows of {shape[0]} in blocks of {weights}")
    if offset % alignment:
        walk.refuse(f"{name}: offset {offset}, no multiple of the alignment {alignment}")
    return _Place(offset, prod(shape) // weights * size, name)


def _check_places(path: Path, places: list[_Place], held: int, alignment: int) -> None:
    """Sorted by their offsets, each tensor begins where the one before ends, but for the alignment."""
    for offset, size, name in places:
        if offset + size > held:
            raise MespRefError(
                f"{path}: {name}: ends at data byte {offset + size}, expected at most {held}; "
                "truncated or damaged, fetch the file again"
            )
    end, last = 0, "the header"
    for offset, size, name in sorted(places):
        if offset != end:
            raise MespRefError(
                f"{path}: {name}: begins at data byte {offset}, expected {end}, after {last}; "
                "truncated or damaged, fetch the file again"
            )
        end, last = _rounded_up(offset + size, alignment), name
