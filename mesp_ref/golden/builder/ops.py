"""Op cases: expected values from the forward's equation, enclosed by balls, correctly rounded."""

from collections.abc import Iterator

import numpy as np

from mesp_ref.golden.builder.draw import generator, representable, representable_args, stored
from mesp_ref.golden.rows import ROWS
from mesp_ref.golden.suite import Case, Tensor, Vectors
from mesp_ref.ops import Array
from mesp_ref.registry import Args, Golden, OpCase, OpSpec
from mesp_ref.verify.balls import WIDTHS, enclose, rounded

CERTIFIED = (
    "the equation and its power series enclosed by ball arithmetic at 400 bits or more; every value is "
    "proven to be the correctly rounded one, but for those listed as undecided"
)


def draw(spec: OpSpec, case: OpCase) -> tuple[Args, Array]:
    """Arguments and cotangent of a case, every number representable."""
    rng = generator(f"{spec.name}/{case.name}")
    args = representable_args(case.change(spec.sample(rng, case.sizes, np.float64)))
    shape = np.shape(spec.forward(**args)[0])
    return args, representable(np.asarray(rng.standard_normal(shape)))


def certified(spec: OpSpec, args: Args, dy: Array) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Output and gradients, each number proven to be correctly rounded; and those that may not be 0."""
    names = tuple(name for name in spec.differentiable if args[name] is not None)
    for bits in WIDTHS:
        found = enclose(spec.equation, args, names, dy, bits)
        balls = {"y": found.y} | {f"d{name}": array for name, array in found.gradients.items()}
        want, undecided = {n: np.zeros(b.shape) for n, b in balls.items()}, []
        for name, array in balls.items():
            for at in np.ndindex(*array.shape):
                want[name][at], proven = rounded(array[at])
                undecided += [] if proven else [f"{name}{list(at)}"]
        if not undecided:
            break
    return want, tuple(undecided)


def make_op(spec: OpSpec, case: OpCase) -> tuple[Case, Vectors]:
    """One op case with its truth."""
    args, dy = draw(spec, case)
    want, undecided = certified(spec, args, dy)
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
        CERTIFIED,
        case.dtypes,
        attributes | {"op": spec.name},
        tensors,
        undecided=undecided,
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
    """Every op case of the rows; `make_op` takes seconds for one: arbitrary precision is slow."""
    for spec in ROWS.values():
        for case in spec.golden.cases if spec.golden else ():
            yield spec, case
