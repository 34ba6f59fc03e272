"""Op cases: expected values from the forward's equation at 50 and 80 digits, correctly rounded."""

from collections.abc import Iterator

import mpmath
import numpy as np

from mesp_ref.golden.builder.draw import generator, representable, representable_args, stored
from mesp_ref.golden.suite import Case, Tensor, Vectors
from mesp_ref.ops import Array
from mesp_ref.registry import OPS, Args, Golden, OpCase, OpSpec
from mesp_ref.verify.precision import exact, jacobian, true_value

# Central differences keep two thirds of the digits. Where values of one tensor span 40 orders of
# magnitude, so that float16 is out, the smallest of them need more than 50.
DIGITS = {True: (50, 80), False: (150, 180)}
SOURCE = "equation at {} and {} digits, differentiated numerically there, rounded once to float64"


def draw(spec: OpSpec, case: OpCase) -> tuple[Args, Array]:
    """Arguments and cotangent of a case, every number representable."""
    rng = generator(f"{spec.name}/{case.name}")
    args = representable_args(case.change(spec.sample(rng, case.sizes, np.float64)))
    shape = np.shape(spec.forward(**args)[0])
    return args, representable(np.asarray(rng.standard_normal(shape)))


def true_gradient(spec: OpSpec, args: Args, name: str, dy: Array, digits: tuple[int, ...]) -> Array:
    """∂<dy, y>/∂name, correctly rounded; what lies below 10^(−digits/2)·max is 0.

    Raises ArithmeticError when two precisions do not round alike
    """
    rounded = []
    for d in digits:
        columns = jacobian(spec.equation, args, name, d)
        with mpmath.mp.workdps(d):
            terms = (columns * exact(dy)).reshape(*args[name].shape, -1)
            total, size = terms.sum(axis=-1), np.abs(terms).sum(axis=-1).max()
            total[np.abs(total) <= size * mpmath.mpf(10) ** (-digits[0] // 2)] = mpmath.mpf(0)
            rounded.append(np.asarray(total, np.float64))
    if any((other != rounded[0]).any() for other in rounded[1:]):
        raise ArithmeticError(f"{spec.name}: {name}: {digits} digits do not round alike")
    return rounded[0]


def make_op(spec: OpSpec, case: OpCase) -> tuple[Case, Vectors]:
    """One op case with its truth."""
    args, dy = draw(spec, case)
    digits = DIGITS["float16" in case.dtypes or "bfloat16" in case.dtypes]
    want = {"y": true_value(spec.equation, args, digits[-1])}
    for name in spec.differentiable:
        if args[name] is not None:
            want[f"d{name}"] = true_gradient(spec, args, name, dy, digits)
    golden = golden_of(spec)
    mag = {"y": golden.output_magnitude(**args)}
    gradient_magnitudes = golden.gradient_magnitudes or spec.magnitudes
    mag |= {f"d{name}": value for name, value in gradient_magnitudes(dy, args).items()}
    tensors = tuple(
        Tensor(
            name, want[name].shape, _role(spec, name), "forward" if name == "y" else "backward",
            spec.length(name, case.sizes), golden.roundings[name],
        )
        for name in want
    )  # fmt: skip
    arrays = {name: stored(v) for name, v in args.items() if isinstance(v, np.ndarray)}
    vectors = Vectors(arrays | {"dy": stored(dy)}, want, {name: mag[name] for name in want})
    name = f"ops/{spec.name}/{case.name}"
    attributes = {name: args[name] for name in spec.attributes if name in args}
    made = Case(
        name,
        "op",
        f"{name}.safetensors",
        case.note,
        SOURCE.format(*digits),
        case.dtypes,
        attributes | {"op": spec.name},
        tensors,
    )
    return made, vectors


def golden_of(spec: OpSpec) -> Golden:
    """What the golden vectors of an op are made of; ArithmeticError where it has none."""
    if spec.golden is None:
        raise ArithmeticError(f"{spec.name}: no golden vectors; those of the plain op hold for it")
    return spec.golden


def _role(spec: OpSpec, name: str) -> str:
    return "base" if name[1:] in spec.parameters else "result"


def op_cases() -> Iterator[tuple[OpSpec, OpCase]]:
    """Every op case of the registry; `make_op` takes seconds for one: arbitrary precision is slow."""
    for spec in OPS.values():
        for case in spec.golden.cases if spec.golden else ():
            yield spec, case
