"""Exercise: the gate of the MLP."""

import numpy as np

from mesp_ref.learn.exercise import LARGE, ONE_TOKEN, SMALL, UNEVEN, Given, Outputs, Wrong, of_op
from mesp_ref.ops import Array
from mesp_ref.registry.cases import times

_CASES = (
    ("small", "two rows of two", SMALL),
    ("uneven", "all lengths differ", UNEVEN),
    ("one token", "T = 1, two sequences", ONE_TOKEN),
    ("large", "gates of ±30: σ is 0 or 1 there", LARGE, times(gate=20.0)),
)


def _numbers(g: Given) -> dict[str, float]:
    n, t, f = g.dz.shape
    return {"F": f, "the number of rows": n * t, "the batch size N": n, "the number of tokens T": t}


def _swiglu(g: Given, m: Wrong) -> Outputs:
    gate, up = m.pick((g.gate, g.up), inputs_exchanged=(g.up, g.gate))
    dz = m.pick(g.dz, dz_squared=g.dz**2)
    e = np.exp(-np.abs(gate))
    sig = np.where(gate >= 0, 1, e) / (1 + e)
    rest = np.where(gate >= 0, e, 1) / (1 + e)  # 1 − σ
    sig, rest = m.pick(
        (sig, rest), sigma_negated=(rest, sig), step_for_sigma=((gate > 0) * 1.0, (gate <= 0) * 1.0)
    )
    silu = gate * sig
    term = m.pick(
        gate * sig * rest, no_second=0 * sig, no_rest=gate * sig * sig, no_gate=sig * rest,
        no_sigma=gate * rest, rest_alone=gate * sig, rest_square=gate * sig * (1 - sig * sig),
        rest_silu=silu * (1 - silu), times_up=gate * sig * rest * up, rest_added=gate * sig * (1 + sig),
        sigma_squared=gate * sig * sig * rest,
    )  # fmt: skip
    slope = m.pick(
        sig + term, second_subtracted=sig - term, no_first=term, of_sigmoid=sig * rest, of_relu=(gate > 0) * 1.0,
        silu_for_slope=silu, one_plus=1 + term, tanh_rule=1 - sig**2, of_tanh=1 - np.tanh(gate) ** 2, gate_for_slope=gate, no_slope=1.0 + 0 * gate,
        silu_first=silu + term, gelu_slope=_gelu_slope(gate),
    )  # fmt: skip
    dgate = m.pick(dz * up * slope, no_up=dz * slope, up_twice=dz * up * up * slope, up_slope_sum=dz * (up + slope), of_dup=dz * silu * slope, gate_for_up=dz * gate * slope,
                   no_dz_gate=up * slope)  # fmt: skip
    dup = m.pick(
        dz * silu, up_sigma=dz * sig, up_gate=dz * gate, up_slope=dz * slope, up_times_up=dz * silu * up,
        up_dz=dz, no_dz_up=silu, up_zero=0 * dz, up_rest=dz * gate * rest,
    )  # fmt: skip
    dgate, dup = m.pick(
        (dgate, dup), results_exchanged=(dup, dgate), gate_negated=(-dgate, dup), up_negated=(dgate, -dup),
    )  # fmt: skip
    return {"dgate": dgate, "dup": dup}


def _gelu_slope(x: Array) -> Array:
    """The slope of GELU's usual approximation by tanh."""
    inner = 0.7978845608028654 * (x + 0.044715 * x**3)
    t = np.tanh(inner)
    slope: Array = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (
        1 + 3 * 0.044715 * x**2
    )
    return slope


SWIGLU = of_op(
    "swiglu",
    title="silu(gate) ⊙ up",
    outputs="dgate dup",
    cases=_CASES,
    formula=_swiglu,
    aliases=("swiglu", "silu"),
    numbers=_numbers,
    hints=(
        "z is a product of two things: each one's gradient holds the other.",
        "silu(g) = g·σ(g) is a product again, and σ' = σ·(1 − σ): silu' has two terms.",
    ),
    mistakes={
        "inputs_exchanged": "gate and up are exchanged: silu is applied to gate.",
        "dz_squared": "dz is squared.",
        "sigma_negated": "the sign in the sigmoid is wrong: σ(gate) = 1/(1 + exp(−gate)), not 1/(1 + exp(gate)).",
        "step_for_sigma": "a step stands where the sigmoid belongs: that is ReLU.",
        "no_second": "the second term of silu's derivative is missing: silu' = σ + gate·σ·(1 − σ), not σ.",
        "no_rest": "σ stands where 1 − σ belongs in the second term: silu' = σ + gate·σ·(1 − σ).",
        "no_gate": "the second term lacks the factor gate: silu' = σ + gate·σ·(1 − σ).",
        "no_sigma": "the second term lacks the factor σ: silu' = σ + gate·σ·(1 − σ).",
        "rest_alone": "the second term lacks the factor 1 − σ: silu' = σ + gate·σ·(1 − σ).",
        "rest_square": "1 − σ² stands where 1 − σ belongs in the second term (that is tanh's rule).",
        "rest_silu": "the second term is silu·(1 − silu) where gate·σ·(1 − σ) belongs.",
        "rest_added": "1 + σ stands where 1 − σ belongs in the second term.",
        "times_up": "up multiplies the second term once too often.",
        "sigma_squared": "the second term has a factor σ too many.",
        "second_subtracted": "the second term of silu's derivative has the wrong sign: silu' = σ + gate·σ·(1 − σ).",
        "no_first": "the first term σ of silu's derivative is missing: silu' = σ + gate·σ·(1 − σ).",
        "of_sigmoid": "silu's derivative is taken as that of the sigmoid, σ·(1 − σ): silu is gate·σ.",
        "of_relu": "silu's derivative is taken as that of ReLU, a step.",
        "of_tanh": "silu's derivative is taken as that of tanh.",
        "tanh_rule": "silu's derivative is taken by the rule of tanh, 1 − σ²: silu' = σ + gate·σ·(1 − σ).",
        "gelu_slope": "silu's derivative is taken as that of GELU.",
        "silu_for_slope": "silu itself stands where its derivative belongs in dgate.",
        "gate_for_slope": "gate stands where silu's derivative belongs in dgate.",
        "no_slope": "silu's derivative is missing in dgate.",
        "one_plus": "the first term of silu's derivative is 1 where σ belongs.",
        "silu_first": "the first term of silu's derivative is silu where σ belongs.",
        "no_up": "the factor up is missing in dgate.",
        "up_twice": "the factor up is applied twice in dgate.",
        "up_slope_sum": "up is added where it must be multiplied in dgate.",
        "of_dup": "dgate is formed from dup, dz ⊙ silu, where dz ⊙ up belongs.",
        "gate_for_up": "gate stands where up belongs in dgate.",
        "no_dz_gate": "dz is missing in dgate.",
        "up_sigma": "σ (the sigmoid) stands where silu = gate·σ belongs in dup.",
        "up_gate": "gate stands where silu(gate) belongs in dup.",
        "up_slope": "silu's derivative (slope) stands where silu itself belongs in dup.",
        "up_times_up": "dup has a factor up too many: z is linear in up.",
        "up_dz": "dup lacks the factor silu(gate): it is dz itself.",
        "no_dz_up": "dz is missing in dup.",
        "up_zero": "dup is 0.",
        "up_rest": "1 − σ stands where σ belongs in dup.",
        "results_exchanged": "dgate and dup are exchanged: they are returned in the wrong order.",
        "gate_negated": "dgate has the wrong sign.",
        "up_negated": "dup has the wrong sign.",
    },
)
