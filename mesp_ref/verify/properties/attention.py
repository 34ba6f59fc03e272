"""Softmax and attention: what probabilities, shared heads and causality imply."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import OPS, Args
from mesp_ref.verify.properties.claim import agree, drawn, exactly, holds
from mesp_ref.verify.result import Finding

OPS_OF_ATTENTION = ("attention", "tiled_attention")


def grouped(x: Array, groups: int) -> Array:
    """Sum over the tokens and the query heads that share a key/value head: [N, T, H, D] -> [N, G, D]."""
    n, t, heads, d = x.shape
    return x.reshape(n, t, groups, heads // groups, d).sum(axis=(1, 3))


@holds("causal_softmax")
def softmax_rows(rng: np.random.Generator) -> Iterator[Finding]:
    """Rows of p sum to 1, rows of ds to 0."""
    spec, args, dp = drawn("causal_softmax", rng)
    p, ds = spec.forward(**args)[0], spec.vjp(dp, args)["s"]
    mag = spec.magnitudes(dp, args)["s"].sum(axis=-1)
    yield agree("causal_softmax", "Σ p", p.sum(axis=-1), 1.0, np.ones(p.shape[:-1]))
    yield agree("causal_softmax", "Σ ds", ds.sum(axis=-1), 0.0, mag)


@holds("causal_softmax")
def softmax_of_each(rng: np.random.Generator) -> Iterator[Finding]:
    """A stack of score matrices is each of them alone, to the bit."""
    spec, args, dp = drawn("causal_softmax", rng)
    (p, ds), at = (spec.forward(**args)[0], spec.vjp(dp, args)["s"]), (1, 0)
    one = {"s": args["s"][at]}
    yield exactly("causal_softmax", "p of one", spec.forward(**one)[0], p[at])
    yield exactly("causal_softmax", "ds of one", spec.vjp(dp[at], one)["s"], ds[at])


@holds("causal_softmax")
def softmax_shift(rng: np.random.Generator) -> Iterator[Finding]:
    """Adding a constant to a row of scores changes nothing, even one of which exp overflows."""
    spec, args, _ = drawn("causal_softmax", rng)
    for size in (1, 1000):
        shift = size * rng.integers(-4, 5, (*args["s"].shape[:-1], 1)).astype(float)
        p, moved = (spec.forward(s)[0] for s in (args["s"], args["s"] + shift))
        yield agree("causal_softmax", "p(s + c)", moved, p, 8 * size * np.abs(args["s"]).max())


@holds("causal_softmax")
def softmax_mask(rng: np.random.Generator) -> Iterator[Finding]:
    """p and ds are exactly 0 beyond j = i + Tk − Tq and alive up to there."""
    spec, args, dp = drawn("causal_softmax", rng)
    p, ds = spec.forward(**args)[0], spec.vjp(dp, args)["s"]
    tq, tk = p.shape[-2:]
    hidden = np.arange(tk) > np.arange(tq)[:, None] + tk - tq
    yield exactly("causal_softmax", "p masked", p[..., hidden], 0.0)
    yield exactly("causal_softmax", "ds masked", ds[..., hidden], 0.0)
    yield exactly("causal_softmax", "p visible", p[..., ~hidden] > 0, True)


Body = Callable[[str, np.random.Generator], Iterator[Finding]]


def _with_each(check_name: str, doc: str, body: Body) -> None:
    """Register a property for the plain and for the tiled op."""
    for name in OPS_OF_ATTENTION:

        def check(rng: np.random.Generator, name: str = name) -> Iterator[Finding]:
            yield from body(name, rng)

        check.__name__, check.__doc__ = f"{name}_{check_name}", doc
        holds(name)(check)


def _sums(name: str, rng: np.random.Generator) -> Iterator[Finding]:
    spec, args, do = drawn(name, rng)
    o, g = spec.forward(**args)[0], spec.vjp(do, args)
    mag, groups = spec.magnitudes(do, args), args["k"].shape[2]
    yield agree(name, "Σ dk", g["k"].sum(axis=1), 0.0, mag["k"].sum(axis=1))
    yield agree(name, "Σ dv", g["v"].sum(axis=1), grouped(do, groups), mag["v"].sum(axis=1))
    qdq, kdk = grouped(args["q"] * g["q"], groups), (args["k"] * g["k"]).sum(axis=1)
    size = (np.abs(args["k"]) * mag["k"]).sum(axis=(1, 3))
    yield agree(name, "Σ q·dq = Σ k·dk", qdq.sum(axis=-1), kdk.sum(axis=-1), size)
    odo, vdv = grouped(o * do, groups), (args["v"] * g["v"]).sum(axis=1)
    yield agree(name, "Σ v·dv = Σ o·do", vdv, odo, (np.abs(args["v"]) * mag["v"]).sum(axis=1))


_with_each(
    "sums",
    "Over tokens: Σ dk = 0, Σ dv = Σ do, Σ v·dv = Σ o·do by channel; Σ q·dq = Σ k·dk by kv head.",
    _sums,
)


def _shifted(name: str, rng: np.random.Generator) -> Iterator[Finding]:
    spec, args, do = drawn(name, rng)
    far = 4000 * rng.standard_normal(args["k"][:, :1].shape)
    moved = args | {"k": args["k"] + far}
    size, mag = np.abs(args["q"]).max() * np.abs(far).max(), spec.magnitudes(do, args)
    g, g_moved = spec.vjp(do, args), spec.vjp(do, moved)
    o, o_moved = (spec.forward(**given)[0] for given in (args, moved))
    yield agree(name, "o", o_moved, o, size * np.abs(args["v"]).max())
    yield agree(name, "dv", g_moved["v"], g["v"], size * mag["v"].max())


_with_each(
    "shift",
    "One vector added to all keys changes neither o nor dv, even where exp of the scores overflows.",
    _shifted,
)


def _degenerate(name: str, rng: np.random.Generator) -> Iterator[Finding]:
    spec, args, do = drawn(name, rng)
    args["v"] = np.broadcast_to(args["v"][:, :1], args["v"].shape).copy()
    o, g = spec.forward(**args)[0], spec.vjp(do, args)
    mag, share = spec.magnitudes(do, args), do.shape[2] // args["k"].shape[2]
    yield agree(name, "o", o, args["v"][:, :1].repeat(share, axis=2), np.abs(args["v"]).max())
    for what in ("q", "k"):
        yield agree(name, f"d{what}", g[what], 0.0, mag[what].max())
    spec, args, do = drawn(name, rng, t=1, past=0)
    g = spec.vjp(do, args)
    yield exactly(name, "o at T = 1", spec.forward(**args)[0], args["v"].repeat(share, axis=2))
    total = grouped(do, args["k"].shape[2])[:, None]
    yield agree(name, "dv at T = 1", g["v"], total, 2 * np.abs(do).max())
    for what in ("q", "k"):
        mag_1 = spec.magnitudes(do, args)[what].max()
        yield agree(name, f"d{what} at T = 1", g[what], 0.0, mag_1)


_with_each(
    "degenerate",
    "Equal value rows pass through and give dq = dk = 0; so does a single token.",
    _degenerate,
)


def _causal(name: str, rng: np.random.Generator) -> Iterator[Finding]:
    spec, args, do = drawn(name, rng)
    past = args["k"].shape[1] - args["q"].shape[1]
    do[:, 2:] = 0
    g = spec.vjp(do, args)
    for what, after in (("q", 2), ("k", past + 2), ("v", past + 2)):
        yield exactly(name, f"d{what} of the future", g[what][:, after:], 0.0)
    seen = g["v"][:, past + 1].reshape(len(do), -1)
    yield exactly(name, "dv of the last visible key", np.abs(seen).max(axis=1) > 0, True)


_with_each(
    "causality", "What comes later has gradient exactly 0; the last visible key lives.", _causal
)


def _repeated(name: str, rng: np.random.Generator) -> Iterator[Finding]:
    spec, args, do = drawn(name, rng)
    groups = args["k"].shape[2]
    share = do.shape[2] // groups
    wide: Args = args | {key: args[key].repeat(share, axis=2) for key in ("k", "v")}
    o, o_wide = spec.forward(**args)[0], spec.forward(**wide)[0]
    yield agree(name, "o", o, o_wide, np.abs(args["v"]).max() * 4)
    g, g_wide, mag = spec.vjp(do, args), spec.vjp(do, wide), spec.magnitudes(do, args)
    yield agree(name, "dq", g["q"], g_wide["q"], mag["q"])
    for key in ("k", "v"):
        n, t, _, d = wide[key].shape
        summed = g_wide[key].reshape(n, t, groups, share, d).sum(axis=3)
        yield agree(name, f"d{key}", g[key], summed, mag[key])


_with_each(
    "shared_heads", "GQA is attention with repeated k and v, whose gradients add.", _repeated
)


def _heads_apart(name: str, rng: np.random.Generator) -> Iterator[Finding]:
    spec, args, do = drawn(name, rng)
    share = do.shape[2] // args["k"].shape[2]
    alone = {"q": args["q"][:, :, :share], "k": args["k"][:, :, :1], "v": args["v"][:, :, :1]}
    first = spec.forward(**args | alone)[0]
    yield agree(
        name,
        "o of group 0",
        spec.forward(**args)[0][:, :, :share],
        first,
        4 * np.abs(args["v"]).max(),
    )
    mean = spec.forward(**args | {"q": 0 * args["q"]})[0][:, -1]
    expected = args["v"].mean(axis=1).repeat(share, axis=1)
    yield agree(name, "o of the last token at q = 0", mean, expected, np.abs(args["v"]).max())
    small = 2.0**-30
    tiny = args | {"q": args["q"] * small}
    slope = (spec.forward(**tiny)[0] - spec.forward(**args | {"q": 0 * args["q"]})[0])[
        :, -1
    ] / small
    k, v = (args[key].repeat(share, axis=2) for key in ("k", "v"))
    s = np.einsum("nhd,njhd->nhj", args["q"][:, -1], k) / np.sqrt(k.shape[-1])
    linear = np.einsum("nhj,njhd->nhd", s - s.mean(axis=-1, keepdims=True), v) / k.shape[1]
    yield agree(name, "o to first order in q", slope, linear, np.abs(s).max() * 10, relative=1e-6)


_with_each(
    "heads_apart",
    "A group sees its own keys only; at q = 0 it averages v, and the slope there has scale 1/√D.",
    _heads_apart,
)


def _documents_apart(name: str, plain: str, rng: np.random.Generator) -> Iterator[Finding]:
    """o, dq, dk and dv of a row of several documents are those of each document alone."""
    spec, args, do = drawn(name, rng)
    o, grads, alone = spec.forward(**args)[0], spec.vjp(do, args), OPS[plain]
    size = np.abs(args["v"]).max()
    for i, firsts in enumerate(args["first"]):
        edges = [*np.unique(firsts), len(firsts)]
        for a, b in pairwise(edges):
            part = {key: args[key][i : i + 1, a:b] for key in "qkv"}
            given, dpart = part | {"first": None}, do[i : i + 1, a:b]
            yield agree(name, "o", o[i : i + 1, a:b], alone.forward(**given)[0], size)
            mags, wanted = alone.magnitudes(dpart, given), alone.vjp(dpart, given)
            for key, grad in wanted.items():
                claim = f"d{key} of tokens {a} to {b}"
                yield agree(name, claim, grads[key][i : i + 1, a:b], grad, 4 * mags[key].max())


@holds("packed_attention")
def documents_apart(rng: np.random.Generator) -> Iterator[Finding]:
    """A row of several documents is the documents, one beside the other."""
    return _documents_apart("packed_attention", "attention", rng)


@holds("tiled_packed_attention")
def documents_apart_in_tiles(rng: np.random.Generator) -> Iterator[Finding]:
    """In tiles, too, where a tile may hold the end of one document and the beginning of another."""
    return _documents_apart("tiled_packed_attention", "attention", rng)
