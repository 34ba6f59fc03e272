"""Exercise: MeZO, a gradient from forwards alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mesp_ref.learn.exercise import Case, Exercise, Given, Outputs, Wrong
from mesp_ref.ops import Array
from mesp_ref.registry import Args

Weights = Mapping[str, Array]


def mezo(
    loss: Callable[[Weights], float], weights: Weights, *, seeds: Sequence[int], eps: float
) -> dict[str, Array]:
    """Zeroth-order estimate of the gradient of `loss` at `weights`.

    Estimate  g = (L(θ + eps·z) − L(θ − eps·z)) / (2·eps) for each seed;  gradient ≈ the mean of g·z over
              the seeds, where z is drawn again from the seed and never stored
    Source    Malladi et al. 2023, arXiv 2305.17333, algorithms 1 and 2
    """
    grads = {name: np.zeros_like(w) for name, w in weights.items()}
    for seed in seeds:
        up, down = (loss(_moved(weights, seed, by)) for by in (eps, -eps))
        for name, z in _noise(weights, seed):
            grads[name] += (up - down) / (2 * eps) / len(seeds) * z
    return grads


def _noise(weights: Weights, seed: int) -> Iterator[tuple[str, Array]]:
    """z of every tensor in their order, from one generator of the seed."""
    rng = np.random.default_rng(seed)
    for name, w in weights.items():
        yield name, rng.standard_normal(w.shape, dtype=w.dtype)


def _moved(weights: Weights, seed: int, by: float) -> dict[str, Array]:
    return {name: weights[name] + by * z for name, z in _noise(weights, seed)}


def _case(name: str, note: str, shapes: tuple[tuple[int, ...], ...], seeds: tuple[int, ...], eps: float) -> Case:  # fmt: skip
    def draw(rng: np.random.Generator) -> Args:
        weights = {f"w{i}": rng.standard_normal(shape) for i, shape in enumerate(shapes)}
        slopes = {key: rng.standard_normal(w.shape) for key, w in weights.items()}

        def loss(weights: Weights) -> float:
            return float(
                sum((np.sin(w) * slopes[key] + 0.3 * w**3).sum() for key, w in weights.items())
            )

        return {"loss": loss, "weights": weights, "seeds": seeds, "eps": eps}

    return Case(name, note, draw)


_CASES = (
    _case("small", "two tensors, one seed", ((2,), (3,)), (0,), 1e-2),
    _case("uneven", "two tensors, three seeds", ((2, 3), (4,)), (7, 11, 12), 2e-2),
    _case("two seeds", "tensors of one shape, eps = 0.1", ((3, 3), (3, 3)), (5, 3), 1e-1),
)


def _slope(g: Given, up: float, down: float, m: Wrong) -> float:
    here = g.loss(g.weights)
    found: float = m.pick(
        (up - down) / (2 * g.eps), over_eps=(up - down) / g.eps, no_eps=up - down, negated=(down - up) / (2 * g.eps),
        halved=(up - down) / 2, one_sided=(up - here) / g.eps, one_sided_half=(up - here) / (2 * g.eps),
        other_side=(here - down) / g.eps, eps_squared=(up - down) / (2 * g.eps**2),
        sign_alone=float(np.sign(up - down)), curvature=(up + down - 2 * here) / g.eps**2, loss_alone=up,
        sum_of_losses=(up + down) / (2 * g.eps), other_side_half=(here - down) / (2 * g.eps),
    )  # fmt: skip
    return found


def _streams(g: Given, seed: int, m: Wrong) -> tuple[dict[str, Array], ...]:
    """z of the two forwards and of the estimate."""
    z = dict(_noise(g.weights, seed))
    rng = np.random.default_rng(seed)

    def go_on(rng: np.random.Generator) -> dict[str, Array]:
        return {name: rng.standard_normal(w.shape, dtype=w.dtype) for name, w in g.weights.items()}

    ones = [go_on(rng) for _ in range(3)]
    restarted = {
        n: np.random.default_rng(seed).standard_normal(w.shape) for n, w in g.weights.items()
    }
    uniform_rng = np.random.default_rng(seed)
    uniform = {n: uniform_rng.random(w.shape) for n, w in g.weights.items()}
    backwards = dict(_noise(dict(reversed(g.weights.items())), seed))
    found: tuple[dict[str, Array], ...] = m.pick(
        (z, z, z), one_stream=(ones[0], ones[1], ones[2]), estimate_goes_on=(z, z, ones[1]),
        second_goes_on=(z, ones[1], ones[1]), second_differs=(z, ones[1], z),
        next_seed=(z, z, dict(_noise(g.weights, seed + 1))), restarted=(z, z, restarted),
        restarted_throughout=(restarted,) * 3, uniform=(z, z, uniform), uniform_throughout=(uniform,) * 3,
        sign_of_z=(z, z, {n: np.sign(a) for n, a in z.items()}), no_z=(z, z, {n: 0 * a + 1 for n, a in z.items()}),
        z_divides=(z, z, {n: 1 / a for n, a in z.items()}), z_squared=(z, z, {n: a * a for n, a in z.items()}),
        other_order=(z, z, backwards), unit_z=(_unit(z),) * 3, unit_estimate=(z, z, _unit(z)),
    )  # fmt: skip
    return found


def _unit(z: dict[str, Array]) -> dict[str, Array]:
    size = np.sqrt(sum((a * a).sum() for a in z.values()))
    return {name: a / size for name, a in z.items()}


def _mezo(g: Given, m: Wrong) -> Outputs:
    count = len(g.seeds)
    seeds = m.pick(tuple(g.seeds), first_seed=(g.seeds[0],), first_seed_again=(g.seeds[0],) * count)
    each, slopes = [], []
    for seed in seeds:
        first, second, last = _streams(g, seed, m)
        up = g.loss({n: w + g.eps * first[n] for n, w in g.weights.items()})
        down = g.loss({n: w - g.eps * second[n] for n, w in g.weights.items()})
        slopes.append(_slope(g, up, down, m))
        each.append(last)
    slopes = m.pick(slopes, one_slope=[slopes[0]] * len(slopes), mean_slope=[float(np.mean(slopes))] * len(slopes))  # fmt: skip
    weight = m.pick([1 / len(g.seeds)] * len(each), summed=[1.0] * len(each), last_over_count=[0.0] * (len(each) - 1) + [1 / count],
                    last_alone=[0.0] * (len(each) - 1) + [1.0], over_square=[1 / count**2] * len(each),
                    over_root=[count**-0.5] * len(each))  # fmt: skip
    grads = {
        n: sum(w * s * z[n] for w, s, z in zip(weight, slopes, each, strict=True))
        for n in g.weights
    }
    return m.pick(grads, with_weights={n: a + g.weights[n] for n, a in grads.items()})


def _named(returned: Any) -> Outputs:
    if not isinstance(returned, dict):
        found = "None: is a `return` missing?" if returned is None else type(returned).__name__
        raise ValueError(f"expected a dictionary of gradients by tensor name; found {found}")
    return dict(returned)


def _numbers(g: Given) -> dict[str, float]:
    return {
        "eps": g.eps,
        "the number of seeds": len(g.seeds),
        "eps/number of seeds": g.eps / len(g.seeds),
    }


MEZO = Exercise(
    name="mezo",
    title="zeroth order: two forwards a seed, and no backward",
    function=mezo,
    about=(mezo,),
    named=_named,
    cases=_CASES,
    formula=_mezo,
    numbers=_numbers,
    aliases=("zeroth_order",),
    given=(
        "loss     loss(weights) is a number; weights is a dictionary of arrays\n"
        "z        rng = np.random.default_rng(seed), then rng.standard_normal(w.shape, dtype=w.dtype)\n"
        "         for one tensor after the other, in the order of the dictionary\n"
        "Return a dictionary of gradients. Weights that were moved in place must be put back."
    ),
    hints=(
        "The two losses differ along z alone: their difference is a slope, a single number.",
        "The estimate is slope·z, so the same z is needed three times: draw it from the seed each time.",
    ),
    mistakes={
        "over_eps": "the difference is divided by eps where 2·eps belongs: the two points are 2·eps apart.",
        "no_eps": "the difference of the losses is not divided by 2·eps.",
        "halved": "the difference of the losses is divided by 2 but not by eps.",
        "eps_squared": "the difference is divided by eps²: by 2·eps.",
        "negated": "the slope has the wrong sign: L(θ + eps·z) − L(θ − eps·z).",
        "one_sided": "the difference is one-sided: L(θ + eps·z) − L(θ) over eps; MeZO takes both sides.",
        "one_sided_half": "the difference is one-sided, L(θ + eps·z) − L(θ), yet divided by 2·eps.",
        "other_side": "the difference is one-sided: L(θ) − L(θ − eps·z) over eps; MeZO takes both sides.",
        "other_side_half": "the difference is one-sided, L(θ) − L(θ − eps·z), yet divided by 2·eps.",
        "sign_alone": "only the sign of the difference is used: the slope's size is missing.",
        "curvature": "it is a second difference, a curvature: MeZO takes the first.",
        "loss_alone": "a loss stands where the slope, a difference of two, belongs.",
        "sum_of_losses": "the two losses are added where their difference belongs (sign).",
        "one_stream": "the seed is not replayed: each use of z draws other noise from one generator.",
        "estimate_goes_on": "the seed is not replayed for the estimate: it is formed with other noise than the losses.",
        "second_goes_on": "the seed is not replayed for the second forward and the estimate: their noise is another.",
        "second_differs": "the seed is not replayed for the second forward: L(θ − eps·z) must use the same z.",
        "next_seed": "the estimate is formed with the noise of seed + 1: replay the same seed, the same z.",
        "restarted": "the generator starts anew for every tensor in the estimate, so each tensor gets the same z: one generator for all.",
        "restarted_throughout": "the generator starts anew for every tensor, so each tensor gets the same z: one generator for all.",
        "uniform": "the estimate is formed with uniform noise: z is normal.",
        "uniform_throughout": "the noise is uniform: z is normal.",
        "sign_of_z": "only the sign of z is used in the estimate.",
        "no_z": "z, the noise, is missing in the estimate: the gradient is g·z.",
        "z_divides": "the slope is divided by z where it must be multiplied.",
        "z_squared": "z is squared in the estimate.",
        "other_order": "the tensors draw their z in another order in the estimate than in the losses.",
        "unit_z": "z is normalised to length 1: MeZO takes it as it is drawn.",
        "unit_estimate": "z is normalised to length 1 in the estimate.",
        "first_seed": "only the first seed is used, and divided by their number.",
        "first_seed_again": "the first seed is used every time: each seed has its own z.",
        "one_slope": "the slope of the first seed is used for every z: each seed has its own.",
        "mean_slope": "the mean slope is used for every z: each seed has its own.",
        "summed": "the seeds are summed: the estimate is their mean, over the number of seeds.",
        "last_alone": "only the last seed is used: the estimate is the mean over the seeds.",
        "last_over_count": "only the last seed is used, and divided by their number: add up the seeds.",
        "over_square": "the sum over the seeds is divided twice by the number of seeds (a mean of means).",
        "over_root": "the sum over the seeds is divided by the root of their number: by the number.",
        "with_weights": "the weights themselves are in the gradient: begin with zeros.",
    },
)  # fmt: skip
