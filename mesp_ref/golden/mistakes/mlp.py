"""Mistakes of SwiGLU, and of GEGLU."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Plain, gelu_argument
from mesp_ref.ops import Array

Function = Callable[[Array], Array]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class SiluSigmoidOnly(Plain):
    """SiLU's derivative taken as σ alone, without gate·σ·(1 − σ)"""

    def activation_slope(self, gate: Array) -> Array:
        return sigmoid(gate)


class SiluAsSigmoid(Plain):
    """SiLU's derivative taken as that of the sigmoid, σ·(1 − σ)"""

    def activation_slope(self, gate: Array) -> Array:
        return np.exp(-gate) / (1 + np.exp(-gate)) ** 2


class SwappedGateUp(Plain):
    """silu applied to up instead of gate in the backward"""

    def swiglu_bwd(self, dz: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        dup, dgate = super().swiglu_bwd(dz, up, gate)
        return dgate, dup


class SwappedGateUpWhole(SwappedGateUp):
    """gate and up swapped, forward and backward: silu(up)·gate"""

    def swiglu(self, gate: Array, up: Array) -> tuple[Array, Array]:
        return super().swiglu(up, gate)


class SwappedGateUpForward(Plain):
    """gate and up swapped in the forward: silu(up)·gate"""

    def swiglu(self, gate: Array, up: Array) -> tuple[Array, Array]:
        return super().swiglu(up, gate)


class ExchangedGradients(Plain):
    """dgate and dup exchanged"""

    def swiglu_bwd(self, dz: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        dgate, dup = super().swiglu_bwd(dz, gate, up)
        return dup, dgate


class UpWithoutSilu(Plain):
    """dup formed with gate instead of silu(gate)"""

    def swiglu_bwd(self, dz: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        return super().swiglu_bwd(dz, gate, up)[0], dz * gate


def slope(sentence: str, function: Callable[[Array, Array], Array]) -> type[Plain]:
    """function(gate, σ) in place of silu's derivative."""
    return variant(
        f"SiLU's derivative {sentence}", activation_slope=lambda self, g: function(g, sigmoid(g))
    )


SLOPES = (
    slope(
        "with the sign of its second term turned: σ − gate·σ·(1 − σ)",
        lambda g, s: s - g * s * (1 - s),
    ),
    slope("without its first term: gate·σ·(1 − σ) alone", lambda g, s: g * s * (1 - s)),
    slope("without 1 − σ: σ + gate·σ", lambda g, s: s + g * s),
    slope("with σ for 1 − σ: σ + gate·σ²", lambda g, s: s + g * s * s),
    slope(
        "with σ·(1 − σ) for the second term: the factor gate is missing",
        lambda g, s: s + s * (1 - s),
    ),
    slope("without σ in its second term: σ + gate·(1 − σ)", lambda g, s: s + g * (1 - s)),
    slope("with silu(gate) for gate: σ + silu·σ·(1 − σ)", lambda g, s: s + g * s * s * (1 - s)),
    slope(
        "with silu(gate) for gate·σ·(1 − σ) … σ·(1 + silu·(1 − σ))",
        lambda g, s: s * (1 + g * s * (1 - s)),
    ),
    slope("taken as 1 + gate·(1 − σ): the factor σ is missing", lambda g, s: 1 + g * (1 - s)),
    slope("taken as silu itself", lambda g, s: g * s),
    slope("taken as 1: the gate passed straight through", lambda g, s: 1 + 0 * g),
    slope("taken as that of ReLU: 1 where gate > 0", lambda g, s: (g > 0) * 1.0),
    slope("with σ(1 + gate·σ)", lambda g, s: s * (1 + g * s)),
)


def erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[float])(x.real)


def phi(x: Array) -> Array:
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def tanh_gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def along(f: Function) -> Function:
    """A derivative by complex step."""
    return lambda x: np.imag(f(x + 1e-100j)) / 1e-100


# name, function, derivative
ACTIVATIONS: tuple[tuple[str, Function, Function], ...] = (
    ("GELU (its tanh form)", tanh_gelu, along(tanh_gelu)),
    (
        "GELU (exact)",
        lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
        lambda x: (1 + erf(x / np.sqrt(2))) / 2 + x * phi(x),
    ),
    (
        "quick GELU, gate·σ(1.702·gate),",
        lambda x: x * sigmoid(1.702 * x),
        along(lambda x: x * sigmoid(1.702 * x)),
    ),
    ("ReLU", lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    ("ReLU²", lambda x: np.maximum(x, 0) ** 2, lambda x: 2 * np.maximum(x, 0)),
    ("the sigmoid σ (GLU)", sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    ("tanh", np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    ("no function (gate·up)", lambda x: x, lambda x: 1 + 0 * x),
    (
        "hard swish",
        lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        lambda x: np.where(x > 3, 1, np.where(x < -3, 0, x / 3 + 0.5)),
    ),
    ("SiLU of −gate, gate·σ(−gate),", lambda x: x * sigmoid(-x), along(lambda x: x * sigmoid(-x))),
    (
        "SiLU of twice the gate, gate·σ(2·gate),",
        lambda x: x * sigmoid(2 * x),
        along(lambda x: x * sigmoid(2 * x)),
    ),
)


def activation(
    name: str, f: Function, slope_of: Function, which: str, right: str = "SiLU"
) -> type[Plain]:
    """Another activation, everywhere or on one way."""
    steps: dict[str, Callable[..., Any]] = {}
    if which != "in the backward":
        steps["activation"] = lambda self, g: f(g)
    if which != "in the forward":
        steps["activation_slope"] = lambda self, g: slope_of(g)
    if which == "in the forward":  # the backward is the right one
        steps = {"swiglu": lambda self, g, u: (f(g), f(g) * u)}
    if which == "in the backward":
        steps["swiglu_bwd"] = lambda self, dz, g, u: (dz * u * slope_of(g), dz * f(g))
    return variant(f"{name} in place of {right}, {which}", Plain, **steps)


def backward(
    sentence: str, dgate: Callable[..., Array] | None, dup: Callable[..., Array] | None
) -> type[Plain]:
    """dgate or dup of (dz, gate, up, σ) in place of the right one."""

    def swiglu_bwd(self: Plain, dz: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        a, b = Plain.swiglu_bwd(self, dz, gate, up)
        sig = sigmoid(gate)
        return dgate(dz, gate, up, sig) if dgate else a, dup(dz, gate, up, sig) if dup else b

    return variant(sentence, swiglu_bwd=swiglu_bwd)


def right_slope(g: Array, s: Array) -> Array:
    return s + g * s * (1 - s)


BACKWARDS = (
    backward("dup formed with σ instead of silu(gate)", None, lambda dz, g, u, s: dz * s),
    backward(
        "dup formed with SiLU's derivative instead of silu(gate)",
        None,
        lambda dz, g, u, s: dz * right_slope(g, s),
    ),
    backward("dup formed with up too: dz⊙silu(gate)⊙up", None, lambda dz, g, u, s: dz * g * s * u),
    backward("dup without silu(gate): dup = dz", None, lambda dz, g, u, s: dz * 1.0),
    backward(
        "dgate without up: the factor up is missing",
        lambda dz, g, u, s: dz * right_slope(g, s),
        None,
    ),
    backward(
        "dgate with silu(up) for up",
        lambda dz, g, u, s: dz * u * sigmoid(u) * right_slope(g, s),
        None,
    ),
    backward("dgate without SiLU's derivative: dz⊙up", lambda dz, g, u, s: dz * u, None),
    backward("dgate with gate for up", lambda dz, g, u, s: dz * g * right_slope(g, s), None),
    backward("dgate without the cotangent", lambda dz, g, u, s: u * right_slope(g, s), None),
    backward(
        "dgate and dup without the cotangent dz",
        lambda dz, g, u, s: u * right_slope(g, s),
        lambda dz, g, u, s: g * s,
    ),
    backward(
        "SwiGLU's backward returns zeros", lambda dz, g, u, s: 0 * g, lambda dz, g, u, s: 0 * g
    ),
    backward("silu treated as a constant: dgate is 0", lambda dz, g, u, s: 0 * g, None),
    backward("up treated as a constant: dup is 0", None, lambda dz, g, u, s: 0 * g),
)

WAYS = ("forward and backward", "in the forward", "in the backward")
COMMON = (SwappedGateUp, SwappedGateUpWhole, SwappedGateUpForward, ExchangedGradients)
KNOWN: tuple[type[Plain], ...] = (
    SiluSigmoidOnly,
    SiluAsSigmoid,
    *COMMON,
    UpWithoutSilu,
    *SLOPES,
    *BACKWARDS,
    *(activation(*row, which) for row in ACTIVATIONS for which in WAYS),
)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


# GELU in its tanh form: what it is taken for, and what its derivative is
OTHERS = (("SiLU", silu, along(silu)), *ACTIVATIONS[1:])


def without_cubic(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * x))


CUBIC = ("GELU without its cubic term", without_cubic, along(without_cubic))


def gelu_slope(sentence: str, function: Callable[[Array, Array], Array]) -> type[Plain]:
    """function(gate, tanh u) in place of GELU's derivative; dup stays right."""
    return variant(
        f"GELU's derivative {sentence}",
        activation_slope=lambda self, g: function(g, np.tanh(gelu_argument(g))),
    )


ROOT = (2 / np.pi) ** 0.5
GELU: tuple[type[Plain], ...] = (
    *COMMON,
    gelu_slope("without its second term: (1 + tanh u)/2 alone", lambda g, t: (1 + t) / 2),
    gelu_slope(
        "without its first term", lambda g, t: g / 2 * (1 - t * t) * ROOT * (1 + 0.134145 * g * g)
    ),
    gelu_slope(
        "with u′ = √(2/π): the cubic's derivative is missing",
        lambda g, t: (1 + t) / 2 + g / 2 * (1 - t * t) * ROOT,
    ),
    gelu_slope(
        "with 0.044715·gate² for 3·0.044715·gate²",
        lambda g, t: (1 + t) / 2 + g / 2 * (1 - t * t) * ROOT * (1 + 0.044715 * g * g),
    ),
    gelu_slope(
        "with 1 − tanh u for 1 − tanh² u",
        lambda g, t: (1 + t) / 2 + g / 2 * (1 - t) * ROOT * (1 + 0.134145 * g * g),
    ),
    gelu_slope("taken as 1: the gate passed straight through", lambda g, t: 1 + 0 * g),
    *(
        variant(
            f"GELU's derivative taken from {name}", activation_slope=lambda self, g, d=d: d(g)
        )
        for name, _, d in OTHERS
    ),
    *(
        activation(*row, which, "GELU (its tanh form)")
        for row in (*OTHERS, CUBIC)
        for which in WAYS
    ),
    variant(
        "dup formed with gate instead of gelu(gate)",
        swiglu_bwd=lambda self, dz, g, u: (Plain.swiglu_bwd(self, dz, g, u)[0], dz * g),
    ),
    variant(
        "dgate without up: the factor up is missing",
        swiglu_bwd=lambda self, dz, g, u: (
            dz * self.activation_slope(g),
            Plain.swiglu_bwd(self, dz, g, u)[1],
        ),
    ),
    *(
        variant(
            sentence,
            swiglu_bwd=lambda self, dz, g, u, a=a, b=b: tuple(
                f * d for f, d in zip((a, b), Plain.swiglu_bwd(self, dz, g, u), strict=True)
            ),
        )
        for sentence, a, b in (
            ("gelu treated as a constant: dgate is 0", 0, 1),
            ("up treated as a constant: dup is 0", 1, 0),
            ("GEGLU's backward returns zeros", 0, 0),
        )
    ),
)  # fmt: skip


def of(gelu: bool) -> tuple[type[Plain], ...]:
    """Those of SwiGLU, or of GEGLU."""
    return GELU if gelu else KNOWN
