"""What an oracle looks at: a function of named arrays with the backward that claims to be its VJP."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import Args, OpSpec

Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Subject:
    """A differentiable function at a point.

    forward(args) -> outputs                    pure, every output an array
    backward(cotangents, args) -> {name: gradient}   of the `differentiable` arguments
    magnitude                                   the same on absolute values (registry/absolute.py)
    equation                                    its forward in arbitrary precision, where there is one
    """

    name: str
    args: Args
    differentiable: tuple[str, ...]
    forward: Callable[[Args], Arrays]
    backward: Callable[[Arrays, Args], dict[str, Array]]
    magnitude: Callable[[Arrays, Args], dict[str, Array]]
    equation: Callable[..., Array] | None = None

    def at(self, **changed: Any) -> "Subject":
        """The same function with some arguments changed."""
        return replace(self, args=self.args | changed)

    def cast(self, dtype: Any) -> "Subject":
        """The same point with the differentiable arguments in another dtype."""
        return self.at(**{name: self.args[name].astype(dtype) for name in self.differentiable})

    def cotangents(self, rng: np.random.Generator) -> Arrays:
        """Random cotangents, one per output; never ones, which hide what sums to zero."""
        return tuple(
            np.asarray(rng.standard_normal(y.shape)).astype(y.dtype)
            for y in self.forward(self.args)
        )

    def tangent(self, v: dict[str, Array], step: float) -> Arrays:
        """J·v in the arguments of v by complex step: Im f(x + i·step·v)/step, no subtraction."""
        point = self.cast(np.complex128).args
        point |= {name: point[name] + 1j * step * direction for name, direction in v.items()}
        return tuple(y.imag / step for y in self.forward(point))


def op_subject(spec: OpSpec, args: Args) -> Subject:
    """A row of the registry at `args`."""

    def forward(args: Args) -> Arrays:
        return (np.asarray(spec.forward(**args)[0]),)

    def backward(dys: Arrays, args: Args) -> dict[str, Array]:
        return spec.vjp(dys[0], args)

    def magnitude(dys: Arrays, args: Args) -> dict[str, Array]:
        return spec.magnitudes(dys[0], args)

    alive = tuple(name for name in spec.differentiable if args[name] is not None)
    return Subject(spec.name, args, alive, forward, backward, magnitude, spec.equation)


def inner(a: Arrays, b: Arrays) -> Any:
    """⟨a, b⟩ over several arrays."""
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))
