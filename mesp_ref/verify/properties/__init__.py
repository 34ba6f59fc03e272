"""Identities that follow from the mathematics of each op, model and method.

A property needs no second implementation: rotations keep lengths, softmax rows sum to 1, a gradient
is orthogonal to what the function does not see. Each is a function of a random generator that
returns findings; `properties()` gives them by name, with the op they are about.
"""

from mesp_ref.verify.properties import (
    attention,
    every_op,
    head,
    library,
    methods,
    mezo,
    model,
    norm_and_rope,
    projections,
    swiglu,
    tiles,
)
from mesp_ref.verify.properties.claim import Property, check_properties, properties

__all__ = ["Property", "check_properties", "properties"]
