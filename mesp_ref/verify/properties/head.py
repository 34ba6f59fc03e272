"""Embedding, cross entropy and the head: what counting, normalising and a bilinear form imply."""

from collections.abc import Iterator

import numpy as np

from mesp_ref.lean.shards import shared_lm_loss
from mesp_ref.lean.workers import Workers
from mesp_ref.ops import IGNORED, Array
from mesp_ref.registry import OPS
from mesp_ref.verify.properties.claim import agree, drawn, exactly, holds
from mesp_ref.verify.result import Finding

_ONE = np.ones(())


@holds("embedding")
def embedding_accumulates(rng: np.random.Generator) -> Iterator[Finding]:
    """Row v of dw is the sum of dy over the places of token v; absent tokens have exactly 0."""
    spec, args, dy = drawn("embedding", rng)
    dw = spec.vjp(dy, args)["w"]
    for token in range(len(dw)):
        rows = dy[args["ids"] == token]
        yield agree(
            "embedding", f"row {token}", dw[token], rows.sum(axis=0), np.abs(rows).sum(axis=0)
        )
    yield exactly("embedding", "y", spec.forward(**args)[0][1, 2], args["w"][args["ids"][1, 2]])


@holds("cross_entropy")
def dlogits_rows(rng: np.random.Generator) -> Iterator[Finding]:
    """A counted row sums to 0 and Σ|dlogits| = 2(1 − p_label)/count; ignored rows are exactly 0."""
    spec, args, _ = drawn("cross_entropy", rng)
    g = spec.vjp(_ONE, args)["logits"]
    z, labels = args["logits"], args["labels"]
    counted = np.flatnonzero(labels != IGNORED)
    p = np.exp(z[counted]) / np.exp(z[counted]).sum(axis=1, keepdims=True)
    missing = 2 * (1 - p[np.arange(len(counted)), labels[counted]]) / len(counted)
    yield agree("cross_entropy", "Σ dlogits", g[counted].sum(axis=1), 0.0, 4 / len(counted))
    yield agree(
        "cross_entropy", "Σ|dlogits|", np.abs(g[counted]).sum(axis=1), missing, 8 / len(counted)
    )
    yield exactly("cross_entropy", "ignored rows", g[labels == IGNORED], 0.0)
    signs = g[counted, labels[counted]] < 0
    yield exactly("cross_entropy", "only the label's entry is negative", signs, True)


@holds("cross_entropy")
def loss_shift(rng: np.random.Generator) -> Iterator[Finding]:
    """A constant added to a row of logits changes nothing, even one of which exp overflows."""
    spec, args, _ = drawn("cross_entropy", rng)
    moved = args | {"logits": args["logits"] + 2000 * rng.standard_normal((len(args["logits"]), 1))}
    loss, same = (spec.forward(**given)[0] for given in (args, moved))
    yield agree("cross_entropy", "loss", same, loss, 4000.0)
    g, g_same = (spec.vjp(_ONE, given)["logits"] for given in (args, moved))
    yield agree("cross_entropy", "dlogits", g_same, g, 4000.0)


@holds("cross_entropy")
def loss_of_copies(rng: np.random.Generator) -> Iterator[Finding]:
    """A batch and its copy have the loss of the batch and half its gradient; log V when uniform."""
    spec, args, _ = drawn("cross_entropy", rng)
    twice = {name: np.concatenate([value, value]) for name, value in args.items()}
    loss, doubled = spec.forward(**args)[0], spec.forward(**twice)[0]
    yield agree("cross_entropy", "loss", doubled, loss, 2 * np.abs(loss))
    g, g_twice = (spec.vjp(_ONE, a)["logits"] for a in (args, twice))
    yield agree("cross_entropy", "dlogits", 2 * g_twice[: len(g)], g, np.ones_like(g))
    flat = args | {"logits": np.full_like(g, 3.0)}
    size = np.log(g.shape[1])
    yield agree("cross_entropy", "uniform logits", spec.forward(**flat)[0], size, 8 * size)


def _shift(name: str) -> None:
    def shifted(rng: np.random.Generator) -> Iterator[Finding]:
        spec, args, _ = drawn(name, rng)
        moved = args | {"w": args["w"] + 2000 * rng.standard_normal(args["w"].shape[1])}
        size = (np.abs(args["x"]) @ np.abs(moved["w"]).T).max()
        loss, same = (spec.forward(**given)[0] for given in (args, moved))
        yield agree(name, "loss", same, loss, size)
        g, g_same = (spec.vjp(_ONE, given) for given in (args, moved))
        for what in "xw":
            largest = np.abs(g[what]).max() if what == "w" else np.abs(moved["w"]).max()
            yield agree(name, f"d{what}", g_same[what], g[what], size * largest)

    shifted.__name__ = f"{name}_shift"
    shifted.__doc__ = (
        "One vector added to all rows of W changes no gradient, even where exp of z overflows."
    )
    holds(name)(shifted)


def _head(name: str) -> None:
    def check(rng: np.random.Generator) -> Iterator[Finding]:
        spec, args, dloss = drawn(name, rng)
        g, mag = spec.vjp(dloss, args), spec.magnitudes(dloss, args)
        xdx, wdw = (args["x"] * g["x"]).sum(), (args["w"] * g["w"]).sum()
        size = (np.abs(args["w"]) * mag["w"]).sum()
        yield agree(name, "Σ x·dx = Σ w·dw", xdx, wdw, 2 * size)
        yield agree(name, "Σ_v dw", g["w"].sum(axis=0), 0.0, mag["w"].sum(axis=0))
        yield exactly(name, "dx of ignored rows", g["x"][args["labels"] == IGNORED], 0.0)

    check.__name__ = f"{name}_is_bilinear"
    check.__doc__ = (
        "Σ x·dx = Σ w·dw, Σ over the vocabulary of dw = 0, ignored rows of dx exactly 0."
    )
    holds(name)(check)

    def parts(rng: np.random.Generator) -> Iterator[Finding]:
        spec, args, _ = drawn(name, rng)
        z = args["x"] @ args["w"].T
        logits = {"logits": z.reshape(-1, z.shape[-1]), "labels": args["labels"].reshape(-1)}
        loss, whole = OPS["cross_entropy"].forward(**logits)[0], spec.forward(**args)[0]
        dz = OPS["cross_entropy"].vjp(_ONE, logits)["logits"].reshape(z.shape)
        g, mag = spec.vjp(_ONE, args), spec.magnitudes(_ONE, args)
        yield agree(name, "loss", whole, loss, 16 * np.abs(loss))
        yield agree(name, "dx", g["x"], dz @ args["w"], mag["x"])
        yield agree(name, "dw", g["w"], np.einsum("ntv,ntc->vc", dz, args["x"]), mag["w"])

    parts.__name__ = f"{name}_is_linear_then_cross_entropy"
    parts.__doc__ = "Loss, dx and dw are those of a linear layer followed by cross entropy."
    holds(name)(parts)


@holds("lm_loss")
def parts_far_apart(rng: np.random.Generator) -> Iterator[Finding]:
    """Parts of the vocabulary whose logits differ by thousands: one takes all, nothing overflows."""
    _, args, _ = drawn("lm_loss", rng)
    for order in (1, -1):
        level = np.linspace(0, 2000, len(args["w"]))[::order]  # of the logits of each token
        x = np.concatenate([args["x"], np.ones((*args["x"].shape[:-1], 1))], axis=-1)
        yield from _by_parts(x, np.column_stack([args["w"], level]), args["labels"], 2000.0)


@holds("lm_loss")
def parts_of_rows(rng: np.random.Generator) -> Iterator[Finding]:
    """Enough rows for several workers: the loss is their weighted mean; dx where it is wanted."""
    _, args, _ = drawn("lm_loss", rng, t=701)
    yield from _by_parts(args["x"], args["w"], args["labels"], 1.0)


def _by_parts(x: Array, w: Array, labels: Array, size: float) -> Iterator[Finding]:
    loss, res = OPS["lm_loss"].forward(x, w, labels)
    for parts in (2, 3):
        got, found = shared_lm_loss(Workers(parts), x, w, labels)
        yield agree("lm_loss", f"loss of {parts} parts", got, loss, 8 * loss)
        yield exactly("lm_loss", "dx is kept", found.dx is not None, True)
        yield agree("lm_loss", f"dx of {parts} parts", found.dx, res.dx, 2 * size)
        got, found = shared_lm_loss(Workers(parts), x, w, labels, drop=frozenset({"dx"}))
        yield agree("lm_loss", f"loss of {parts} parts alone", got, loss, 8 * loss)
        yield exactly("lm_loss", "dx is dropped", found.dx is None, True)


for _name in ("lm_loss", "tiled_lm_loss"):
    _head(_name)
    _shift(_name)
