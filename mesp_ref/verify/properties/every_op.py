"""What holds for every op: a backward is linear in the cotangent, and nothing overflows."""

from collections.abc import Iterator

import numpy as np

from mesp_ref.verify.properties.claim import Check, agree, drawn, exactly, of_every_op
from mesp_ref.verify.result import Finding


@of_every_op
def scaling(name: str) -> Check:
    """The check of one op."""

    def check(rng: np.random.Generator) -> Iterator[Finding]:
        spec, args, dy = drawn(name, rng)
        grads, scaled = spec.vjp(dy, args), spec.vjp(dy * 2.0**40, args)
        for argument in grads:
            yield exactly(name, argument, scaled[argument], grads[argument] * 2.0**40)

    check.__doc__ = "vjp(2⁴⁰·dy) = 2⁴⁰·vjp(dy) to the bit: a power of two rounds nowhere."
    check.__name__ = f"{name}_scaling"
    return check


@of_every_op
def additivity(name: str) -> Check:
    """The check of one op."""

    def check(rng: np.random.Generator) -> Iterator[Finding]:
        spec, args, dy = drawn(name, rng)
        other = np.asarray(rng.standard_normal(dy.shape))
        one, two, both = (spec.vjp(d, args) for d in (dy, other, dy + other))
        mags = spec.magnitudes(np.abs(dy) + np.abs(other), args)
        for argument in one:
            total = one[argument] + two[argument]
            yield agree(name, argument, both[argument], total, mags[argument])

    check.__doc__ = "vjp(dy₁ + dy₂) = vjp(dy₁) + vjp(dy₂)."
    check.__name__ = f"{name}_additivity"
    return check


@of_every_op
def saturation(name: str) -> Check:
    """The check of one op."""

    def check(rng: np.random.Generator) -> Iterator[Finding]:
        spec, args, dy = drawn(name, rng)
        args |= {argument: 1e4 * args[argument] for argument in spec.activations}
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            y, grads = spec.forward(**args)[0], spec.vjp(dy, args)
        for what, array in {"y": y, **grads}.items():
            yield exactly(name, what, np.isfinite(array), True)

    check.__doc__ = "Activations of 10⁴, of which exp would overflow, give finite gradients."
    check.__name__ = f"{name}_saturation"
    return check


@of_every_op
def dropping(name: str) -> Check:
    """The check of one op."""

    def check(rng: np.random.Generator) -> Iterator[Finding]:
        spec, args, _ = drawn(name, rng)
        whole = spec.forward(**args)
        yield exactly(name, "has a value", np.isfinite(whole[0]), True)
        for field in spec.droppable:
            y, res = spec.forward(**args, drop=frozenset({field}))
            yield exactly(name, f"y without {field}", y, whole[0])
            yield exactly(name, f"{field} is kept", getattr(whole[1], field) is not None, True)
            yield exactly(name, f"{field} is dropped", getattr(res, field) is None, True)

    check.__doc__ = "A residual is kept, and where it is dropped it is None and y the same."
    check.__name__ = f"{name}_dropping"
    return check
