"""What a row of the registry holds: all that checks, vectors, mutants and backends need of an op."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry.cases import OpCase
from mesp_ref.registry.sizes import Args, Sizes

Function = Callable[..., Any]


def unset(*args: Any, **options: Any) -> Any:
    """Stands in a field that was not given, until `check` refuses the row by name."""
    raise TypeError("a field of a registry row was not given")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What golden vectors of an op are made of, and the op in other frameworks.

    Magnitudes and twins take the op's arguments by name, attributes too.

    cases                 what to draw: shapes and edge cases, one line each
    roundings             of "y" and every gradient "d…": roundings to storage on the longest way to
                          it when every intermediate is stored, an op of a framework at a time
    forward_length        the longest sum of the forward (that of the backward is the row's)
    output_magnitude      |terms| of the output, to first order through every intermediate
    gradient_magnitudes   (dy, args) -> mag of every gradient by argument, where a backend's usual
                          formula rounds more than the row's `magnitude` says
    torch                 (torch, **args) -> y, in torch's own functions
    functional            (fw, **args) -> y, on an array namespace: see twins.Namespace
    """

    cases: tuple[OpCase, ...] = ()
    roundings: Mapping[str, int] = field(default_factory=dict)
    forward_length: Callable[[Sizes], int] = unset
    output_magnitude: Callable[..., Array] = unset
    torch: Function = unset
    functional: Function = unset
    gradient_magnitudes: Callable[[Array, Args], dict[str, Array]] | None = None


UNSAID = Golden()  # a row must say that it has none


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What the world needs to know about one op.

    The arguments of `forward` are named in five kinds: `activations`, LoRA matrices and
    `parameters` have gradients; `constants` (ids, labels, angles) and `attributes` (eps, s) have
    none. `backward` returns the gradients of activations and LoRA matrices in that order,
    `backward_params` those of the parameters; both take again, by name, what they need.

    sample(rng, sizes, dtype)   arguments of one case, ordinary in magnitude, B ≠ 0, a label ignored
    reduction_length(sizes)     the longest sum in the backward: k of the rounding bounds
    equation                    the forward once more, on numbers of any precision or balls: nothing
                                from `ops`, no gradient, no trick, functions from exact.py only
    magnitude, magnitude_params the backwards once more on absolute values (see absolute.py)
    optional                    arguments that may be None
    droppable                   residual fields that may be None: the backward rebuilds them
    reference                   the forward whose residuals the magnitudes read: the op's own, or the
                                plain one of a tiled op
    golden                      None, said so, for an op that only sums in another order than one
                                that has golden vectors
    """

    name: str
    forward: Callable[..., tuple[Array, Any]] = unset
    sample: Callable[[np.random.Generator, Sizes, Any], Args] = unset
    reduction_length: Callable[[Sizes], int] = unset
    equation: Callable[..., Array] = unset
    backward: Function | None = None
    backward_params: Function | None = None
    magnitude: Function | None = None
    magnitude_params: Function | None = None
    activations: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    droppable: tuple[str, ...] = ()
    reference: Callable[..., tuple[Array, Any]] | None = None
    golden: Golden | None = UNSAID

    CHECKED: ClassVar = ("forward", "backward", "backward_params")  # all else is their yardstick

    def __post_init__(self) -> None:
        if self.reference is None:  # kept when another forward takes the op's place
            object.__setattr__(self, "reference", self.forward)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Arguments that have a gradient, in the order of `gradients`."""
        return self.activations + self.lora + self.parameters

    @property
    def arguments(self) -> tuple[str, ...]:
        """All arguments of the forward."""
        return self.differentiable + self.constants + self.attributes

    @property
    def functions(self) -> tuple[Function, ...]:
        """What is checked: the forward and its backwards."""
        found = (getattr(self, field) for field in self.CHECKED)
        return tuple(function for function in found if function is not None)

    def gradients(self, dy: Array, res: Any, args: Args) -> dict[str, Array]:
        """Every gradient by argument name; an optional argument that is None has none.

        Raises ValueError for a gradient of what is None, and for none of what is not.
        """
        return self._named(dy, res, args, self.backward, self.backward_params)

    def vjp(self, dy: Array, args: Args) -> dict[str, Array]:
        """Forward, then every gradient."""
        return self.gradients(dy, self.forward(**args)[1], args)

    def magnitudes(self, dy: Array, args: Args) -> dict[str, Array]:
        """mag of every gradient by argument: the backward with every term counted as positive."""
        assert self.reference is not None
        given = taken(self.reference, args)
        res = self.reference(**given)[1]
        return self._named(np.abs(dy), res, given, self.magnitude, self.magnitude_params)

    def length(self, name: str, sizes: Sizes) -> int:
        """The longest sum of a tensor of golden vectors: of the output "y", or of any gradient."""
        if name == "y" and self.golden is not None:
            return self.golden.forward_length(sizes)
        return self.reduction_length(sizes)

    def _named(
        self, dy: Array, res: Any, args: Args, backward: Function | None, params: Function | None
    ) -> dict[str, Array]:
        """What two backwards give, by argument, in the order of `differentiable`."""
        found: dict[str, Array] = {}
        for function, names in (
            (backward, self.activations + self.lora),
            (params, self.parameters),
        ):
            if function is not None:
                result = function(dy, res, **again(function, args))
                found |= zip(names, result if isinstance(result, tuple) else (result,), strict=True)
        for name, grad in found.items():
            if (grad is None) != (args[name] is None):
                raise ValueError(
                    f"{self.name}: {name}: argument and gradient must be None together"
                )
        return {name: found[name] for name in self.differentiable if found[name] is not None}


class Parameters(NamedTuple):
    """The names a function takes; `open` where it takes any others by name, too."""

    names: tuple[str, ...]
    open: bool


def parameters(function: Function, first: int = 0) -> Parameters:
    """The parameters of a function from its `first` on."""
    found = list(inspect.signature(function).parameters.values())[first:]
    named = tuple(p.name for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD)
    return Parameters(named, len(named) < len(found))


def taken(function: Function, args: Args, first: int = 0) -> Args:
    """Those of `args` that a function takes; all of them where it takes any (a layer's tensors)."""
    names, anything = parameters(function, first)
    return args if anything else {name: args[name] for name in names if name in args}


def again(backward: Function, args: Args) -> Args:
    """The arguments that a backward takes again, besides the cotangent and the residuals."""
    return taken(backward, args, first=2)
