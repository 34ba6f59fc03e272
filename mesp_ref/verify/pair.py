"""A forward and a backward of anyone's at a point, called so that neither can hurt the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.verify.tree import leaves, matched, rebuild

Array = Any
Arrays = tuple[Array, ...]


def is_float(value: Any) -> bool:
    """An array of real floating numbers, those of ml_dtypes among them."""
    if not isinstance(value, np.ndarray | np.generic):
        return False
    return value.dtype.kind == "f" or value.dtype.name.startswith(("bfloat16", "float8"))


def eps(dtype: Any) -> float:
    """The spacing of the numbers at 1."""
    if np.dtype(dtype).kind == "f":
        return float(np.finfo(dtype).eps)
    import ml_dtypes  # only where one of its types came in

    found: Any = ml_dtypes.finfo  # untyped
    return float(found(dtype).eps)


@dataclass(frozen=True)
class Pair:
    """forward(*args) and backward(dy, *args) at a point.

    The point is a flat tuple of leaves: whatever the arguments hold, arrays in lists and
    dictionaries too. Every call gets fresh copies of every array, in the layout of the original.

    shape     arguments as they were given: the containers that the leaves are put back into
    point     the leaves
    names     one per leaf
    places    which leaves have a gradient
    made      outputs at the given point as the forward returned them
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    shape: tuple[Any, ...]
    point: tuple[Any, ...]
    names: tuple[str, ...]
    places: tuple[int, ...]
    made: Any

    def at(self, changed: dict[int, Any]) -> "Pair":
        """The same pair with some leaves changed."""
        return replace(self, point=tuple(changed.get(i, p) for i, p in enumerate(self.point)))

    def cast(self, dtype: Any) -> "Pair":
        """The same numbers, every floating array in another dtype."""
        changed = {i: p.astype(dtype) for i, p in enumerate(self.point) if is_float(p)}
        return self.at(changed)

    def arguments(self) -> list[Any]:
        """Fresh arguments."""
        copies = [p.copy("K") if isinstance(p, np.ndarray) else p for p in self.point]
        return list(rebuild(self.shape, copies))

    def laid_out(self) -> list[Any]:
        """The arguments without copies, in the memory layout of the leaves."""
        return list(rebuild(self.shape, self.point))

    def outputs(self) -> Arrays:
        """The outputs at the point, those without a derivative too."""
        return tuple(np.asarray(y) for _, y in leaves(self.forward(*self.arguments())))

    def floating(self) -> Arrays:
        """The outputs that have a derivative."""
        smooth = [is_float(np.asarray(y)) for _, y in leaves(self.made)]
        outputs = self.outputs()
        if len(outputs) != len(smooth):
            raise ValueError(f"{len(outputs)} outputs, {len(smooth)} at the point that was given")
        return tuple(y for y, keep in zip(outputs, smooth, strict=True) if keep)

    def overflows(self) -> bool:
        """Is an output infinite only because the numbers grew too large on the way?"""
        if all(np.isfinite(y).all() for y in self.floating()):
            return False
        small = self.at(
            {i: (self.point[i] / 1024).astype(self.point[i].dtype) for i in self.places}
        )
        try:
            return all(bool(np.isfinite(y).all()) for y in small.floating())
        except Exception:  # outside of the domain
            return False

    def cotangent(self, dys: Arrays) -> Any:
        """dy in the containers of the outputs; zeros for outputs that are no floating numbers."""
        rest = iter(dys)
        made = [np.asarray(y) for _, y in leaves(self.made)]
        return rebuild(self.made, [next(rest) if is_float(y) else np.zeros_like(y) for y in made])

    def gradients(self, dys: Arrays) -> dict[int, Any]:
        """backward(dy, *args), leaf by leaf, on copies of everything."""
        return self.call_backward(tuple(dy.copy("K") for dy in dys), self.arguments())

    def call_backward(self, dys: Arrays, arguments: Sequence[Any]) -> dict[int, Any]:
        """backward on exactly these arrays.

        Raises ValueError where the gradients that came back do not fit the arguments.
        """
        found = self.backward(self.cotangent(dys), *arguments)
        owners = [i for i, a in enumerate(self.shape) for _ in leaves(a)]
        wanted = list(dict.fromkeys(owners[i] for i in self.places))
        parts = _parts(found, wanted, self)
        grads: dict[int, Any] = {}
        for argument, part in zip(wanted, parts, strict=True):
            first = owners.index(argument)
            for k, leaf in enumerate(matched(self.shape[argument], part)):
                if first + k in self.places:
                    grads[first + k] = leaf
        return grads


def _parts(found: Any, wanted: list[int], pair: Pair) -> list[Any]:
    """What the backward returned, one part per argument that has a gradient."""
    several = len(pair.shape)
    if len(wanted) == 1 and isinstance(pair.shape[wanted[0]], list | tuple | dict):
        alone = isinstance(found, tuple) and len(found) == 1 != len(pair.shape[wanted[0]])
        return [found[0] if alone else found]
    if not isinstance(found, tuple | list):
        found = (found,)
    if len(found) == several != len(wanted):
        return [found[i] for i in wanted]
    if len(found) != len(wanted):
        names = [pair.names[i] for i in pair.places]
        raise ValueError(f"{len(found)} gradients returned, expected one each for {names}")
    return list(found)


def make_pair(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    args: Sequence[Any],
    names: Sequence[str] | None,
    differentiable: Sequence[int] | None,
) -> Pair:
    """The pair at `args`.

    Raises MespRefError for names or positions that do not fit, and where nothing has a gradient.
    """
    labels = list(names or (f"arg{i}" for i in range(len(args))))
    if len(labels) != len(args) or len(set(labels)) != len(labels):
        raise MespRefError(f"names: found {labels}, expected {len(args)} different names")
    found = [[leaf for _, leaf in leaves(a)] for a in args]
    smooth = [any(isinstance(p, np.ndarray) and is_float(p) for p in parts) for parts in found]
    at = [i for i, s in enumerate(smooth) if s] if differentiable is None else list(differentiable)
    if not at or any(not 0 <= i < len(args) or not smooth[i] for i in at):
        raise MespRefError(
            f"differentiable: found positions {at}, expected at least one floating NumPy array "
            f"among {len(args)} arguments"
        )
    point = tuple(leaf for parts in found for leaf in parts)
    owners = [i for i, parts in enumerate(found) for _ in parts]
    paths = tuple(labels[i] + path for i, a in enumerate(args) for path, _ in leaves(a))
    places = tuple(
        k for k, leaf in enumerate(point)
        if owners[k] in at and isinstance(leaf, np.ndarray) and is_float(leaf)
    )  # fmt: skip
    pair = Pair(forward, backward, tuple(args), point, paths, places, None)
    return replace(pair, made=forward(*pair.arguments()))


def inner(a: Arrays, b: Arrays) -> float:
    """⟨a, b⟩ over several arrays."""
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))
