"""Exercises: a linear layer, and one with LoRA."""

import numpy as np

from mesp_ref.learn.exercise import LARGE, ONE_TOKEN, SMALL, UNEVEN, Given, Outputs, Wrong, of_op
from mesp_ref.learn.exercises.common import only
from mesp_ref.ops import Array, rows
from mesp_ref.registry.cases import times, without_bias

_CASES = (
    ("small", "one sequence of two tokens, 3 inputs, 2 outputs", SMALL),
    ("uneven", "all lengths differ", UNEVEN),
    ("one token", "T = 1, two sequences", ONE_TOKEN),
    ("large", "inputs of thousands", LARGE, times(x=2000.0)),
    ("no bias", "b is None", UNEVEN._replace(n=2, t=3, c=4, f=6), without_bias),
)


def _numbers(g: Given) -> dict[str, float]:
    n, t, out = g.dy.shape
    found = {
        "the number of rows": n * t,
        "the batch size N": n,
        "the number of tokens T": t,
        "inputs": g.w.shape[1],
        "outputs": out,
    }
    return found | ({"s": g.s, "R": len(g.A), "R·s": g.s * len(g.A)} if "s" in g else {})


def _linear(g: Given, m: Wrong) -> Outputs:
    dy, b = g.dy, 0 if g.b is None else g.b
    dy = m.pick(
        dy, plus_bias=dy + b, first_sequence=only(dy, 0, 0), last_sequence=only(dy, 0, -1),
        first_token=only(dy, 1, 0), last_token=only(dy, 1, -1),
        summed_rows=dy.sum(axis=(0, 1)) + 0 * dy, summed_batch=dy.sum(axis=0) + 0 * dy,
    )  # fmt: skip
    w = m.pick(g.w, size_of_w=abs(g.w), forward_again=lambda: g.w.T)
    dx = dy @ w
    return {"dx": m.pick(dx, plus_x=dx + g.x, times_x=lambda: dx * g.x)}


LINEAR = of_op(
    "linear",
    title="the gradient that a linear layer hands to the layer below",
    outputs="dx",
    cases=_CASES,
    formula=_linear,
    aliases=("linear",),
    numbers=_numbers,
    hints=(
        "One row of y is W·x: which entries of y does x_i reach, and by which weights?",
        "dx_i = Σ_o dy_o·∂y_o/∂x_i: one matrix product, of dy with W and not with its transpose.",
    ),
    mistakes={
        "plus_bias": "the bias is added in the backward; it is a constant there and does not reach dx.",
        "first_sequence": "only the first sequence of the batch has its gradient.",
        "last_sequence": "only the last sequence of the batch has its gradient.",
        "first_token": "only the first token of each sequence has its gradient.",
        "last_token": "only the last token of each sequence has its gradient.",
        "summed_rows": "dy is summed over all rows before the product: each row has a dx of its own.",
        "summed_batch": "dy is summed over the batch before the product: each sequence has a dx of its own.",
        "size_of_w": "W stands there without its signs, |W|.",
        "forward_again": "dy goes through Wᵀ, as x does in the forward: the backward multiplies by W.",
        "plus_x": "the layer's input x is added to dx: there is no residual path here.",
        "times_x": "dx is multiplied by x: y is linear in x, so ∂y/∂x does not hold x any more.",
    },
)


def _params(g: Given, m: Wrong) -> Outputs:
    dy3, x3 = (
        m.pick((g.dy, g.x),
               last_token=(g.dy[:, -1:], g.x[:, -1:]), first_token=(g.dy[:, :1], g.x[:, :1]),
               first_sequence=(g.dy[:1], g.x[:1]), last_sequence=(g.dy[-1:], g.x[-1:]),
               first_row=(g.dy[:1, :1], g.x[:1, :1]), last_row=(g.dy[-1:, -1:], g.x[-1:, -1:])),
    )[0]  # fmt: skip
    dy, x, m_rows = rows(dy3), rows(x3), rows(g.dy).shape[0]
    dw = dy.T @ x
    dw = m.pick(
        dw, dw_mean=dw / m_rows, dw_mean_n=dw / len(g.dy), dw_mean_t=dw / g.dy.shape[1],
        dw_transposed=lambda: x.T @ dy, dw_plus_w=dw + g.w, dw_negated=-dw,
        dw_of_sums=lambda: dy.sum(axis=0)[:, None] * x.sum(axis=0),
        dw_of_means=lambda: dy.mean(axis=0)[:, None] * x.mean(axis=0), dw_sum_mean=lambda: dy.sum(axis=0)[:, None] * x.mean(axis=0),
        dw_batch=lambda: np.einsum("nto,nti->noi", g.dy, g.x), dw_plus_size=lambda: abs(dw), dw_ones=lambda: dy.sum(axis=0)[:, None] + 0 * dw,
    )  # fmt: skip
    if g.b is None:
        return {"dw": dw, "db": None}
    db = dy.sum(axis=0)
    db = m.pick(
        db, db_mean=db / m_rows, db_mean_n=db / len(g.dy), db_axis=lambda: dy.sum(axis=1),
        db_rows=lambda: g.dy, db_batch=lambda: g.dy.sum(axis=0), db_total=lambda: dy.sum(),
        db_zero=0 * db, db_one=0 * db + 1, db_negated=-db, db_plus_b=db + g.b,
        db_keepdims=lambda: db[None],
    )  # fmt: skip
    return {"dw": dw, "db": db}


LINEAR_PARAMS = of_op(
    "linear",
    params=True,
    title="the gradients of a linear layer's weight and bias",
    outputs="dw db",
    cases=_CASES,
    formula=_params,
    aliases=("linear_params",),
    numbers=_numbers,
    hints=(
        "Every row uses the same W and b: what does that mean for their gradients?",
        "dw_oi = Σ_rows dy_o·x_i, a product of two matrices over the rows; db is what is left where x is 1.",
    ),
    mistakes={
        "last_token": "only the last token of each sequence counts: every row uses W and b, so sum over all.",
        "first_token": "only the first token of each sequence counts: every row uses W and b, so sum over all.",
        "first_sequence": "only the first sequence of the batch counts: sum over all rows.",
        "last_sequence": "only the last sequence of the batch counts: sum over all rows.",
        "first_row": "only the first row counts: sum over all rows.",
        "last_row": "only the last row counts: sum over all rows.",
        "dw_mean": "dw is averaged over the rows; it is their sum (a mean, if any, is in the loss).",
        "dw_mean_n": "dw is divided by the batch size N; it is the sum over all rows.",
        "dw_mean_t": "dw is divided by the number of tokens T; it is the sum over all rows.",
        "dw_transposed": "dw is transposed: xᵀ·dy where dyᵀ·x belongs.",
        "dw_plus_w": "the weight itself is added to dw.",
        "dw_negated": "dw has the wrong sign.",
        "dw_of_sums": "dy and x are summed over the rows before they are multiplied: multiply row by row, then sum.",
        "dw_of_means": "dy and x are averaged over the rows before they are multiplied: multiply row by row, then sum.",
        "dw_sum_mean": "dy is summed and x averaged over the rows before they are multiplied: multiply row by row, then sum.",
        "dw_batch": "dw is not summed over the batch: one gradient for all sequences.",
        "dw_plus_size": "dw lost its signs: |dw|.",
        "dw_ones": "dw lacks the factor x.",
        "db_mean": "db is averaged over the rows; it is their sum.",
        "db_mean_n": "db is divided by the batch size N; it is the sum over all rows.",
        "db_axis": "db is summed over the wrong axis: over the outputs instead of the rows.",
        "db_rows": "db is not summed: b is added to every row, so its gradient is the sum of dy over all rows.",
        "db_batch": "db is summed over the batch but not over the tokens: sum over all leading axes.",
        "db_total": "db is summed over the outputs, too: one number for each output must stay.",
        "db_zero": "the bias gradient is missing: db is 0.",
        "db_one": "db is 1: ∂y/∂b is 1, and that times dy is summed over the rows.",
        "db_negated": "db has the wrong sign.",
        "db_plus_b": "the bias itself is added to db.",
        "db_keepdims": "db keeps an axis of length 1: it has the shape of b.",
    },
)


def _lora(g: Given, m: Wrong) -> Outputs:
    x, dy, w, A, B, s = rows(g.x), rows(g.dy), g.w, g.A, g.B, g.s
    count = len(x)
    h = x @ A.T
    dh = m.pick(
        dy @ B * s, dh_unscaled=dy @ B, dh_scaled_twice=dy @ B * s * s, dh_over_s=dy @ B / s,
        dh_alpha=dy @ B * s * len(A), dh_negated=-(dy @ B) * s,
    )  # fmt: skip
    base = m.pick(
        dy @ w, no_base=0 * x, base_scaled=dy @ w * s,
        base_twice=2 * (dy @ w), base_negated=-(dy @ w),
    )  # fmt: skip
    branch = m.pick(
        dh @ A, no_adapter=0 * x, adapter_unscaled=dh @ A / s, adapter_scaled_twice=dh @ A * s,
        adapter_negated=-(dh @ A), adapter_over_rank=dh @ A / len(A),
    )  # fmt: skip
    dA = dh.T @ x
    dA = m.pick(
        dA, dA_unscaled=dA / s, dA_scaled_twice=dA * s, dA_mean=dA / count, dA_transposed=lambda: dA.T,
        dA_of_h=lambda: h.T @ x, dA_from_dh_of_h=dh.T @ (h @ A), dA_negated=-dA, dA_zero=0 * dA,
        dA_through_A=lambda: (s * dy @ B @ A @ A.T).T @ x, dA_mean_n=dA / len(g.dy),
        dA_last_token=lambda: rows(dh.reshape(*g.dy.shape[:2], -1)[:, -1:]).T @ rows(g.x[:, -1:]),
    )  # fmt: skip
    dB = dy.T @ h * s
    dB = m.pick(
        dB, dB_unscaled=dB / s, dB_scaled_twice=dB * s, dB_mean=dB / count, dB_transposed=lambda: dB.T,
        dB_of_dh=lambda: dy.T @ dh, dB_negated=-dB, dB_zero=0 * dB, dB_mean_n=dB / len(g.dy),
        dB_of_hs=lambda: dy.T @ (h @ B.T @ B) * s,
        dB_last_token=lambda: rows(g.dy[:, -1:]).T @ (rows(g.x[:, -1:]) @ A.T) * s,
    )  # fmt: skip
    dx = (base + branch).reshape(g.x.shape)
    if "only_last_token" in m:
        dA, dB = (rows(dh.reshape(*g.dy.shape[:2], -1)[:, -1:]).T @ rows(g.x[:, -1:]),
                  rows(g.dy[:, -1:]).T @ (rows(g.x[:, -1:]) @ A.T) * s)  # fmt: skip
    if "only_first_sequence" in m:
        dA, dB = _first(g, s)
    if "no_scale_anywhere" in m:
        dx, dA, dB = (dy @ (w + B @ A)).reshape(g.x.shape), dA / s, dB / s
    return {"dx": dx, "dA": dA, "dB": dB}


def _first(g: Given, s: float) -> tuple[Array, Array]:
    x, dy = g.x[0], g.dy[0]
    return (s * dy @ g.B).T @ x, s * dy.T @ (x @ g.A.T)


LORA = of_op(
    "lora_linear",
    title="a frozen linear layer with its LoRA branch",
    outputs="dx dA dB",
    cases=_CASES,
    formula=_lora,
    aliases=("lora", "lora_linear"),
    numbers=_numbers,
    hints=(
        "x reaches y by two ways, W and the branch; A and B are reached through h = x·Aᵀ.",
        "Name the gradient of h first: dh. s stands in front of the whole branch, so it is in dh and in dB.",
    ),
    mistakes={
        "dh_unscaled": "the scale s is missing in dh = s·dy·B, and so in dA and in dx.",
        "dh_scaled_twice": "the scale s is applied twice in dh.",
        "dh_over_s": "dh is divided by the scale s instead of multiplied.",
        "dh_alpha": "dh is scaled by alpha = s·R instead of s = alpha/R.",
        "dh_negated": "dh has the wrong sign.",
        "no_base": "dx lacks dy·W: the frozen weight gets no gradient, yet it carries one to the layers below.",
        "base_scaled": "the scale s multiplies dy·W, too: it belongs to the LoRA branch alone.",
        "base_twice": "dy·W is counted twice in dx.",
        "base_negated": "dy·W has the wrong sign in dx.",
        "no_adapter": "dx lacks dh·A: the LoRA branch's (adapter's) way to x is missing.",
        "adapter_unscaled": "the scale s is missing in the LoRA branch of dx.",
        "adapter_scaled_twice": "the scale s is applied twice in the LoRA branch of dx.",
        "adapter_negated": "the LoRA branch of dx has the wrong sign: it is subtracted.",
        "adapter_over_rank": "the LoRA branch of dx is divided by the rank once more: s = alpha/R has that.",
        "dA_unscaled": "the scale s is missing in dA.",
        "dA_scaled_twice": "the scale s is applied twice in dA: dh has it already.",
        "dA_mean": "dA is averaged over the rows; it is their sum.",
        "dA_mean_n": "dA is divided by the batch size N; it is the sum over all rows.",
        "dA_transposed": "dA is transposed: A is [R, in].",
        "dA_of_h": "dA is formed with h where its gradient dh belongs.",
        "dA_from_dh_of_h": "dA is formed with h·A where x belongs.",
        "dA_negated": "dA has the wrong sign.",
        "dA_zero": "dA is 0.",
        "dA_through_A": "dA holds a factor A·Aᵀ too many: dh is the gradient of h, before A.",
        "dA_last_token": "dA is of the last token only; it is the sum over all rows.",
        "dB_unscaled": "the scale s is missing in dB.",
        "dB_scaled_twice": "the scale s is applied twice in dB.",
        "dB_mean": "dB is averaged over the rows; it is their sum.",
        "dB_mean_n": "dB is divided by the batch size N; it is the sum over all rows.",
        "dB_transposed": "dB is transposed: B is [out, R].",
        "dB_of_dh": "dB is formed with dh where h belongs.",
        "dB_negated": "dB has the wrong sign.",
        "dB_zero": "dB is 0.",
        "dB_of_hs": "dB is formed with h·Bᵀ·B where h belongs.",
        "dB_last_token": "dB is of the last token only; it is the sum over all rows.",
        "only_last_token": "dA and dB are of the last token only: not summed over the positions.",
        "only_first_sequence": "dA and dB are of the first sequence of the batch only.",
        "no_scale_anywhere": "the LoRA scale s is missing in the whole backward.",
    },
)
