"""Exercises: attention with one head, then with key/value heads that are shared."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.learn.exercise import SMALL, UNEVEN, Exercise, Given, Outputs, Wrong, of_op
from mesp_ref.learn.exercises.softmax import OF_SOFTMAX, softmax_bwd
from mesp_ref.ops import Array
from mesp_ref.registry.cases import times
from mesp_ref.registry.sizes import Sizes

_ONE = {"g": 1, "share": 1}


def attention_one_head_bwd(do: Array, res: ops.AttentionRes) -> tuple[Array, Array, Array]:
    """Attention's backward where H = G = 1."""
    return ops.attention_bwd(do, res)


def _cases(shared: bool) -> tuple[tuple[Any, ...], ...]:
    def heads(sizes: Sizes, g: int, share: int) -> Sizes:
        return sizes._replace(g=g, share=share) if shared else sizes._replace(g=1, share=1)

    return (
        ("small", "two tokens, D = 2", heads(SMALL, 1, 2)),
        ("uneven", "all lengths differ, two earlier keys", heads(UNEVEN, 2, 3), times(q=0.8)),
        ("one token", "T = 1: p is 1, so dq and dk are 0", heads(UNEVEN._replace(t=1, past=0), 3, 2)),
        ("large", "scores of hundreds", heads(UNEVEN._replace(n=2, t=4, past=0, d=6), 2, 2),
         times(q=20.0, k=8.0)),
        ("longer", "seven tokens, D = 8", heads(UNEVEN._replace(n=2, t=7, past=0, d=8), 3, 2),
         times(q=0.5)),
    )  # fmt: skip


def _numbers(g: Given) -> dict[str, float]:
    (n, tq, h, d), (_, tk, groups, _) = g.q.shape, g.k.shape
    found = {"D": d, "the batch size N": n, "the number of keys": tk, "the number of queries": tq}
    return found | ({"H/G": h / groups, "the number of heads H": h, "G": groups} if h > 1 else {})


def _through_softmax(g: Given, k: Array, v: Array, p: Array, m: Wrong) -> Array:
    """ds, before the factor 1/√D."""
    do = g.do
    dp = m.pick(
        np.einsum("nqhd,nkhd->nhqk", do, v), dp_of_k=lambda: np.einsum("nqhd,nkhd->nhqk", do, k),
        dp_of_q=lambda: np.einsum("nqhd,nkhd->nhqk", do, g.q),
        dp_transposed=lambda: np.einsum("nqhd,nkhd->nhkq", do, v),
    )  # fmt: skip
    ds = softmax_bwd(dp, p, m)
    return np.asarray(m.pick(ds, unmasked=_unmasked(g, k, dp)))


def _unmasked(g: Given, k: Array, dp: Array) -> Array:
    """Softmax's backward with p rebuilt without the causal mask."""
    s = np.einsum("nqhd,nkhd->nhqk", g.q, k) * g.q.shape[-1] ** -0.5
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    unmasked: Array = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    return unmasked


def _gradients(g: Given, k: Array, v: Array, m: Wrong) -> tuple[Array, Array, Array]:
    """dq, and dk and dv of every query head."""
    do, q, p, d = g.do, g.q, g.p, g.q.shape[-1]
    ds = _through_softmax(g, k, v, p, m)
    scale = m.pick(
        d**-0.5, unscaled=1.0, scaled_twice=1 / d, times_root=d**0.5, scale_on_dq=(d**-0.5, 1.0),
        scale_on_dk=(1.0, d**-0.5), dq_scaled_twice=(1 / d, d**-0.5), dk_scaled_twice=(d**-0.5, 1 / d),
        times_d=float(d), over_keys=k.shape[1] ** -0.5,
    )  # fmt: skip
    on_q, on_k = scale if isinstance(scale, tuple) else (scale, scale)
    query, key = m.pick(
        (q, k), factors_exchanged=lambda: (k, q), dq_of_v=lambda: (q, v), dk_of_do=lambda: (do, k),
        dq_of_q=lambda: (q, q), dk_of_k=lambda: (k, k),
    )  # fmt: skip
    for_q = m.pick(ds, dq_transposed=lambda: ds.swapaxes(2, 3))
    for_k = m.pick(ds, dk_transposed=lambda: ds.swapaxes(2, 3))
    dq = np.einsum("nhqk,nkhd->nqhd", for_q, key) * on_q
    dk = np.einsum("nhqk,nqhd->nkhd", for_k, query) * on_k
    weights = m.pick(
        p, dv_of_ds=ds, dv_of_ds_scaled=ds * d**-0.5, dv_transposed=lambda: p.swapaxes(2, 3),
        dv_ones=(p > 0) * 1.0, dv_mean=p / p.shape[2], dv_scaled=p * d**-0.5,
    )  # fmt: skip
    dv = np.einsum("nhqk,nqhd->nkhd", weights, m.pick(do, dv_of_v=lambda: v, dv_of_q=lambda: q))
    return m.pick(
        (dq, dk, dv), exchanged=lambda: (dq, dv, dk), exchanged_qk=lambda: (dk, dq, dv),
        exchanged_qv=lambda: (dv, dk, dq), dq_negated=(-dq, dk, dv), dk_negated=(dq, -dk, dv),
        dv_negated=(dq, dk, -dv),
    )  # fmt: skip


_MISTAKES = {key: f"in the softmax, {text}" for key, text in OF_SOFTMAX.items()} | {
    "detached": "the probabilities are treated as constants (detached): dq and dk are 0.",
    "unmasked": "the probabilities are rebuilt without the causal mask.",
    "dp_of_k": "dp is formed with k where v belongs: dp = do·vᵀ.",
    "dp_of_q": "dp is formed with q where v belongs: dp = do·vᵀ.",
    "dp_transposed": "dp is transposed: [queries, keys].",
    "unscaled": "the scale 1/√D is missing in dq and dk.",
    "scaled_twice": "the scale 1/√D is applied twice, so that 1/D stands in dq and dk.",
    "times_root": "dq and dk are multiplied by √D where they must be divided: the scale is 1/√D.",
    "times_d": "dq and dk are multiplied by D: the scale is 1/√D.",
    "over_keys": "the scale is 1/√(number of keys) where 1/√D belongs.",
    "scale_on_dq": "the scale 1/√D is missing in dk.",
    "scale_on_dk": "the scale 1/√D is missing in dq.",
    "dq_scaled_twice": "the scale 1/√D is applied twice in dq.",
    "dk_scaled_twice": "the scale 1/√D is applied twice in dk.",
    "factors_exchanged": "q and k are exchanged: dq is formed with q and dk with k; the score is q·k, so each takes the other.",
    "dq_of_v": "dq is formed with v where k belongs.",
    "dq_of_q": "dq is formed with q where k belongs.",
    "dk_of_do": "dk is formed with do where q belongs.",
    "dk_of_k": "dk is formed with k where q belongs.",
    "dq_transposed": "ds is transposed in dq: dq = ds·k.",
    "dk_transposed": "ds is not transposed in dk: dk = dsᵀ·q, summed over the queries.",
    "dv_transposed": "p is not transposed in dv: dv = pᵀ·do, summed over the queries.",
    "dv_of_ds": "dv is formed with ds where p belongs.",
    "dv_of_ds_scaled": "dv is formed with ds/√D where p belongs.",
    "dv_ones": "dv is the plain sum of do over the queries that see a key: the weights p are missing.",
    "dv_mean": "dv is averaged over the queries; it is their sum.",
    "dv_scaled": "dv is scaled by 1/√D: only the scores are.",
    "dv_of_v": "dv is formed with v where do belongs.",
    "dv_of_q": "dv is formed with q where do belongs.",
    "exchanged": "dk and dv are exchanged: they are returned in the wrong order.",
    "exchanged_qk": "dq and dk are exchanged: they are returned in the wrong order.",
    "exchanged_qv": "dq and dv are exchanged: they are returned in the wrong order.",
    "dq_negated": "dq has the wrong sign.",
    "dk_negated": "dk has the wrong sign.",
    "dv_negated": "dv has the wrong sign.",
}


def _one_head(g: Given, m: Wrong) -> Outputs:
    return dict(zip(("dq", "dk", "dv"), _gradients(g, g.k, g.v, m), strict=True))


def _sum_heads(x: Array, groups: int, m: Wrong) -> Any:
    """The sum over the query heads that share a key/value head."""
    n, t, heads, d = x.shape
    share = heads // groups
    grouped = x.reshape(n, t, groups, share, d)
    return m.pick(
        grouped.sum(axis=3), mean_of_group=grouped.mean(axis=3), first_of_group=grouped[:, :, :, 0],
        last_of_group=grouped[:, :, :, -1], not_summed=lambda: x,
        summed_as_tiles=x.reshape(n, t, share, groups, d).sum(axis=2),
        first_heads=x[:, :, :groups], last_heads=x[:, :, -groups:],
        all_heads=x.sum(axis=2, keepdims=True) + 0 * x[:, :, :groups],
        group_mean_of_all=grouped.sum(axis=3) / heads, root_share=grouped.sum(axis=3) / share**0.5, max_of_group=grouped.max(axis=3),
    )  # fmt: skip


_GROUP = {
    "mean_of_group": "{} averaged over the query heads of a group where they must be summed.",
    "first_of_group": "{} of the first query head of each group only: sum over all that share it.",
    "last_of_group": "{} of the last query head of each group only: sum over all that share it.",
    "not_summed": "{} not summed over the query heads of a group: k and v have fewer heads than q.",
    "summed_as_tiles": "{} summed as if heads were tiled (h mod G); head h belongs to group h // (H/G).",
    "first_heads": "{} of the first G query heads: sum over those that share a key/value head.",
    "last_heads": "{} of the last G query heads: sum over those that share a key/value head.",
    "all_heads": "{} summed over all query heads: only those of a group share a key/value head.",
    "group_mean_of_all": "{} divided by the number of query heads H: it is a sum.",
    "max_of_group": "{} the largest of the query heads of a group: they must be summed.",
    "root_share": "{} divided by √(H/G): it is a sum.",
}


def _shared(g: Given, m: Wrong) -> Outputs:
    groups, heads = g.k.shape[2], g.q.shape[2]
    share = heads // groups

    def repeated(x: Array) -> Array:
        return x.repeat(share, axis=2)

    def tiled(x: Array) -> Array:
        return np.tile(x, (1, 1, share, 1))

    k, v = m.pick(
        (repeated(g.k), repeated(g.v)), tiled_heads=(tiled(g.k), tiled(g.v)), tiled_k=(tiled(g.k), repeated(g.v)), tiled_v=(repeated(g.k), tiled(g.v)),
        first_kv=(g.k[:, :, :1] + 0 * g.q[:, :1], g.v[:, :, :1] + 0 * g.q[:, :1]),
    )  # fmt: skip
    dq, dk, dv = _gradients(g, k, v, m)
    both = _sum_heads(np.stack([dk, dv]).reshape(-1, *dk.shape[1:]), groups, m)
    sum_k, sum_v = both.reshape(2, -1, *both.shape[1:])
    alone_k, alone_v = _Renamed(m, "dk_"), _Renamed(m, "dv_")
    right = {f"{key}" for key in _GROUP} & m.keys
    dk = sum_k if right else _sum_heads(dk, groups, alone_k)  # type: ignore[arg-type]
    dv = sum_v if right else _sum_heads(dv, groups, alone_v)  # type: ignore[arg-type]
    if "tiled_throughout" in m:
        return _shared(g, Wrong(m.keys - {"tiled_throughout"} | {"tiled_heads", "summed_as_tiles"}))
    return {"dq": dq, "dk": dk, "dv": dv}


class _Renamed:
    """Picks of one output alone: their keys begin with its name."""

    def __init__(self, wrong: Wrong, prefix: str):
        self.wrong, self.prefix = wrong, prefix

    def pick(self, right: Any, **others: Any) -> Any:
        return self.wrong.pick(right, **{self.prefix + key: value for key, value in others.items()})


_SHARED = {
    "tiled_heads": "k and v are tiled over the query heads (h mod G) in the backward; head h belongs to group h // (H/G).",
    "tiled_k": "k is tiled over the query heads (h mod G) in the backward; head h belongs to group h // (H/G).",
    "tiled_v": "v is tiled over the query heads (h mod G) in the backward; head h belongs to group h // (H/G).",
    "tiled_throughout": "key/value heads are tiled (head h reads h mod G) throughout the backward; head h belongs to group h // (H/G).",
    "first_kv": "all query heads read the first key/value head.",
    **{key: text.format("dk and dv are") for key, text in _GROUP.items()},
    **{f"{d}_{key}": text.format(f"{d} is") for d in ("dk", "dv") for key, text in _GROUP.items()},
}


def _exercise(function: Callable[..., Any] | None, shared: bool, **more: Any) -> Exercise:
    chosen: Any = {"function": function} if function else {}
    return of_op(
        "attention", outputs="dq dk dv", cases=_cases(shared), numbers=_numbers,
        hints=(
            "Go back in the order of the forward: o = p·v, p = softmax(s), s = q·kᵀ/√D.",
            "dv = pᵀ·do and dp = do·vᵀ come first, then softmax's backward, then dq and dk from ds.",
        ), **chosen, **more,
    )  # fmt: skip


ONE_HEAD = _exercise(
    attention_one_head_bwd,
    False,
    title="causal attention with one head",
    formula=_one_head,
    mistakes=_MISTAKES | {"over_heads": _MISTAKES["as_sigmoid"]},  # over one head it is the same
    aliases=("attention_one_head", "one_head_attention_bwd", "attention_head_bwd"),
)
SHARED = _exercise(
    None,
    True,
    title="causal attention whose query heads share key/value heads",
    formula=_shared,
    mistakes=_MISTAKES | _SHARED,
    aliases=("attention", "gqa", "gqa_bwd", "attention_shared_heads_bwd"),
)
