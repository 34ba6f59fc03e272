"""Questions about steps without a backward: the best epsilon, and what curvature makes of them."""

from typing import Any

import numpy as np

from mesp_ref.learn.exercise import Case, Given, Outputs, Wrong
from mesp_ref.learn.exercises.question import question, sizes
from mesp_ref.ops import Array


def best_eps(u: float, loss: float, third: float) -> float:
    """Neither large nor tiny.

    Asked     The slope (L(θ + ε·z) − L(θ − ε·z))/(2·ε) has two errors: the curve's, ε²·|L'''|/6, and rounding,
              u·|L|/ε, for each loss is known to u·|L| only. Which ε makes their sum smallest?
    Shapes    u the rounding unit, loss |L|, third |L'''| along z, numbers -> ε, a number
    Answer    the derivative ε·|L'''|/3 − u·|L|/ε² is 0 at ε = (3·u·|L|/|L'''|)^(1/3)
    """
    return float((3 * u * loss / third) ** (1 / 3))


def _eps(g: Given, m: Wrong) -> Outputs:
    factor = m.pick(3.0, no_3=1.0, equal_errors=6.0, half=1.5, third_part=1 / 3)
    u, loss = m.pick(g.u, no_u=1.0), m.pick(g.loss, no_loss=1.0)
    curve = m.pick(g.third, no_third=1.0, multiplied=1 / g.third)
    ratio = factor * u * loss / curve
    ratio = m.pick(ratio, upside_down=1 / ratio)
    return {"eps": m.pick(ratio ** (1 / 3), square_root=ratio**0.5, no_root=ratio, fourth_root=ratio**0.25, root_of_u=g.u**0.5, cube_root_of_u=g.u ** (1 / 3), fifth_root=ratio**0.2)}  # fmt: skip


EPS = question(
    best_eps,
    "the best step of a central difference",
    outputs="eps",
    cases=(
        sizes("float32", "u = 2⁻²⁴, L = 3, L''' = 0.4", u=2.0**-24, loss=3.0, third=0.4),
        sizes("float64", "u = 2⁻⁵³, L = 0.5, L''' = 20", u=2.0**-53, loss=0.5, third=20.0),
        sizes("bfloat16", "u = 2⁻⁸, L = 10, L''' = 7", u=2.0**-8, loss=10.0, third=7.0),
    ),
    formula=_eps,
    hints=(
        "Write the sum of the two errors as a function of ε, and derive it.",
        "ε·|L'''|/3 = u·|L|/ε²: multiply by ε², then a cube root.",
    ),
    mistakes={
        "no_3": "the factor 3 is missing: the derivative of ε²/6 is ε/3.",
        "equal_errors": "the two errors are set equal (6): the minimum is where the derivative of their sum is 0 (3).",
        "half": "the factor is 1.5 where 3 belongs: one loss is rounded with u·|L|/(2·ε), here both are together.",
        "third_part": "the factor is 1/3 where 3 belongs.",
        "no_u": "the rounding unit u is missing.",
        "no_loss": "the size of the loss is missing: its rounding is u·|L|.",
        "no_third": "the third derivative is missing.",
        "multiplied": "the third derivative multiplies where it must divide: a stronger curve wants a smaller ε.",
        "upside_down": "it is upside down: ε grows with u, and falls with |L'''|.",
        "square_root": "a square root stands where a cube root belongs (1/3): that is the rule for one-sided differences.",
        "no_root": "the cube root is missing.",
        "fourth_root": "a fourth root stands where a cube root belongs.",
        "fifth_root": "a fifth root stands where a cube root belongs: that is the rule for the next order.",
        "root_of_u": "√u is the rule for one-sided differences: here it is a cube root, and L and L''' belong in it.",
        "cube_root_of_u": "the cube root of u is right up to a factor: 3·|L|/|L'''| belongs under the root as well.",
    },
)


def mezo_steps(g: Array, curvature: Array) -> float:
    """Why it works at all.

    Asked     Near θ the loss is L + g·δ + ½·Σ λ_i·δ_i², curvatures λ_i ≥ 0. One step along the gradient g with the
              best rate lowers it by |g|⁴/(2·Σ λ_i·g_i²). MeZO steps along ĝ = z·(z·g), z standard normal, with the
              one rate that is best on average. How many MeZO steps are worth one exact step?
    Shapes    g [d] the gradient, curvature [d] the λ_i -> a number
    Answer    E ĝ = g and E Σ λ_i·ĝ_i² = |g|²·Σ λ_i + 2·Σ λ_i·g_i², so 2 + |g|²·Σ λ_i/Σ λ_i·g_i²
    """
    return float(2 + (g * g).sum() * curvature.sum() / (g * g * curvature).sum())


def _steps(given: Given, m: Wrong) -> Outputs:
    g, c = given.g, given.curvature
    trace = m.pick(c.sum(), mean=c.mean(), largest=c.max(), squares=(c * c).sum())
    along = m.pick(
        (g * g * c).sum(),
        g_once=(g * c).sum(),
        no_curvature=(g * g).sum(),
        c_squared=(g * g * c * c).sum(),
    )
    ratio = m.pick(
        (g * g).sum() * trace / along,
        no_size=trace / along,
        upside_down=along / ((g * g).sum() * trace),
        rank=c.sum() / c.max(),
    )
    more = m.pick(2.0, no_2=0.0, one=1.0, three=3.0)
    return {"steps": m.pick(more + ratio, all_d=2.0 + len(c), d_alone=float(len(c)), count=2.0 + np.count_nonzero(c), count_alone=float(np.count_nonzero(c)),
                            rooted=(more + ratio) ** 0.5, doubled=2 * ratio, max_normed=2 + c.sum() / c.max() / (g * g).sum())}  # fmt: skip


def _quadratic(name: str, note: str, curvature: tuple[float, ...]) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        c = np.array(curvature)
        return {"g": rng.standard_normal(len(c)) * (c > 0), "curvature": c}

    return Case(name, note, draw)


STEPS = question(
    mezo_steps,
    "what curvature makes of d: how many MeZO steps for one exact",
    outputs="steps",
    cases=(
        _quadratic("round", "all five curvatures are 1", (1, 1, 1, 1, 1)),
        _quadratic(
            "flat",
            "twelve dimensions, three of them curved alike",
            (2, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0),
        ),
        _quadratic("uneven", "curvatures from 0.1 to 9", (9, 3, 1, 0.4, 0.1, 0, 0)),
    ),
    formula=_steps,
    numbers=lambda g: {"d": len(g.g)},
    hints=(
        "A step of rate η along ĝ changes L by −η·g·ĝ + ½·η²·Σ λ_i·ĝ_i². Take the mean, then the best η.",
        "Fourth moments of a normal: E z_i²·z_j² = 1 for i ≠ j, E z_i⁴ = 3. So E Σ λ_i·ĝ_i² = |g|²·Σ λ_i + 2·Σ λ_i·g_i².",
    ),
    mistakes={
        "mean": "the mean of the curvatures stands where their sum belongs.",
        "largest": "the largest curvature stands where their sum (the trace) belongs.",
        "squares": "squared curvatures are summed where curvatures belong.",
        "g_once": "the square of g is missing in Σ λ_i·g_i².",
        "no_curvature": "the curvature is missing in Σ λ_i·g_i².",
        "c_squared": "λ² stands where λ belongs in Σ λ_i·g_i².",
        "no_size": "the factor |g|² is missing.",
        "upside_down": "it is upside down: Σ λ_i·g_i² divides.",
        "rank": "it is the trace over the largest curvature: that holds where g lies along it; Σ λ_i·g_i²/|g|² belongs there.",
        "max_normed": "the trace is divided by the largest curvature and by |g|²: Σ λ_i·g_i²/|g|² belongs there, not the largest.",
        "no_2": "the 2 is missing: E z_i⁴ is 3, not 1.",
        "one": "1 stands where 2 belongs: E z_i⁴ = 3 gives two more than E z_i²·z_j² = 1.",
        "three": "3 stands where 2 belongs: one of the three is in the trace already.",
        "all_d": "it is 2 + d, whatever the curvature: where most directions are flat, noise in them does no harm.",
        "d_alone": "it is d, the number of parameters, whatever the curvature: where most directions are flat, noise in them does no harm.",
        "count": "it is 2 + the number of curved (nonzero) dimensions: that holds where these are curved alike.",
        "count_alone": "it is the number of curved (nonzero) dimensions: that holds roughly, where these are curved alike.",
        "rooted": "a root is taken: progress goes with the square of the cosine.",
        "doubled": "the ratio is doubled: 2 is added.",
    },
)
