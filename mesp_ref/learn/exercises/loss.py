"""Exercise: cross entropy over the vocabulary."""

import numpy as np

from mesp_ref.learn.exercise import ONE_TOKEN, SMALL, UNEVEN, Given, Outputs, Wrong, of_op
from mesp_ref.learn.exercises.common import softmax
from mesp_ref.ops import IGNORED, Array
from mesp_ref.registry.cases import at, every, put
from mesp_ref.registry.sizes import Args


def _around_1000(args: Args) -> Args:
    return args | {"logits": np.round(args["logits"] * 2) + 1000}


_CASES = (
    ("small", "two rows, five tokens, none ignored", SMALL, every("labels")),
    ("ignored", "every third label is −100", UNEVEN),
    ("one token", "T = 1, none ignored", ONE_TOKEN, every("labels")),
    ("large", "logits around 1000", UNEVEN._replace(n=2, t=4, v=7), _around_1000),
    ("label 0", "some labels are token 0, which counts", UNEVEN._replace(n=2, v=6), at("labels", slice(1, 6), 0)),
    ("all ignored", "every label is −100: the gradient is 0", UNEVEN._replace(n=1), put(labels=IGNORED)),
)  # fmt: skip


def _numbers(g: Given) -> dict[str, float]:
    count = max(1, int((g.labels != IGNORED).sum()))
    rows, v = g.logits.shape
    return {
        "the count": count, "the number of rows": rows, "V": v, "dloss": g.dloss, "the number of rows/count": rows / count,
        "size of logits": rows * v,
    }  # fmt: skip


def _labels(g: Given, m: Wrong) -> Array:
    labels = g.labels
    counted = np.flatnonzero(labels != IGNORED)
    moved, back, rolled = (labels.copy() for _ in range(3))
    moved[:-1], moved[-1:] = labels[1:], IGNORED
    back[counted], rolled[counted] = np.roll(labels[counted], 1), np.roll(labels[counted], -1)
    found: Array = m.pick(
        labels, shifted=moved, rolled_back=back, rolled=rolled,
        zero_ignored=np.where(labels == 0, IGNORED, labels), ignored_as_0=np.where(labels == IGNORED, 0, labels),
        ignored_as_last=np.where(labels == IGNORED, g.logits.shape[1] - 1, labels),
        ignored_wrap=np.where(labels == IGNORED, IGNORED % g.logits.shape[1], labels),
    )  # fmt: skip
    return found


def dlogits_of(g: Given, m: Wrong) -> Array:
    """The gradient of the logits, or what is taken for it; also within the exercise of the head."""
    z, labels = g.logits, _labels(g, m)
    counted = labels != IGNORED
    onehot = np.zeros_like(z)
    onehot[np.flatnonzero(counted), labels[counted]] = 1
    right = softmax(z)
    p = m.pick(
        right, over_rows=softmax(z, axis=0), logits_for_p=z, no_softmax=0 * z, log_p=np.log(right + 1e-300),
        not_normalised=np.exp(z - z.max(axis=1, keepdims=True)), sigmoid=1 / (1 + np.exp(-z)),
        no_maximum=np.exp(z) / np.exp(z).sum(axis=1, keepdims=True), over_everything=np.exp(z - z.max()) / np.exp(z - z.max()).sum(),
        one_minus_p=1 - right, p_squared=right * right, overflow=lambda: np.exp(z),
    )  # fmt: skip
    difference = m.pick(
        p - onehot, no_onehot=p, onehot_added=p + onehot, onehot_twice=p - 2 * onehot, negated=onehot - p,
        at_label_only=(p - onehot) * onehot, except_label=p * (1 - onehot), of_p=p * (p - onehot),
        label_minus_one=np.where(onehot > 0, -1, p), mse=2 * (p - onehot), softmax_again=p * ((p - onehot) - (p * (p - onehot)).sum(axis=1, keepdims=True)),
        nll_only=-onehot / np.maximum(p, 1e-300),
    )  # fmt: skip
    kept = m.pick(counted[:, None], ignored_kept=np.ones_like(z, bool))
    rows, count = len(labels), max(1, int(counted.sum()))
    scale = m.pick(
        1 / count, summed=1.0, over_all_rows=1 / rows, over_v=1 / z.shape[1], over_size=1 / z.size,
        over_count_v=1 / count / z.shape[1], over_root=count**-0.5, twice_divided=1 / count**2, times_count=float(count),
    )  # fmt: skip
    dloss = m.pick(g.dloss, no_dloss=1.0, over_dloss=1 / g.dloss, dloss_twice=g.dloss**2)
    dlogits = np.where(kept, dloss * difference * scale, 0)
    found: Array = m.pick(dlogits, dloss_added=np.where(kept, difference * scale, 0) + g.dloss)
    return found


def _loss(g: Given, m: Wrong) -> Outputs:
    return {"dlogits": dlogits_of(g, m)}


def _places(g: Given, want: Outputs) -> dict[str, dict[str, Array]]:
    ignored = np.repeat((g.labels == IGNORED)[:, None], g.logits.shape[1], axis=1)
    at_label = np.zeros_like(ignored)
    counted = np.flatnonzero(g.labels != IGNORED)
    at_label[counted, g.labels[counted]] = True
    return {"dlogits": {
        "in rows whose label is ignored (−100), where it must be exactly 0": ignored,
        "at the label of each row": at_label,
    }}  # fmt: skip


CROSS_ENTROPY = of_op(
    "cross_entropy",
    title="mean negative log-likelihood of the rows that count",
    outputs="dlogits",
    cases=_CASES,
    formula=_loss,
    aliases=("cross_entropy", "loss"),
    numbers=_numbers,
    places=_places,
    given="dloss is the gradient of the loss, a number; a label of −100 does not count.",
    hints=(
        "The loss of a row is log Σ exp(z) − z_label: derive each of the two by z_v.",
        "∂ log Σ exp(z)/∂z_v is a softmax; the other term is 1 at the label. Then the mean, and dloss.",
    ),
    mistakes={
        "shifted": "the labels are shifted by one row: they are shifted before they come here.",
        "rolled": "each row is held against the label of the next counted row (shifted).",
        "rolled_back": "each row is held against the label of the counted row before it (shifted).",
        "zero_ignored": "labels of token 0 are ignored as if they were padding: only −100 is.",
        "ignored_as_0": "ignored labels (−100) count, as token 0.",
        "ignored_as_last": "ignored labels (−100) count, as the last token.",
        "ignored_wrap": "ignored labels (−100) count: as an index −100 wraps round.",
        "over_rows": "softmax runs over the wrong axis: over the rows instead of the vocabulary.",
        "over_everything": "softmax runs over the whole array: each row has its own.",
        "logits_for_p": "the logits stand where their softmax belongs.",
        "no_softmax": "the softmax is missing: only the one-hot is there.",
        "log_p": "log softmax stands where softmax belongs.",
        "not_normalised": "exp is not divided by its sum: that is no softmax yet.",
        "overflow": "exp is not divided by its sum: that is no softmax yet, and it overflows.",
        "sigmoid": "the sigmoid of each logit stands where the softmax of the row belongs.",
        "no_maximum": "exp overflows: subtract each row's maximum before exp, softmax stays the same.",
        "one_minus_p": "1 − softmax stands where softmax belongs.",
        "p_squared": "softmax is squared.",
        "no_onehot": "the one-hot is missing: p − onehot, 1 is subtracted at the label.",
        "onehot_added": "the one-hot is added where it must be subtracted (sign).",
        "onehot_twice": "the one-hot is subtracted twice.",
        "negated": "the sign is wrong: onehot − p where p − onehot belongs.",
        "at_label_only": "only the label's entry has a gradient: every token of the vocabulary has one, p.",
        "except_label": "the label's entry is 0: it is p − 1 there.",
        "label_minus_one": "the label's entry is −1 where p − 1 belongs.",
        "of_p": "p − onehot is multiplied by p: log undoes the exp, p − onehot is already the whole.",
        "mse": "a factor 2 too many: this is no squared error.",
        "softmax_again": "p − onehot goes through softmax's backward once more: it is already the gradient of the logits.",
        "nll_only": "it is the gradient with respect to p, −onehot/p: softmax's backward is still to come.",
        "ignored_kept": "rows whose label is ignored (−100) have a gradient: theirs must be exactly 0.",
        "summed": "it is not divided by the count: the loss is a mean over the rows that count.",
        "over_all_rows": "it is divided by all rows instead of the counted ones (label ≠ −100).",
        "over_v": "it is divided by the size V of the vocabulary instead of the count.",
        "over_size": "it is divided by the number of all logits instead of the count.",
        "over_count_v": "it is divided by V, too: the mean is over rows, not over the vocabulary.",
        "over_root": "it is divided by √count instead of the count.",
        "twice_divided": "it is divided by the count twice.",
        "times_count": "it is multiplied by the count where it must be divided.",
        "no_dloss": "dloss, the cotangent, is forgotten.",
        "over_dloss": "it is divided by dloss where it must be multiplied.",
        "dloss_twice": "dloss is applied twice.",
        "dloss_added": "dloss is added where it must be multiplied.",
    },
)
