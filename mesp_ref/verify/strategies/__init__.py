"""Hypothesis strategies that draw the trouble: shapes, values, labels, masks; and whole models.

Sizes shrink, numbers do not: values come from one drawn seed, so a failing example ends at the
smallest failing shape instead of at prettier numbers. Needs the package hypothesis. What is drawn
for models of mesp_ref (op_cases, configs, models, adapters, batches) loads them when it is asked for.
"""

import importlib
from typing import Any

from mesp_ref.verify.strategies.arrays import (
    LARGE,
    ORDINARY,
    TINY,
    additive_masks,
    generators,
    indices,
    labels,
    masks,
    seeds,
    values,
)
from mesp_ref.verify.strategies.shapes import TILES, broadcastable, ranks, shapes

_OF_MODELS = ("adapters", "batches", "configs", "models", "op_cases", "sizes")

__all__ = [
    "LARGE",
    "ORDINARY",
    "TILES",
    "TINY",
    "additive_masks",
    "broadcastable",
    "generators",
    "indices",
    "labels",
    "masks",
    "ranks",
    "seeds",
    "shapes",
    "values",
]


def __getattr__(name: str) -> Any:
    if name in _OF_MODELS:
        return getattr(importlib.import_module("mesp_ref.verify.strategies.of_models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
