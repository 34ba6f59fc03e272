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

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import open_regular

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_STRING, _ARRAY = 8, 9
_NAME_LIMIT, _AXES = 1 << 16, 4


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


def check_layout(path: Path) -> None:
    """Raise MespRefError for a file whose parts do not lie inside it, each in its place."""
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(path, data)
        walk.skip(4, "magic")
        version = walk.number("<I", "version")
        if version not in _VERSIONS:
            raise MespRefError(f"{path}: version: found {version}, expected 2 or 3")
        tensors, keys = walk.number("<Q", "tensors"), walk.number("<Q", "keys")
        for _ in range(keys):
            key = shown(walk.name("a key"))
            walk.value(walk.number("<I", key), key)
        for _ in range(tensors):
            name = shown(walk.name("a tensor's name"))
            axes = walk.number("<I", name)
            if axes > _AXES:
                walk.refuse(f"{name}: {axes} dimensions")
            size = prod(walk.number("<Q", name) for _ in range(axes))
            if size > 16 * len(data):  # the smallest type has two bits a weight
                walk.refuse(f"{name}: {size} weights in a file of {len(data)} bytes")
            walk.skip(12, name)  # type and place: the package checks them against the data
