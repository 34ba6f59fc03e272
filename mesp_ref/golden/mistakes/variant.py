"""Mistakes that differ in a number or a formula only: a Plain with one step replaced."""

from collections.abc import Callable
from typing import Any

from mesp_ref.golden.plain import Plain


def variant(sentence: str, base: type[Plain] = Plain, **steps: Callable[..., Any]) -> type[Plain]:
    """A Plain with the steps given; its sentence is its name in reports."""
    return type("Variant", (base,), {"__doc__": sentence, "__module__": __name__, **steps})


def padded(size: int) -> list[int]:
    """What a size becomes when it is filled up to whole tiles."""
    tiles = [-(-size // tile) * tile for tile in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)]
    powers = [1 << (size - 1).bit_length()] if size > 1 else []
    return sorted({n for n in tiles + powers if n != size})
