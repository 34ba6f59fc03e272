"""Mistakes of RMSNorm."""

from collections.abc import Callable

import numpy as np

from mesp_ref.golden.mistakes.variant import padded, variant
from mesp_ref.golden.plain import Plain, flat
from mesp_ref.ops import Array

Terms = Callable[[Plain, Array, Array, Array, Array], Array]


def mean(x: Array) -> Array:
    found: Array = x.mean(axis=-1, keepdims=True)
    return found


def root(x: Array) -> Array:
    """√mean(x²)"""
    return np.sqrt(mean(x * x))


class NormScaleOnly(Plain):
    """RMSNorm backward without the term along x: dx = dy ⊙ w / n"""

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        return dy * w * self.inverse_rms(x)


class NormWithoutWeight(Plain):
    """RMSNorm backward without the norm's weight"""

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        return super().norm_bwd(dy, x, np.ones_like(w))


class NormSumForMean(Plain):
    """RMSNorm backward with a sum over channels where the mean belongs"""

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        r, u = self.inverse_rms(x), dy * w
        return u * r - x * (u * x).sum(axis=-1, keepdims=True) * r**3


class NormPassedThrough(Plain):
    """RMSNorm skipped in the backward: dx = dy"""

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        return dy


class EpsOutside(Plain):
    """RMSNorm with eps outside the root: n = sqrt(mean(x²)) + eps"""

    def inverse_rms(self, x: Array) -> Array:
        return 1 / (root(x) + self.set.eps)


class LayerNorm(Plain):
    """LayerNorm instead of RMSNorm: the mean is subtracted"""

    def inverse_rms(self, x: Array) -> Array:
        z = x - mean(x)
        return 1 / np.sqrt(mean(z * z) + self.set.eps)

    def norm(self, x: Array, w: Array) -> Array:
        return (x - mean(x)) * self.inverse_rms(x) * w

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        r, u, z = self.inverse_rms(x), dy * w, x - mean(x)
        return (u - mean(u)) * r - z * mean(u * z) * r**3

    def norm_params(self, dy: Array, x: Array, w: Array) -> Array:
        return flat(dy * (x - mean(x)) * self.inverse_rms(x)).sum(axis=0)


class OnePlusWeight(Plain):
    """RMSNorm with the gain 1 + w instead of w (Gemma's convention)"""

    def norm(self, x: Array, w: Array) -> Array:
        return super().norm(x, 1 + w)

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        return super().norm_bwd(dy, x, 1 + w)


class NoGain(Plain):
    """RMSNorm without its weight, forward and backward"""

    def norm(self, x: Array, w: Array) -> Array:
        return super().norm(x, np.ones_like(w))

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        return super().norm_bwd(dy, x, np.ones_like(w))


class NoGainAtAll(NoGain):
    """RMSNorm without its weight, forward and backward: dw is 0"""

    def norm_params(self, dy: Array, x: Array, w: Array) -> Array:
        return 0 * w


class NoGainForward(Plain):
    """RMSNorm's forward without its weight"""

    def norm(self, x: Array, w: Array) -> Array:
        return super().norm(x, np.ones_like(w))


def backward(sentence: str, dx: Terms) -> type[Plain]:
    """dx(plain, u = dy⊙w, x, r = 1/n, dy) in place of the right one."""

    def norm_bwd(self: Plain, dy: Array, x: Array, w: Array) -> Array:
        return dx(self, dy * w, x, self.inverse_rms(x), dy)

    return variant(f"RMSNorm backward {sentence}", norm_bwd=norm_bwd)


def right(u: Array, x: Array, r: Array) -> Array:
    return u * r - x * mean(u * x) * r**3


BACKWARDS = (
    backward(
        "with LayerNorm's mean term: − mean(u)/n",
        lambda p, u, x, r, dy: right(u, x, r) - mean(u) * r,
    ),
    backward(
        "with LayerNorm's mean term: − mean(u)", lambda p, u, x, r, dy: right(u, x, r) - mean(u)
    ),
    backward(
        "with n⁴ for n³ in the term along x", lambda p, u, x, r, dy: u * r - x * mean(u * x) * r**4
    ),
    backward(
        "with n² for n³ in the term along x", lambda p, u, x, r, dy: u * r - x * mean(u * x) * r**2
    ),
    backward(
        "with n for n³ in the term along x: its power is 1",
        lambda p, u, x, r, dy: u * r - x * mean(u * x) * r,
    ),
    backward("without n³ in the term along x", lambda p, u, x, r, dy: u * r - x * mean(u * x)),
    backward("with n³ in both terms", lambda p, u, x, r, dy: u * r**3 - x * mean(u * x) * r**3),
    backward(
        "with the sign of the term along x turned",
        lambda p, u, x, r, dy: u * r + x * mean(u * x) * r**3,
    ),
    backward(
        "multiplied by n instead of divided (n for 1/n)",
        lambda p, u, x, r, dy: u / r - x * mean(u * x) / r**3,
    ),
    backward(
        "with n for 1/n in the first term", lambda p, u, x, r, dy: u / r - x * mean(u * x) * r**3
    ),
    backward("without 1/n in the first term", lambda p, u, x, r, dy: u - x * mean(u * x) * r**3),
    backward(
        "without the first term: − x·mean(u⊙x)/n³ alone",
        lambda p, u, x, r, dy: -x * mean(u * x) * r**3,
    ),
    backward(
        "without the norm's weight in the term along x",
        lambda p, u, x, r, dy: u * r - x * mean(dy * x) * r**3,
    ),
    backward(
        "without the norm's weight in the first term",
        lambda p, u, x, r, dy: dy * r - x * mean(u * x) * r**3,
    ),
    backward(
        "with the mean over u instead of u⊙x", lambda p, u, x, r, dy: u * r - x * mean(u) * r**3
    ),
    backward(
        "with the mean of x² instead of u⊙x", lambda p, u, x, r, dy: u * r - u * mean(x * x) * r**3
    ),
    backward(
        "with half of the term along x", lambda p, u, x, r, dy: u * r - x * mean(u * x) * r**3 / 2
    ),
    backward(
        "with twice the term along x", lambda p, u, x, r, dy: u * r - 2 * x * mean(u * x) * r**3
    ),
    backward(
        "adds dy to dx: accumulated where it should be written",
        lambda p, u, x, r, dy: right(u, x, r) + dy,
    ),
    backward(
        "adds x to dx: accumulated where it should be written",
        lambda p, u, x, r, dy: right(u, x, r) + x,
    ),
    backward(
        "without eps in n", lambda p, u, x, r, dy: right(u, x, 1 / np.maximum(root(x), 1e-150))
    ),
    backward(
        "with eps outside the root", lambda p, u, x, r, dy: right(u, x, 1 / (root(x) + p.set.eps))
    ),
    backward(
        "with the mean over tokens instead of channels",
        lambda p, u, x, r, dy: u * r - x * (u * x).mean(axis=-2, keepdims=True) * r**3,
    ),
)


def with_weight(self: Plain, dy: Array, x: Array, w: Array) -> Array:
    """The term along x multiplied by w once more."""
    r, u = self.inverse_rms(x), dy * w
    return u * r - w * x * mean(u * x) * r**3


def from_output(self: Plain, dy: Array, x: Array, w: Array) -> Array:
    """x read from the output y = w·x/n."""
    r, u = self.inverse_rms(x), dy * w
    y = w * x * r
    return (u - y * mean(u * y)) * r


def params(sentence: str, dw: Callable[..., Array]) -> type[Plain]:
    """dw(dy, x, r, w) in place of the right one."""

    def norm_params(self: Plain, dy: Array, x: Array, w: Array) -> Array:
        return dw(dy, x, self.inverse_rms(x), w)

    return variant(f"dw of RMSNorm {sentence}", norm_params=norm_params)


PARAMS = (
    params("without 1/n: Σ dy⊙x", lambda dy, x, r, w: flat(dy * x).sum(axis=0)),
    params(
        "formed with the output y (its weight too) instead of x/n",
        lambda dy, x, r, w: flat(dy * w * x * r).sum(axis=0),
    ),
    params(
        "averaged over rows instead of summed", lambda dy, x, r, w: flat(dy * x * r).mean(axis=0)
    ),
    params("is Σ dy: that of a bias", lambda dy, x, r, w: flat(dy).sum(axis=0)),
    params(
        "of the last sequence only: overwritten, not summed",
        lambda dy, x, r, w: flat((dy * x * r)[-1]).sum(axis=0),
    ),
    params("of the first sequence only", lambda dy, x, r, w: flat((dy * x * r)[0]).sum(axis=0)),
    params(
        "of the last row only: overwritten, not summed", lambda dy, x, r, w: flat(dy * x * r)[-1]
    ),
    params("of the first row only", lambda dy, x, r, w: flat(dy * x * r)[0]),
    params(
        "of the last token of each sequence only",
        lambda dy, x, r, w: flat((dy * x * r)[:, -1:]).sum(axis=0),
    ),
    params("averaged over the batch", lambda dy, x, r, w: flat(dy * x * r).sum(axis=0) / len(x)),
    params("with n for 1/n", lambda dy, x, r, w: flat(dy * x / r).sum(axis=0)),
    params("without the last row", lambda dy, x, r, w: flat(dy * x * r)[:-1].sum(axis=0)),
    params("divided by the weight", lambda dy, x, r, w: flat(dy * x * r).sum(axis=0) / w),
)


def eps_of(value: float, text: str) -> type[Plain]:
    """Another eps."""

    def inverse_rms(self: Plain, x: Array) -> Array:
        return 1 / np.sqrt(np.maximum(mean(x * x) + value, 1e-300))

    return variant(f"RMSNorm {text}", inverse_rms=inverse_rms)


EPSILONS = (
    eps_of(0.0, "without eps, or with a far smaller one"),
    *(
        eps_of(eps, f"with eps = {eps:g} instead of the one given")
        for eps in (1e-3, 1e-5, 1e-6, 1e-8)
    ),
    variant(
        "RMSNorm with eps applied twice",
        inverse_rms=lambda self, x: 1 / np.sqrt(mean(x * x) + 2 * self.set.eps),
    ),
    variant(
        "RMSNorm with eps² for eps",
        inverse_rms=lambda self, x: 1 / np.sqrt(mean(x * x) + self.set.eps**2),
    ),
    variant(
        "RMSNorm with the root of eps: n = √(mean(x²) + √eps)",
        inverse_rms=lambda self, x: 1 / np.sqrt(mean(x * x) + self.set.eps**0.5),
    ),
    variant(
        "RMSNorm with max(n, eps) for eps inside the root",
        inverse_rms=lambda self, x: 1 / np.maximum(root(x), self.set.eps),
    ),
    variant(
        "RMSNorm without the root: divided by mean(x²) + eps",
        inverse_rms=lambda self, x: 1 / (mean(x * x) + self.set.eps),
    ),
    variant(
        "RMSNorm with a sum for the mean: divided by √(Σx² + eps)",
        inverse_rms=lambda self, x: 1 / np.sqrt((x * x).sum(axis=-1, keepdims=True) + self.set.eps),
    ),
    variant(
        "RMSNorm with the mean of |x| for the root of the mean of x²",
        inverse_rms=lambda self, x: 1 / (mean(np.abs(x)) + self.set.eps),
    ),
    variant(
        "RMSNorm over all rows at once instead of each",
        inverse_rms=lambda self, x: np.broadcast_to(
            1 / np.sqrt((x * x).mean() + self.set.eps), x[..., :1].shape
        ),
    ),
    variant(
        "RMSNorm with the variance (mean subtracted there only) for mean(x²)",
        inverse_rms=LayerNorm.inverse_rms,
    ),
)

COUNTS: dict[str, Callable[[Array], list[int]]] = {
    "C − 1 (Bessel's correction)": lambda x: [x.shape[-1] - 1],
    "C + 1": lambda x: [x.shape[-1] + 1],
    "padded channels": lambda x: padded(x.shape[-1]),
    "T, the number of tokens,": lambda x: [x.shape[-2]],
    "N, the batch,": lambda x: [x.shape[0]],
    "N·T, the number of rows,": lambda x: [x[..., 0].size],
}


def divisors(x: Array) -> tuple[type[Plain], ...]:
    """The mean over channels with other divisors than C, for this x: everywhere, or in a backward."""
    found = []
    for name, counts in COUNTS.items():
        for count in (n for n in counts(x) if n > 0):
            words = f"divi{'sor of the' if 'padded' in name else 'ded by'} {name}"
            found += _divided(f"{words} ({count} for {x.shape[-1]})", count)
    return tuple(found)


def _divided(words: str, count: int) -> list[type[Plain]]:
    def inverse(self: Plain, x: Array) -> Array:
        return 1 / np.sqrt((x * x).sum(axis=-1, keepdims=True) / count + self.set.eps)

    def along(self: Plain, dy: Array, x: Array, w: Array) -> Array:
        r, u = self.inverse_rms(x), dy * w
        return u * r - x * (u * x).sum(axis=-1, keepdims=True) / count * r**3

    def forward(self: Plain, x: Array, w: Array) -> Array:
        return x * inverse(self, x) * w

    def derived(self: Plain, dy: Array, x: Array, w: Array) -> Array:
        r, u = inverse(self, x), dy * w
        return u * r - x * (u * x).sum(axis=-1, keepdims=True) / count * r**3

    text = "RMSNorm's mean over channels"
    return [
        variant(f"{text}: {words}, forward and backward", inverse_rms=inverse),
        variant(f"{text}: {words}, forward and backward", inverse_rms=inverse, norm_bwd=along),
        variant(f"{text}: {words}, in the term along x", norm_bwd=along),
        variant(f"{text}: {words}, in the forward", norm=forward),
        variant(f"{text}: {words}, in the backward", norm_bwd=derived),
    ]


KNOWN: tuple[type[Plain], ...] = (
    NormScaleOnly,
    NormWithoutWeight,
    NormSumForMean,
    NormPassedThrough,
    EpsOutside,
    LayerNorm,
    OnePlusWeight,
    NoGain,
    NoGainAtAll,
    NoGainForward,
    *BACKWARDS,
    *PARAMS,
    *EPSILONS,
    variant("RMSNorm backward with the weight twice in the term along x", norm_bwd=with_weight),
    variant("RMSNorm backward formed with the output y in place of x/n", norm_bwd=from_output),
)
