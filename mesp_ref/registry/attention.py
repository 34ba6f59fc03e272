"""attention: causal, with shared key/value heads; plain and over query tiles."""

from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref import lean, ops
from mesp_ref.ops import Array
from mesp_ref.registry import cases, causal_softmax
from mesp_ref.registry.absolute import carried
from mesp_ref.registry.cases import ONE_TOKEN, USUAL, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import array, dot, sqrt
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    keys = z.n, z.t + z.past, z.g, z.d
    q = normal(rng, dtype, z.n, z.t, z.h, z.d)
    k, v = normal(rng, dtype, *keys), normal(rng, dtype, *keys)
    return {"q": q, "k": k, "v": v, "first": None}


def packed(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    """A row of one document, then rows of several, of one token and more."""
    starts = rng.random((z.n, z.t)) < 0.4
    starts[0] = False
    first = np.maximum.accumulate(np.where(starts, np.arange(z.t), 0), axis=1)
    return sample(rng, z._replace(past=0), dtype) | {"first": first}


def windowed(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    """Earlier keys in a cache, of which a query sees the last four or fewer; scores scaled otherwise."""
    first = np.maximum(0, np.arange(z.past, z.past + z.t) - 3)[None]
    return sample(rng, z, dtype) | {"first": first, "scale": 0.375}


def equation(q: Array, k: Array, v: Array, first: Array | None = None, scale: Any = None) -> Array:
    """o = softmax(q·kᵀ·scale)·v per query head h, with key/value head h // (H/G); scale is 1/√D"""
    n, tq, heads, d = q.shape
    share, scale = heads // k.shape[2], scale or 1 / sqrt(d)
    s = array(
        (n, heads, tq, k.shape[1]),
        lambda b, h, i, j: dot(q[b, i, h], k[b, j, h // share]) * scale,
    )
    p = causal_softmax.equation(s, first)
    return array(q.shape, lambda b, i, h, c: dot(p[b, h, i], v[b, :, h // share, c]))


def magnitude(do: Array, res: Any, *, scale: float | None = None) -> tuple[Array, Array, Array]:
    groups, scale = res.k.shape[2], scale or res.q.shape[3] ** -0.5
    q, k, v, do = (np.abs(a).swapaxes(1, 2) for a in (res.q, res.k, res.v, do))  # [N, H, T, D]
    share = q.shape[1] // groups
    k, v = k.repeat(share, axis=1), v.repeat(share, axis=1)
    mag_p = carried(res.p, q @ k.swapaxes(2, 3) * scale)
    ds = causal_softmax.through(do @ v.swapaxes(2, 3), res.p, mag_p) * scale

    def shared(x: Array) -> Array:
        return x.reshape(len(x), groups, share, *x.shape[2:]).sum(axis=2).swapaxes(1, 2)

    dv, dk = mag_p.swapaxes(2, 3) @ do, ds.swapaxes(2, 3) @ q
    return (ds @ k).swapaxes(1, 2), shared(dk), shared(dv)


def output_magnitude(
    q: Array, k: Array, v: Array, first: Any = None, scale: float | None = None
) -> Array:
    share, scale = q.shape[2] // k.shape[2], scale or q.shape[3] ** -0.5
    k, v = k.repeat(share, axis=2), v.repeat(share, axis=2)
    s = np.einsum("nqhd,nkhd->nhqk", q, k) * scale
    mag_s = np.einsum("nqhd,nkhd->nhqk", np.abs(q), np.abs(k)) * scale
    mag_p = causal_softmax.probabilities(s, mag_s, first)[1]
    return np.einsum("nhqk,nkhd->nqhd", mag_p, np.abs(v))


def torch_probabilities(
    torch: Any, q: Any, k: Any, first: Any = None, scale: float | None = None
) -> Any:
    """p [N, H, Tq, Tk] in torch."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) * (scale or q.shape[3] ** -0.5)
    return causal_softmax.torch_twin(torch, scores, *([] if first is None else [first]))


def torch_mix(torch: Any, p: Any, v: Any) -> Any:
    """p·v [N, Tq, H, D] in torch."""
    v = v.repeat_interleave(p.shape[1] // v.shape[2], dim=2)
    return torch.einsum("nhqk,nkhd->nqhd", p, v)


def torch_twin(
    torch: Any, q: Any, k: Any, v: Any, first: Any = None, scale: float | None = None
) -> Any:
    more = () if first is None and scale is None else (first, scale)
    return torch_mix(torch, torch_probabilities(torch, q, k, *more), v)


def _heads(fw: Namespace, x: Any, heads: int) -> Any:
    """[N, T, G, D] as [N, H, T, D]."""
    return fw.xp.repeat(x, heads // x.shape[2], axis=2).swapaxes(1, 2)


def probabilities(
    fw: Namespace, q: Any, k: Any, first: Any = None, scale: float | None = None
) -> Any:
    """p [N, H, Tq, Tk] on an array namespace."""
    h, d = q.shape[2:]
    scores = _heads(fw, q, h) @ _heads(fw, k, h).swapaxes(2, 3)
    return causal_softmax.functional_twin(fw, scores * (scale or d**-0.5), first)


def mix(fw: Namespace, p: Any, v: Any) -> Any:
    """p·v [N, Tq, H, D] on an array namespace."""
    return (p @ _heads(fw, v, p.shape[1])).swapaxes(1, 2)


def functional_twin(
    fw: Namespace, q: Any, k: Any, v: Any, first: Any = None, scale: float | None = None
) -> Any:
    return mix(fw, probabilities(fw, q, k, first, scale), v)


def _ordinary_scores(args: Args) -> Args:
    return args | {"q": args["q"] * 0.75}


CASES = (
    OpCase("usual", "H = 4 on G = 2, two earlier keys", change=_ordinary_scores),
    OpCase("square", "Tq = Tk", USUAL._replace(past=0), _ordinary_scores),
    OpCase("every_head_its_own", "H = G = 3",
           USUAL._replace(g=3, share=1, past=0), _ordinary_scores),
    OpCase("one_kv_head", "G = 1", USUAL._replace(g=1, share=3), _ordinary_scores),
    OpCase("one_token", "p = 1: dq = dk = 0", ONE_TOKEN),
    OpCase("cached", "one query, six earlier keys",
           USUAL._replace(t=1, past=6), _ordinary_scores),
    OpCase("nine_tokens", "one sequence of nine",
           cases.NINE._replace(g=1, share=2, d=2), _ordinary_scores),
    OpCase("zero_queries", "q = 0: uniform, dk = 0", change=cases.put(q=0.0)),
    OpCase("one_pair", "D = 2", USUAL._replace(d=2, past=0), _ordinary_scores),
    OpCase("large_scores", "scores of hundreds",
           USUAL._replace(past=0), cases.times(q=16.0, k=8.0), cases.WIDE),
)  # fmt: skip

ROW = OpSpec(
    name="attention",
    forward=ops.attention,
    backward=ops.attention_bwd,
    activations=("q", "k", "v"),
    constants=("first",),
    attributes=("scale",),
    optional=("first",),
    sample=sample,
    reduction_length=lambda z: max(z.t + z.past, z.t * z.share) + z.d,
    equation=equation,
    magnitude=magnitude,
    golden=Golden(
        cases=CASES,
        roundings={"y": 5, "dq": 8, "dk": 8, "dv": 5},
        forward_length=lambda z: z.d + z.t + z.past,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)

TILED = replace(
    ROW,
    name="tiled_attention",
    forward=lean.attention,
    backward=lean.attention_bwd,
    attributes=("scale", "tile"),
    sample=lambda rng, z, dtype: sample(rng, z, dtype) | {"tile": 2},
    golden=None,
)

PACKED = replace(ROW, name="packed_attention", sample=packed, golden=None)

WINDOWED = replace(ROW, name="windowed_attention", sample=windowed, golden=None)

TILED_WINDOWED = replace(
    TILED,
    name="tiled_windowed_attention",
    sample=lambda rng, z, dtype: windowed(rng, z, dtype) | {"tile": 2},
)

TILED_PACKED = replace(
    TILED,
    name="tiled_packed_attention",
    sample=lambda rng, z, dtype: packed(rng, z, dtype) | {"tile": 2},
)
