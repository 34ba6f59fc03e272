"""Gradients that are right by agreement though not the derivative, each stated by who relies on it.

gradcheck(forward, backward, args, names=("table", "ids"), conventions={"table": zero_rows(0)})

A straight-through estimator is the gradient of another function: pass that one as `surrogate`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.verify.pair import Array


def _as_it_is(v: Array) -> Array:
    return v


@dataclass(frozen=True)
class Convention:
    """How the gradient of one argument is meant.

    says       in words, for the report
    project    a direction, projected to those in which the argument may move
    factor     what the derivative is multiplied by
    held       the entries, as a mask of the argument, whose gradient is exactly 0
    """

    says: str
    project: Callable[[Array], Array] = _as_it_is
    factor: float = 1.0
    held: Callable[[Array], Array] | None = None

    def directions(self, v: Array) -> Array:
        """v as far as the convention lets the argument move."""
        v = self.project(v)
        return v if self.held is None else np.where(self.held(v), 0.0, v)


PLAIN = Convention("the derivative")


def _symmetrised(v: Array) -> Array:
    if v.ndim < 2 or v.shape[-1] != v.shape[-2]:
        raise MespRefError(f"conventions: symmetric needs square matrices, found {list(v.shape)}")
    return (v + np.swapaxes(v, -1, -2)) / 2


symmetric = Convention("judged along symmetric directions", _symmetrised)


def scaled(factor: float) -> Convention:
    """factor times the derivative."""
    return Convention(f"{factor:g} times the derivative", factor=factor)


def gradient_reversal(strength: float = 1.0) -> Convention:
    """−strength times the derivative (Ganin & Lempitsky 2015)."""
    return Convention(f"the derivative reversed, times {strength:g}", factor=-strength)


def zero_rows(*rows: int) -> Convention:
    """Rows such as that of a padding token, which learn nothing: gradient exactly 0."""

    def held(v: Array) -> Array:
        mask = np.zeros(v.shape, bool)
        mask[list(rows)] = True
        return mask

    return Convention(f"rows {list(rows)} held at gradient 0", held=held)
