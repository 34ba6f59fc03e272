"""RMSNorm forgets length, RoPE forgets absolute position."""

from collections.abc import Iterator

import numpy as np

from mesp_ref import ops
from mesp_ref.registry import OPS
from mesp_ref.verify.properties.claim import agree, drawn, holds
from mesp_ref.verify.result import Finding


@holds("rmsnorm")
def rmsnorm_radial_gradient(rng: np.random.Generator) -> Iterator[Finding]:
    """Σ x·dx = eps·n⁻³·Σ w·dy·x: along x only eps is left, n absorbs the rest."""
    spec, args, dy = drawn("rmsnorm", rng)
    x, w, eps = args["x"], args["w"], args["eps"]
    n = np.sqrt((x * x).mean(axis=-1) + eps)
    radial = (x * spec.vjp(dy, args)["x"]).sum(axis=-1)
    mag = np.abs(w * dy * x).sum(axis=-1) / n
    yield agree("rmsnorm", "x·dx", radial, eps / n**3 * (w * dy * x).sum(axis=-1), 2 * mag)


@holds("rmsnorm")
def rmsnorm_scale_covariance(rng: np.random.Generator) -> Iterator[Finding]:
    """y(a·x; a²·eps) = y(x; eps) and dx(a·x; a²·eps) = dx/a."""
    spec, args, dy = drawn("rmsnorm", rng)
    moved = args | {"x": 3 * args["x"], "eps": 9 * args["eps"]}
    y, scaled = (spec.forward(**a)[0] for a in (args, moved))
    yield agree("rmsnorm", "y", scaled, y, np.abs(y))
    dx, dx_scaled = (spec.vjp(dy, a)["x"] for a in (args, moved))
    yield agree("rmsnorm", "dx", 3 * dx_scaled, dx, np.abs(dy * args["w"]).max() * 9)


@holds("rmsnorm")
def rmsnorm_of_far(rng: np.random.Generator) -> Iterator[Finding]:
    """y(2⁵²⁰·x) = y(x), dx = dx(x)/2⁵²⁰ and dw the same with eps = 0, although x² overflows."""
    spec, args, dy = drawn("rmsnorm", rng, n=1)
    near, by = args | {"eps": 0.0}, 2.0**520
    x, some = near["x"], np.arange(near["x"].shape[1])[:, None] % 2 == 0  # rows of both kinds
    far = near | {"x": np.where(some, x * by, x)}
    with np.errstate(over="ignore"):
        y, y_far = (spec.forward(**given)[0] for given in (near, far))
        g, g_far = (spec.vjp(dy, given) for given in (near, far))
    yield agree("rmsnorm", "y", y_far, y, np.abs(y).max())
    dx = np.where(some, g_far["x"] * by, g_far["x"])
    yield agree("rmsnorm", "dx", dx, g["x"], np.abs(dy * args["w"]).max() * 9)
    yield agree("rmsnorm", "dw", g_far["w"], g["w"], np.abs(dy * y).sum())


@holds("rmsnorm")
def rmsnorm_weight_gradient(rng: np.random.Generator) -> Iterator[Finding]:
    """w·dw = Σ dy·y, channel by channel."""
    spec, args, dy = drawn("rmsnorm", rng)
    terms = dy * spec.forward(**args)[0]
    got = args["w"] * spec.vjp(dy, args)["w"]
    yield agree("rmsnorm", "w·dw", got, terms.sum((0, 1)), np.abs(terms).sum((0, 1)))


@holds("rmsnorm")
def rmsnorm_output_size(rng: np.random.Generator) -> Iterator[Finding]:
    """mean((y/w)²) = 1 − eps/n²."""
    spec, args, _ = drawn("rmsnorm", rng)
    size = ((spec.forward(**args)[0] / args["w"]) ** 2).mean(axis=-1)
    n2 = (args["x"] ** 2).mean(axis=-1) + args["eps"]
    yield agree("rmsnorm", "mean((y/w)²)", size, 1 - args["eps"] / n2, np.ones_like(n2))


@holds("rope")
def rope_isometry(rng: np.random.Generator) -> Iterator[Finding]:
    """|y| = |x| and |dx| = |dy|, head by head."""
    spec, args, dy = drawn("rope", rng)
    y, dx = spec.forward(**args)[0], spec.vjp(dy, args)["x"]
    for what, after, before in (("y", y, args["x"]), ("dx", dx, dy)):
        size = (before**2).sum(axis=-1)
        yield agree("rope", what, (after**2).sum(axis=-1), size, size)


@holds("rope")
def rope_inverse(rng: np.random.Generator) -> Iterator[Finding]:
    """The backward undoes the forward: vjp(rope(x)) = x."""
    spec, args, _ = drawn("rope", rng)
    x = args["x"]
    back = spec.vjp(spec.forward(**args)[0], args)["x"]
    yield agree("rope", "rope_bwd(rope(x))", back, x, 2 * np.abs(x).max())


@holds("rope")
def rope_relative_position(rng: np.random.Generator) -> Iterator[Finding]:
    """Scores of rotated queries and keys do not change when all positions shift."""
    spec, d, t = OPS["rope"], 8, 6
    q, k = rng.standard_normal((2, 1, t, 2, d))
    scores = []
    for start in (0, 11):
        cos, sin = ops.rope_tables(start, start + t, d, 100.0, np.dtype(np.float64))
        (a, _), (b, _) = spec.forward(q, cos, sin), spec.forward(k, cos, sin)
        scores.append(np.einsum("nihd,njhd->nhij", a, b))
    mag = np.einsum("nihd,njhd->nhij", np.abs(q), np.abs(k))
    yield agree("rope", "scores", scores[1], scores[0], 4 * mag.max())


@holds("rope")
def rope_planes(rng: np.random.Generator) -> Iterator[Finding]:
    """Channel i turns into channel i + D/2 and nothing else; at position 0 it stays."""
    spec, d = OPS["rope"], 6
    cos, sin = ops.rope_tables(0, 3, d, 100.0, np.dtype(np.float64))
    unit = np.zeros((1, 3, d, d))
    unit[0] = np.eye(d)  # head i holds the unit vector i
    y = spec.forward(unit, cos, sin)[0]
    plane = np.eye(d) + np.roll(np.eye(d), d // 2, axis=1)
    yield agree("rope", "off its plane", y * (1 - plane), 0.0, np.zeros(y.shape))
    yield agree("rope", "position 0", y[:, 0], np.eye(d)[None], np.eye(d)[None])
    turned = y[0, 1, 0, d // 2]
    yield agree("rope", "sense of rotation", turned, np.sin(1.0), 1.0)
