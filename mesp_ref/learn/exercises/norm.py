"""Exercises: RMSNorm and its weight."""

import numpy as np

from mesp_ref.learn.exercise import LARGE, ONE_TOKEN, SMALL, UNEVEN, Given, Outputs, Wrong, of_op
from mesp_ref.ops import Array, rows
from mesp_ref.registry.cases import times

_CASES = (
    ("small", "two rows of three", SMALL),
    ("uneven", "all lengths differ", UNEVEN),
    ("one token", "T = 1, two sequences", ONE_TOKEN),
    ("large", "entries of thousands", LARGE, times(x=2000.0)),
    ("tiny", "entries of 1/20: eps counts", UNEVEN._replace(n=2, t=3, c=4), times(x=0.05)),
)


def _numbers(g: Given) -> dict[str, float]:
    n, t, c = g.dy.shape
    return {"C": c, "the number of rows": n * t, "the batch size N": n, "the number of tokens T": t}


def _n(g: Given, m: Wrong) -> Array:
    """The root mean square, or what is taken for it."""
    square = g.x * g.x
    mean = m.pick(
        square.mean(axis=-1, keepdims=True),
        sum_in_n=square.sum(axis=-1, keepdims=True), n_over_tokens=square.mean(axis=-2, keepdims=True),
        n_over_all=square.mean(), absolute=np.abs(g.x).mean(axis=-1, keepdims=True) ** 2,
        variance=g.x.var(axis=-1, keepdims=True), n_flat=lambda: square.mean(axis=-1),
        n_over_batch=square.mean(axis=0, keepdims=True),
    )  # fmt: skip
    n: Array = m.pick(
        np.sqrt(mean + g.eps), eps_outside=np.sqrt(mean) + g.eps, no_eps=np.sqrt(mean),
        no_root=mean + g.eps,
    )  # fmt: skip
    return n


_OF_N = {
    "sum_in_n": "n holds the sum of the squares where their mean belongs.",
    "n_over_tokens": "n is taken over the wrong axis, the tokens: each row has an n of its own.",
    "n_over_all": "n is one number for the whole array: each row has an n of its own.",
    "n_flat": "keepdims=True is missing in n: its axis of length 1 is lost, so it meets the wrong axis of x.",
    "n_over_batch": "n is taken over the wrong axis, the batch: each row has an n of its own.",
    "absolute": "n is the mean of |x| where the root of the mean square belongs.",
    "variance": "n is the standard deviation: RMSNorm does not subtract the mean.",
    "eps_outside": "eps is outside the root: n = √(mean x²) + eps where √(mean x² + eps) belongs.",
    "no_eps": "eps is missing in n.",
    "no_root": "n lacks its square root: mean(x²) + eps is n², and n belongs there.",
}


def _norm(g: Given, m: Wrong) -> Outputs:
    x, dy, w, n = g.x, g.dy, g.w, _n(g, m)
    if "layer_norm" in m:
        return _layer_norm(g)
    u = m.pick(dy * w, no_weight=dy, weight_twice=dy * w * w, weight_divides=dy / w,
               u_centred=dy * w - (dy * w).mean(axis=-1, keepdims=True), one_plus_w=dy * (1 + w))  # fmt: skip
    product = m.pick(u * x, dot_without_w=dy * x, dot_without_x=u, dot_of_x=x * x)
    dot = m.pick(
        product.mean(axis=-1, keepdims=True), dot_sum=product.sum(axis=-1, keepdims=True),
        dot_over_tokens=product.mean(axis=-2, keepdims=True), dot_over_all=product.mean(),
        dot_elementwise=product, dot_flat=lambda: product.mean(axis=-1),
        dot_over_c2=product.mean(axis=-1, keepdims=True) / x.shape[-1], dot_over_batch=product.mean(axis=0, keepdims=True),
    )  # fmt: skip
    power = m.pick(n**3, power_1=n, power_2=n**2, power_4=n**4, power_0=1)
    first = m.pick(u / n, first_undivided=u, first_times_n=u * n, no_first=0 * u, first_n2=u / n**2)
    along = m.pick(
        x, along_ones=1, along_wx=w * x, along_u=u, cross_doubled=2 * x, cross_halved=x / 2
    )
    second = along * dot / power
    dx = m.pick(
        first - second, cross_missing=first, cross_added=first + second, cross_undivided=u - second * n, weighted_again=(first - second) * w,
    )  # fmt: skip
    return {"dx": m.pick(dx, passed_on=dy)}


def _layer_norm(g: Given) -> Outputs:
    """Centred x in every place, and nothing taken from the gradient."""
    x = g.x - g.x.mean(axis=-1, keepdims=True)
    n, u = np.sqrt((x * x).mean(axis=-1, keepdims=True) + g.eps), g.dy * g.w
    return {"dx": u / n - x * (u * x).mean(axis=-1, keepdims=True) / n**3}


NORM = of_op(
    "rmsnorm",
    title="root-mean-square normalisation",
    outputs="dx",
    cases=_CASES,
    formula=_norm,
    aliases=("rmsnorm", "norm"),
    numbers=_numbers,
    hints=(
        "Each x_c reaches the loss in two ways: through y_c, and through n, which all y share.",
        "∂n/∂x_c = x_c/(C·n). With u = dy ⊙ w, what is Σ_j u_j·x_j·∂(1/n)/∂x_c?",
    ),
    mistakes=_OF_N | {
        "no_weight": "the weight w is missing: u = dy where dy ⊙ w belongs.",
        "weight_twice": "the weight w is applied twice: u = dy ⊙ w ⊙ w.",
        "weight_divides": "dy is divided by w where it must be multiplied.",
        "u_centred": "the mean of u is subtracted, as in LayerNorm: RMSNorm does not subtract a mean.",
        "one_plus_w": "the weight is 1 + w: this norm multiplies by w.",
        "layer_norm": "the mean of x is subtracted, as in LayerNorm: RMSNorm does not subtract it.",
        "dot_flat": "keepdims=True is missing in the cross term's mean: it meets the wrong axis of x.",
        "dot_over_c2": "the cross term is divided by C twice: the mean has it already.",
        "dot_over_batch": "the cross term's mean runs over the wrong axis, the batch instead of the channels.",
        "dot_without_w": "the cross term is formed with dy where u = dy ⊙ w belongs.",
        "dot_without_x": "the cross term's mean lacks x: it is mean(u) where mean(u ⊙ x) belongs.",
        "dot_of_x": "the cross term holds mean(x²) where mean(u ⊙ x) belongs.",
        "dot_sum": "the cross term has a sum over the channels where the mean belongs: 1/C is missing.",
        "dot_over_tokens": "the cross term's mean runs over the wrong axis, the tokens instead of the channels.",
        "dot_over_all": "the cross term's mean runs over the whole array: each row has a mean of its own.",
        "dot_elementwise": "the cross term has no mean: it is u ⊙ x entry by entry, not mean(u ⊙ x).",
        "power_0": "the cross term is not divided by n³.",
        "power_1": "the power of n in the cross term is wrong: n where n³ belongs.",
        "power_2": "the power of n in the cross term is wrong: n² where n³ belongs.",
        "power_4": "the power of n in the cross term is wrong: n⁴ where n³ belongs.",
        "first_undivided": "the first term lacks 1/n: it is u where u/n belongs.",
        "first_times_n": "the first term is multiplied by n where it must be divided.",
        "no_first": "the first term u/n is missing: only the cross term is there.",
        "first_n2": "the first term is divided by n²: it is u/n.",
        "along_ones": "the cross term lacks the factor x in front of the mean.",
        "along_wx": "the cross term has a factor w too many: x·mean(u ⊙ x), not w ⊙ x·mean(u ⊙ x).",
        "along_u": "the cross term stands along u where x belongs.",
        "cross_doubled": "the cross term is counted twice.",
        "cross_halved": "the cross term is only half of what it must be.",
        "cross_missing": "the cross term is missing: every dx is too large along x.",
        "cross_added": "the cross term has the wrong sign: it is added where it must be subtracted.",
        "weighted_again": "the weight w is applied to the whole once more: it is in u already.",
        "cross_undivided": "one factor 1/n is missing in both terms: the whole must be divided by n.",
        "passed_on": "dy is handed on unchanged: RMSNorm is skipped in the backward.",
    },
)  # fmt: skip


def _params(g: Given, m: Wrong) -> Outputs:
    x, dy, n = g.x, g.dy, _n(g, m)
    y = m.pick(x / n, undivided=x, times_n=x * n, n_alone=1 / n, no_x=0 * x + 1,
               weighted=g.w * x / n)  # fmt: skip
    dw = dy * y
    summed = rows(dw).sum(axis=0)
    return {"dw": m.pick(
        summed, mean=summed / len(rows(dw)), mean_n=summed / len(dw), mean_t=summed / dw.shape[1],
        rows_kept=lambda: dw, batch_summed=lambda: dw.sum(axis=0), tokens_summed=lambda: dw.sum(axis=1),
        first_sequence=dw[0].sum(axis=0), last_sequence=dw[-1].sum(axis=0),
        first_token=dw[:, 0].sum(axis=0), last_token=dw[:, -1].sum(axis=0),
        channels=lambda: dw.sum(axis=-1), one_number=lambda: dw.sum(), negated=-summed,
        apart=rows(dy).sum(axis=0) * rows(x / n).sum(axis=0), plus_w=summed + g.w,
    )}  # fmt: skip


NORM_PARAMS = of_op(
    "rmsnorm",
    params=True,
    title="the gradient of RMSNorm's weight",
    outputs="dw",
    cases=_CASES,
    formula=_params,
    aliases=("rmsnorm_params",),
    numbers=_numbers,
    hints=(
        "w_c reaches the loss through y_c of every row, and through nothing else.",
        "∂y_c/∂w_c = x_c/n: multiply by dy_c and sum over all rows.",
    ),
    mistakes=_OF_N | {
        "undivided": "1/n is missing: dw = Σ dy ⊙ x/n.",
        "times_n": "x is multiplied by n where it must be divided.",
        "n_alone": "the factor x is missing: dw = Σ dy ⊙ x/n.",
        "no_x": "x/n, the normalised input, is missing: dw = Σ dy ⊙ x/n, not Σ dy.",
        "weighted": "the weight w is a factor too many: ∂y/∂w is x/n.",
        "mean": "dw is averaged over the rows; it is their sum, for all rows share w.",
        "mean_n": "dw is divided by the batch size N; it is the sum over all rows.",
        "mean_t": "dw is divided by the number of tokens T; it is the sum over all rows.",
        "rows_kept": "dw is not summed over the rows: it has the shape of w.",
        "batch_summed": "dw is summed over the batch but not over the tokens: sum over all leading axes.",
        "tokens_summed": "dw is summed over the tokens but not over the batch: sum over all leading axes.",
        "first_sequence": "only the first sequence of the batch counts: sum over all rows.",
        "last_sequence": "only the last sequence of the batch counts: sum over all rows.",
        "first_token": "only the first token of each sequence counts: sum over all rows.",
        "last_token": "only the last token of each sequence counts: sum over all rows.",
        "channels": "dw is summed over the channels, the wrong axis: sum over the rows.",
        "one_number": "dw is summed over everything: one number for each channel must stay.",
        "negated": "dw has the wrong sign.",
        "apart": "dy and x/n are summed before they are multiplied: multiply row by row, then sum.",
        "plus_w": "the weight itself is added to dw.",
    },
)  # fmt: skip
