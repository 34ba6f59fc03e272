"""Exercise: the head and the loss together."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.learn.exercise import Case, Exercise, Given, Outputs, Wrong, named_outputs
from mesp_ref.learn.exercises.loss import CROSS_ENTROPY, dlogits_of
from mesp_ref.ops import IGNORED, Array


def head_bwd(n: Array, w: Array, labels: Array) -> tuple[Any, Array]:
    """The loss of the last hidden states, and its gradient.

    Forward   z = n·wᵀ, row by row;  loss = mean over the rows with label ≠ −100 of log Σ exp(z) − z[label]
    Backward  dn = (softmax(z) − onehot)·w/count, 0 in rows that do not count
    Shapes    n [N, T, C], w [V, C], labels [N, T], already shifted -> loss a number, dn [N, T, C]
    """
    z, _ = ops.linear(n, w)
    loss, res = ops.cross_entropy(ops.rows(z), labels.reshape(-1))
    dz = ops.cross_entropy_bwd(1.0, res).reshape(z.shape)
    return loss, ops.linear_bwd(dz, ops.LinearRes(n), w)


def _loss_of(z: Array, labels: Array, m: Wrong) -> Array:
    counted = np.flatnonzero(labels != IGNORED)
    top = z.max(axis=1)
    log_sum = np.log(np.exp(z - top[:, None]).sum(axis=1)) + top
    total = m.pick(
        (log_sum[counted] - z[counted, labels[counted]]).sum(), loss_sign=-(log_sum[counted] - z[counted, labels[counted]]).sum(),
        log_sum_alone=log_sum[counted].sum(), label_alone=-z[counted, labels[counted]].sum(),
    )  # fmt: skip
    count = len(counted)
    found: Array = total / m.pick(count, loss_summed=1, loss_over_rows=len(labels), loss_over_v=count * z.shape[1], loss_over_root=count**0.5)  # fmt: skip
    return found


def _head(g: Given, m: Wrong) -> Outputs:
    rows, labels = g.n.reshape(-1, g.n.shape[-1]), g.labels.reshape(-1)
    z = rows @ g.w.T
    dz = dlogits_of(Given(logits=z, labels=labels, dloss=1.0), m)
    dn = dz @ g.w
    dn = m.pick(dn.reshape(g.n.shape), flat=lambda: dn, of_logits=lambda: dz.reshape(*g.n.shape[:2], -1), times_n=dn.reshape(g.n.shape) * g.n)  # fmt: skip
    loss = _loss_of(z, labels, m)
    return m.pick(
        {"loss": loss, "dn": dn},
        exchanged={"loss": dn, "dn": loss},
        dn_zero={"loss": loss, "dn": 0 * g.n},
    )


def _case(
    name: str,
    note: str,
    n: int,
    t: int,
    c: int,
    v: int,
    ignored: tuple[int, ...],
    around: float = 0.0,
) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        labels = rng.integers(0, v, (n, t))
        labels.reshape(-1)[list(ignored)] = IGNORED
        hidden, w = rng.standard_normal((n, t, c)), rng.standard_normal((v, c))
        if around:
            hidden[..., 0], w[:, 0] = around, 1.0
        return {"n": hidden, "w": w, "labels": labels}

    return Case(name, note, draw)


HEAD = Exercise(
    name="head_bwd",
    title="head and loss together, down to the last norm",
    function=head_bwd,
    about=(head_bwd,),
    named=named_outputs(("loss", "dn")),
    cases=(
        _case("small", "two rows, five tokens, none ignored", 1, 2, 3, 5, ()),
        _case("ignored", "three of ten labels are −100", 2, 5, 6, 9, (1, 4, 8)),
        _case("large", "scores around 1000", 2, 3, 4, 7, (0,), 1000.0),
    ),
    formula=_head,
    numbers=lambda g: {"V": len(g.w), "the count": int((g.labels != IGNORED).sum()), "the number of rows": g.labels.size},
    aliases=("head",),
    given="A label of −100 does not count. No loop over tokens is needed, and no Jacobian.",
    hints=(
        "Rows [N·T, C] first; keep those that count. dz = (p − onehot)/count, then a linear layer's dx.",
        "Subtract each row's maximum before exp. dn = dz·w, and 0 where the label is −100.",
    ),
    mistakes={key: text for key, text in CROSS_ENTROPY.mistakes.items() if "dloss" not in key}
    | {
        "loss_sign": "the loss has the wrong sign.",
        "log_sum_alone": "z[label] is missing in the loss.",
        "label_alone": "log Σ exp(z) is missing in the loss.",
        "loss_summed": "the loss is a sum: it is the mean over the rows that count.",
        "loss_over_rows": "the loss is divided by all rows instead of the counted ones.",
        "loss_over_v": "the loss is divided by V as well: it is a mean over rows.",
        "loss_over_root": "the loss is divided by √count instead of the count.",
        "flat": "dn has a row for each token in one matrix: its values are right, expected the shape [N, T, C] of n.",
        "of_logits": "this is the gradient of the logits: it goes through w once more, dn = dz·w.",
        "times_n": "dn is multiplied by n: the slope of n·wᵀ is w.",
        "exchanged": "loss and dn are exchanged: return loss, dn in this order.",
        "dn_zero": "dn is 0.",
    },
)  # fmt: skip
