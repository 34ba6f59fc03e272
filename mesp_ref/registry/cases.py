"""How golden cases of an op are stated: sizes, and what is changed of the drawn arguments."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry.sizes import Args, Sizes

ALL = ("float64", "float32", "float16", "bfloat16")
WIDE = ("float64", "float32")  # values that 16 bits cannot carry through the op
NO_HALF = ("float64", "float32", "bfloat16")  # outside the range of float16

Change = Callable[[Args], Args]

USUAL = Sizes(n=2, t=4, past=2, c=6, g=2, share=2, d=4, f=5, v=9, r=3)
ONE_TOKEN = USUAL._replace(n=1, t=1, past=0)
NINE = USUAL._replace(n=1, t=9, past=0, c=7, f=3, v=6)


def _same(args: Args) -> Args:
    return args


class OpCase(NamedTuple):
    """What to draw and what to make of it."""

    name: str
    note: str
    sizes: Sizes = USUAL
    change: Change = _same
    dtypes: tuple[str, ...] = ALL


def times(**factors: float) -> Change:
    """Arguments multiplied."""
    return lambda args: args | {name: args[name] * by for name, by in factors.items()}


def put(**values: object) -> Change:
    """Arguments replaced; a number fills an array."""

    def change(args: Args) -> Args:
        return args | {
            name: np.full_like(args[name], value) if isinstance(args[name], np.ndarray) else value
            for name, value in values.items()
        }

    return change


def without_bias(args: Args) -> Args:
    return args | {"b": None}


def at(name: str, index: object, value: object) -> Change:
    """One entry or slice of an argument replaced."""

    def change(args: Args) -> Args:
        array = args[name].copy()
        array[index] = value
        return args | {name: array}

    return change


def every(name: str) -> Change:
    """Labels or ids that count up, none ignored."""

    def change(args: Args) -> Args:
        shape: Array = args[name]
        return args | {name: np.arange(shape.size).reshape(shape.shape) % 5}

    return change
