"""Mistakes of the cross entropy."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.golden.mistakes.variant import padded, variant
from mesp_ref.golden.plain import Plain
from mesp_ref.ops import IGNORED, Array


class SumOverTokens(Plain):
    """the loss is a sum over tokens instead of their mean"""

    def count(self, targets: Array) -> int:
        return 1


class MeanOverAll(Plain):
    """the loss is divided by all positions instead of those with a label: ignored ones count"""

    def count(self, targets: Array) -> int:
        return int(targets.size)


class IgnoresTokenZero(Plain):
    """labels of token id 0 are ignored as if they were padding"""

    def labels(self, targets: Array) -> Array:
        return np.where(targets == 0, IGNORED, targets)


class UnshiftedLabels(Plain):
    """labels are not shifted: each position predicts itself"""

    def targets(self, labels: Array) -> Array:
        return labels


class CountsIgnored(Plain):
    """labels of −100 count, as token 0"""

    def labels(self, targets: Array) -> Array:
        return np.where(targets == IGNORED, 0, targets)


class CountsIgnoredShifted(CountsIgnored):
    """labels of −100 count, as token 0, but for the last position of a sequence"""

    def targets(self, labels: Array) -> Array:
        return super().targets(np.where(labels == IGNORED, 0, labels))

    def labels(self, targets: Array) -> Array:
        return targets


def numbers(targets: Array) -> dict[str, int]:
    """What the mean might be divided by, by name."""
    n, t = targets.shape
    labels = max(1, int((targets != IGNORED).sum()))
    found = {
        "N, the number of sequences,": n,
        "T, the number of tokens,": t,
        "all positions but the last of each sequence": n * (t - 1),
        "all positions of every sequence": n * t,
        "1": 1,
        "one label more": labels + 1,
        "one label fewer": labels - 1,
        "the ignored positions": n * t - labels,
        "the number of labels squared": labels * labels,
        "twice the number of labels": 2 * labels,
    }
    found |= {f"a padded number of labels, {c},": c for c in padded(labels)}
    found |= {f"a padded number of positions, {c},": c for c in padded(n * t)}
    return {name: count for name, count in found.items() if count > 0 and count != labels}


def divided(name: str, where: str) -> type[Plain]:
    """The loss and its gradient, or one of them, divided by another number."""

    def shares(self: Plain, targets: Array) -> Array:
        return np.full(targets.shape, 1 / numbers(targets).get(name, self.count(targets)))

    def only(self: Plain, logits: Array, targets: Array) -> tuple[Array, Array]:
        loss, gradient = Plain.cross_entropy(self, logits, targets)
        factor = self.count(targets) / numbers(targets).get(name, self.count(targets))
        return (loss * factor, gradient) if where == "loss" else (loss, gradient * factor)

    if name == "1":
        sentence = "the loss's gradient is that of a sum over labels: not divided by their number"
        return variant(sentence, cross_entropy=only)
    subject = {
        "": "the loss",
        "loss": "the loss, not its gradient,",
        "gradient": "the loss's gradient",
    }
    sentence = f"{subject[where]} is divided by {name} instead of the number of labels that count"
    return variant(sentence, **({"cross_entropy": only} if where else {"shares": shares}))


def counts(n: int, t: int, labels: int) -> list[type[Plain]]:
    """Wrong divisors of a loss over [N, T] positions."""
    targets = np.full((n, t), IGNORED)
    targets.reshape(-1)[:labels] = 0
    return [
        divided(name, where)
        for name in numbers(targets)
        for where in ("", "loss", "gradient")
        if name != "1" or where == "gradient"
    ]


def vocabulary(self: Plain, logits: Array, targets: Array) -> tuple[Array, Array]:
    loss, gradient = Plain.cross_entropy(self, logits, targets)
    factor = self.count(targets) / logits.shape[-1]
    return loss * factor, gradient * factor


class MeanOfMeans(Plain):
    """the loss is a mean of means: over each sequence first, then over sequences"""

    def shares(self, targets: Array) -> Array:
        each = np.maximum(1, (targets != IGNORED).sum(axis=-1, keepdims=True))
        return np.broadcast_to(1 / each / len(targets), targets.shape)


class MeanOfMeansOfLabelled(Plain):
    """the loss is a mean of means: over each sequence that has labels, then over those"""

    def shares(self, targets: Array) -> Array:
        each = (targets != IGNORED).sum(axis=-1, keepdims=True)
        rows = max(1, int((each > 0).sum()))
        return np.broadcast_to(1 / np.maximum(1, each) / rows, targets.shape)


def rows(
    sentence: str, gradient: Callable[..., Array] | None, loss: Callable[..., Array] | None = None
) -> type[Plain]:
    """gradient(p, lse, onehot), loss(logits, lse, onehot) of a row."""
    steps: dict[str, Any] = {}
    if gradient:
        steps["row_gradient"] = lambda self, p, lse, onehot: gradient(p, lse, onehot)
    if loss:
        steps["losses"] = lambda self, z, lse, onehot: loss(z, lse, onehot)
    return variant(sentence, **steps)


def right_loss(z: Array, lse: Array, onehot: Array) -> Array:
    found: Array = lse[..., 0] - (z * onehot).sum(axis=-1)
    return found


def smoothing(e: float) -> list[type[Plain]]:
    def gradient(p: Array, lse: Array, hot: Array) -> Array:
        return p - (1 - e) * hot - e / p.shape[-1]

    def loss(z: Array, lse: Array, hot: Array) -> Array:
        found: Array = lse[..., 0] - (z * ((1 - e) * hot + e / z.shape[-1])).sum(axis=-1)
        return found

    text = f"the loss has label smoothing of {e:g}"
    return [
        rows(text, gradient, loss),
        rows(f"{text} in its gradient", gradient),
        rows(f"{text} in its value", None, loss),
    ]


def z_loss(c: float) -> list[type[Plain]]:
    def gradient(p: Array, lse: Array, hot: Array) -> Array:
        return p - hot + 2 * c * lse * p

    def loss(z: Array, lse: Array, hot: Array) -> Array:
        return right_loss(z, lse, hot) + c * lse[..., 0] ** 2

    text = f"the loss has a z-loss, {c:g}·lse²,"
    return [
        rows(text, gradient, loss),
        rows(f"{text} in its gradient", gradient),
        rows(f"{text} in its value", None, loss),
    ]


ROWS = (
    rows(
        "the gradient of the loss lacks − onehot: the labels' term is missing",
        lambda p, lse, hot: p,
    ),
    rows("the gradient of the loss lacks the softmax: − onehot alone", lambda p, lse, hot: -hot),
    rows(
        "the gradient of the loss has its sign turned: onehot − softmax",
        lambda p, lse, hot: hot - p,
    ),
    rows(
        "the gradient of the loss adds onehot instead of subtracting it: a wrong sign",
        lambda p, lse, hot: p + hot,
    ),
    rows(
        "the gradient of the loss is that of p: p·(onehot − p) of the label",
        lambda p, lse, hot: -(p * hot).sum(-1, keepdims=True) * (hot - p),
    ),
    rows(
        "the gradient of the loss is p·(1 − p), element by element", lambda p, lse, hot: p * (1 - p)
    ),
    rows(
        "the loss is in base 2: log₂ instead of the natural log, its gradient is not",
        None,
        lambda z, lse, hot: right_loss(z, lse, hot) / np.log(2),
    ),
    rows(
        "the loss is in base 2: log₂ instead of the natural log",
        lambda p, lse, hot: (p - hot) / np.log(2),
        lambda z, lse, hot: right_loss(z, lse, hot) / np.log(2),
    ),
    rows(
        "the loss lacks the log-sum of its normaliser: − z_label alone",
        None,
        lambda z, lse, hot: -(z * hot).sum(-1),
    ),
    rows(
        "the loss is − p_label instead of − log p_label",
        None,
        lambda z, lse, hot: -np.exp(-right_loss(z, lse, hot)),
    ),
    *(mistake for e in (0.01, 0.05, 0.1, 0.2) for mistake in smoothing(e)),
    *(mistake for c in (1e-5, 1e-4, 1e-3, 1e-2, 0.1) for mistake in z_loss(c)),
)


def relabelled(sentence: str, change: Callable[[Array], Array]) -> type[Plain]:
    return variant(sentence, labels=lambda self, targets: change(targets))


def up(targets: Array, by: int, size: int) -> Array:
    return np.where(targets == IGNORED, IGNORED, (targets + by) % size)


def cyclic(by: int) -> type[Plain]:
    def cross_entropy(self: Plain, logits: Array, targets: Array) -> tuple[Array, Array]:
        return Plain.cross_entropy(self, logits, up(targets, by, logits.shape[-1]))

    size, sign = ("large", "+") if by > 0 else ("small", "−")
    sentence = f"labels are one too {size}: each row's token id {sign} 1"
    return variant(sentence, cross_entropy=cross_entropy)


def moved(targets: Array, by: int) -> Array:
    """Labels of a later (or earlier) position."""
    found = np.full_like(targets, IGNORED)
    if by > 0:
        found[:, :-by] = targets[:, by:]
    else:
        found[:, -by:] = targets[:, :by]
    return found


def flat_moved(targets: Array, by: int) -> Array:
    return moved(targets.reshape(1, -1), by).reshape(targets.shape)


def padded_vocabulary(extra: int, words: str) -> list[type[Plain]]:
    """Logits of 0 behind the last, counted in the softmax."""

    def cross_entropy(self: Plain, logits: Array, targets: Array) -> tuple[Array, Array]:
        fill = np.zeros((*logits.shape[:-1], extra), logits.dtype)
        loss, gradient = Plain.cross_entropy(self, np.concatenate([logits, fill], axis=-1), targets)
        return loss, gradient[..., : logits.shape[-1]]

    def forward(self: Plain, logits: Array, targets: Array) -> tuple[Array, Array]:
        right = Plain.cross_entropy(self, logits, targets)
        return cross_entropy(self, logits, targets)[0], right[1]

    text = f"the vocabulary is padded with logits of 0 that the softmax counts ({words})"
    return [
        variant(text, cross_entropy=cross_entropy),
        variant(f"{text}, in the loss only", cross_entropy=forward),
    ]


def paddings(size: int) -> list[type[Plain]]:
    """Padded vocabularies of this one, and up to 16 entries more."""
    extras = sorted({n - size for n in padded(size)} | set(range(1, 17)))
    return [m for e in extras for m in padded_vocabulary(e, f"{e} more than {size}")]


class IgnoredRowsKeepSoftmax(Plain):
    """ignored rows keep a gradient: their softmax"""

    def cross_entropy(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        loss, gradient = super().cross_entropy(logits, targets)
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p = e / e.sum(axis=-1, keepdims=True)
        gone = (targets == IGNORED)[..., None]
        return loss, np.where(gone, p * self.shares(targets)[..., None], gradient)


class IgnoredRowsKeepGradient(Plain):
    """ignored rows keep a gradient, as if their label were token 0"""

    def kept(self, counted: Array) -> Array:
        return np.ones_like(counted)


class IgnoredRowsOfAll(IgnoredRowsKeepSoftmax):
    """ignored rows keep their softmax as gradient, and the mean is over all positions"""

    def count(self, targets: Array) -> int:
        return int(targets.size)


def cotangent(sentence: str, change: Callable[[Array, Array], Array]) -> type[Plain]:
    return variant(sentence, scaled_loss=lambda self, dloss, dlogits: change(dloss, dlogits))


KNOWN: tuple[type[Plain], ...] = (
    SumOverTokens,
    MeanOverAll,
    IgnoresTokenZero,
    CountsIgnored,
    MeanOfMeans,
    MeanOfMeansOfLabelled,
    IgnoredRowsKeepSoftmax,
    IgnoredRowsKeepGradient,
    IgnoredRowsOfAll,
    *ROWS,
    variant(
        "the loss is divided by V, the vocabulary, instead of the number of labels",
        cross_entropy=vocabulary,
    ),
    cotangent("the cotangent of the loss, dloss, is left out of the gradient", lambda d, g: g),
    cotangent("the cotangent of the loss, dloss, is applied twice", lambda d, g: d * d * g),
    cyclic(1),
    cyclic(-1),
    relabelled(
        "labels of the last position of each sequence are ignored",
        lambda t: np.where(np.arange(t.shape[1]) == t.shape[1] - 1, IGNORED, t),
    ),
    relabelled(
        "labels of the first position of each sequence are ignored",
        lambda t: np.where(np.arange(t.shape[1]) == 0, IGNORED, t),
    ),
    relabelled(
        "labels of the last sequence are ignored",
        lambda t: np.where(np.arange(len(t))[:, None] == len(t) - 1, IGNORED, t),
    ),
)
# What depends on whether labels are shifted inside (models) or not (ops).
SHIFTED: tuple[type[Plain], ...] = (
    UnshiftedLabels,
    CountsIgnoredShifted,
    relabelled(
        "labels are shifted twice: each position predicts the token after the next",
        lambda t: moved(t, 1),
    ),
    relabelled(
        "labels are shifted twice: each position predicts the token after the next, across sequences",
        lambda t: flat_moved(t, 1),
    ),
    variant(
        "labels are shifted the other way: each position predicts the one before",
        targets=lambda self, labels: moved(labels, -1),
    ),
)
NOT_SHIFTED: tuple[type[Plain], ...] = (
    relabelled("labels are shifted once more inside the loss", lambda t: moved(t, 1)),
    relabelled(
        "labels are shifted once more inside the loss, across sequences", lambda t: flat_moved(t, 1)
    ),
    relabelled("labels are shifted the other way inside the loss", lambda t: flat_moved(t, -1)),
)
