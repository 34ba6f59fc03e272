"""SwiGLU: what silu(x) = x·σ(x) implies."""

from collections.abc import Iterator

import numpy as np

from mesp_ref.verify.properties.claim import agree, drawn, holds
from mesp_ref.verify.result import Finding


@holds("swiglu")
def swiglu_product(rng: np.random.Generator) -> Iterator[Finding]:
    """up·dup = dz·z: z is linear in up."""
    spec, args, dz = drawn("swiglu", rng)
    z = spec.forward(**args)[0]
    got = args["up"] * spec.vjp(dz, args)["up"]
    yield agree("swiglu", "up·dup", got, dz * z, np.abs(dz * z))


@holds("swiglu")
def silu_odd_part(rng: np.random.Generator) -> Iterator[Finding]:
    """silu(x) − silu(−x) = x and silu'(x) + silu'(−x) = 1."""
    spec, args, dz = drawn("swiglu", rng)
    mirror = args | {"gate": -args["gate"]}
    z, z_mirror = (spec.forward(**a)[0] for a in (args, mirror))
    yield agree(
        "swiglu", "silu", z - z_mirror, args["gate"] * args["up"], np.abs(z) + np.abs(z_mirror)
    )
    slope, slope_mirror = (spec.vjp(dz, a)["gate"] for a in (args, mirror))
    size = 2 * np.abs(dz * args["up"])
    yield agree("swiglu", "silu'", slope + slope_mirror, dz * args["up"], size)


@holds("swiglu")
def silu_at_zero_and_far(rng: np.random.Generator) -> Iterator[Finding]:
    """silu'(0) = ½, silu(40) = 40 and silu'(40) = 1; silu(−40) is −40·e⁻⁴⁰, not 0."""
    spec, args, dz = drawn("swiglu", rng)
    for at, value, slope in (
        (0.0, 0.0, 0.5),
        (40.0, 40.0, 1.0),
        (-40.0, -40 * np.exp(-40.0), None),
    ):
        given = args | {"gate": np.full_like(dz, at), "up": np.ones_like(dz)}
        yield agree("swiglu", f"silu({at})", spec.forward(**given)[0], value, abs(value))
        if slope is not None:
            got = spec.vjp(dz, given)["gate"]
            yield agree("swiglu", f"silu'({at})", got, slope * dz, np.abs(dz))
