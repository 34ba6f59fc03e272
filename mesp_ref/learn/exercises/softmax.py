"""Exercise: causal softmax."""

import numpy as np

from mesp_ref.learn.exercise import LARGE, ONE_TOKEN, SMALL, UNEVEN, Given, Outputs, Wrong, of_op
from mesp_ref.ops import Array
from mesp_ref.registry.cases import times

_CASES = (
    ("small", "two queries, two keys", SMALL),
    ("uneven", "all lengths differ, two earlier keys", UNEVEN),
    ("one token", "T = 1: p is 1, so ds is 0", ONE_TOKEN),
    ("large", "scores of hundreds: one key takes all", LARGE, times(s=100.0)),
    ("several heads", "N = 2, H = 4", UNEVEN._replace(n=2, t=4, past=0, g=2, share=2), times(s=0.7)),
)  # fmt: skip


def _numbers(g: Given) -> dict[str, float]:
    n, h, tq, tk = g.dp.shape
    return {
        "the number of keys": tk,
        "the number of queries": tq,
        "the batch size N": n,
        "the number of heads H": h,
    }


def softmax_bwd(dp: Array, p: Array, m: Wrong) -> Array:
    """ds from dp and p; also the middle of the attention exercises."""
    product = m.pick(dp * p, sum_of_dp=dp, sum_of_p=p, sum_of_p2=dp * p * p)
    dot = m.pick(
        product.sum(axis=-1, keepdims=True), no_row_sum=0, flat_sum=lambda: product.sum(axis=-1),
        over_batch=product.sum(axis=0, keepdims=True), plain_dp_sum=p * 0 + dp.sum(axis=-1, keepdims=True) * p,
 over_queries=product.sum(axis=-2, keepdims=True),
        over_all=product.sum(), row_mean=product.mean(axis=-1, keepdims=True),
        over_heads=product.sum(axis=1, keepdims=True), row_max=product.max(axis=-1, keepdims=True), row_last=product[..., -1:], row_first=product[..., :1],
        over_matrix=product.sum(axis=(-2, -1), keepdims=True),
        half_sum=product.sum(axis=-1, keepdims=True) / 2, double_sum=2 * product.sum(axis=-1, keepdims=True),
    )  # fmt: skip
    bracket = m.pick(
        dp - dot,
        sum_added=dp + dot,
        minus_p=dp - p,
        sum_alone=-dot,
        sum_for_bracket=dot,
        signs_exchanged=dot - dp,
    )
    factor = m.pick(
        p, no_p=1, p_twice=p * p, root_p=np.sqrt(p), visible_for_p=(p > 0) * 1.0, softmax_of_p=np.exp(p) / np.exp(p).sum(axis=-1, keepdims=True),
 one_minus_p=1 - p, p_times_1_minus_p=p * (1 - p),
    )  # fmt: skip
    ds: Array = m.pick(
        factor * bracket, as_sigmoid=dp * p * (1 - p), p_on_sum_only=dp - p * dot, passed_on=dp,
        p_on_dp_only=dp * p - dot, of_log=dp - p * dp.sum(axis=-1, keepdims=True), detached=0 * dp,
    )  # fmt: skip
    return ds


OF_SOFTMAX = {
    "no_row_sum": "the row sum is missing: softmax backward is p ⊙ (dp − Σ dp·p), not p ⊙ dp.",
    "sum_of_dp": "the row sum is of dp alone: Σ dp·p, weighted by p, belongs there.",
    "sum_of_p": "the row sum is of p alone, which is 1: Σ dp·p belongs there.",
    "sum_of_p2": "the row sum has a factor p too many: Σ dp·p.",
    "over_queries": "the row sum runs over the wrong axis: over the queries (columns) instead of the keys.",
    "over_all": "the row sum runs over the whole array: each query has a sum of its own, over its keys (the last axis).",
    "over_heads": "the row sum runs over the wrong axis: over the heads instead of the keys.",
    "over_matrix": "the row sum runs over queries and keys, two axes: each query has a sum of its own.",
    "row_mean": "the row sum is a mean: Σ over the keys, not divided by their number.",
    "row_max": "the maximum of dp·p stands where its sum over the keys belongs.",
    "row_last": "only the last key of the row is in the sum: Σ dp·p runs over all keys.",
    "row_first": "only the first key of the row is in the sum: Σ dp·p runs over all keys.",
    "half_sum": "the row sum is only half of what it must be.",
    "double_sum": "the row sum is counted twice.",
    "sum_added": "the row sum has the wrong sign: it is added where it must be subtracted.",
    "minus_p": "p is subtracted from dp where the row sum Σ dp·p belongs.",
    "sum_alone": "dp itself is missing: only the row sum is there.",
    "sum_for_bracket": "p is multiplied by the row sum alone, without its sign: ds = p ⊙ (dp − Σ dp·p).",
    "signs_exchanged": "ds has the wrong sign: Σ dp·p − dp where dp − Σ dp·p belongs.",
    "no_p": "the factor p in front is missing: ds = p ⊙ (dp − Σ dp·p).",
    "p_twice": "the factor p is applied twice (p²).",
    "root_p": "√p stands where p belongs.",
    "visible_for_p": "the causal mask stands in front where p belongs: ds = p ⊙ (dp − Σ dp·p).",
    "softmax_of_p": "softmax is applied once more to p, which is the softmax already.",
    "flat_sum": "keepdims=True is missing in the row sum: it meets the wrong axis of dp.",
    "over_batch": "the row sum runs over the wrong axis, the batch instead of the keys.",
    "plain_dp_sum": "the row sum is Σ dp times p where Σ dp·p belongs.",
    "one_minus_p": "1 − p stands in front where p belongs.",
    "p_times_1_minus_p": "p·(1 − p) stands in front where p belongs.",
    "as_sigmoid": "it is the backward of a sigmoid, dp ⊙ p·(1 − p): dp·p is not summed over the row, so only the diagonal of the Jacobian, single entries, is there.",
    "p_on_sum_only": "the factor p multiplies the row sum only, not dp: ds = p ⊙ (dp − Σ dp·p).",
    "p_on_dp_only": "the factor p multiplies dp only, not the row sum: ds = p ⊙ (dp − Σ dp·p).",
    "of_log": "it is the backward of log softmax, dp − p·Σ dp: here p itself goes on, ds = p ⊙ (dp − Σ dp·p).",
    "passed_on": "dp is handed on unchanged: softmax is skipped in the backward.",
    "detached": "p is treated as a constant (detached): ds is 0.",
}


def _softmax(g: Given, m: Wrong) -> Outputs:
    ds = softmax_bwd(g.dp, g.p, m)
    return {"ds": m.pick(
        ds, batch_mean=ds / len(ds),
        first_query=np.where(np.arange(ds.shape[-2])[:, None] == 0, ds, 0),
    )}  # fmt: skip


def _places(g: Given, want: Outputs) -> dict[str, dict[str, Array]]:
    return {"ds": {"at masked positions, where it must be exactly 0": g.p == 0}}


SOFTMAX = of_op(
    "causal_softmax",
    title="softmax of each row over the keys it may see",
    outputs="ds",
    cases=_CASES,
    formula=_softmax,
    aliases=("softmax", "softmax_bwd", "causal_softmax"),
    numbers=_numbers,
    places=_places,
    hints=(
        "Every p_j of a row depends on every score of that row: raise one score, and the others lose.",
        "∂p_j/∂s_k = p_j·(δ_jk − p_k). Sum dp_j·∂p_j/∂s_k over j: two terms.",
    ),
    mistakes=OF_SOFTMAX | {
        "batch_mean": "ds is divided by the batch size.",
        "first_query": "only the first query has its gradient.",
    },
)  # fmt: skip
