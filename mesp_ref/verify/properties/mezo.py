"""MeZO: what an estimate g·z from two forwards must be, and what its noise is."""

from collections.abc import Iterator

import numpy as np
from scipy.linalg import norm
from scipy.stats import beta, kstest, ttest_1samp

from mesp_ref.api import loss_and_grads
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.mezo import perturbation_seeds
from mesp_ref.engine.model import Model
from mesp_ref.ops import Array
from mesp_ref.verify.planted import original, planted
from mesp_ref.verify.properties.claim import agree, exactly, holds
from mesp_ref.verify.result import Finding, scalar
from mesp_ref.verify.samples import sample_adapter, sample_batch, sample_model, small_config

Case = tuple[Model, Adapter, Array, Array]


def _case(rng: np.random.Generator, targets: str = "all") -> Case:
    config = small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config, targets=targets)
    return model, adapter, *sample_batch(rng, config)


def _estimate(case: Case, seed: int, eps: float) -> tuple[Array, Array, float]:
    """The estimate and the z it must be a multiple of, as vectors; and the loss it came with."""
    loss, found = loss_and_grads(*case, method="mezo", seed=seed, eps=eps)
    rng = np.random.default_rng(seed)
    z = [rng.standard_normal(g.shape, dtype=g.dtype).ravel() for g in found.values()]
    return np.concatenate([g.ravel() for g in found.values()]), np.concatenate(z), loss


def _gradient(case: Case) -> tuple[float, Array]:
    loss, grads = loss_and_grads(*case)
    return loss, np.concatenate([grads[name].ravel() for name in case[1].weights])


@holds("mezo")
def mezo_is_a_multiple_of_its_noise(rng: np.random.Generator) -> Iterator[Finding]:
    """The estimate is g·z with the z that perturbed: one number for all parameters."""
    case = _case(rng)
    g, z, _ = _estimate(case, 3, 1e-3)
    scale = g @ z / (z @ z)
    yield agree("mezo", "estimate / z", g, scale * z, np.abs(scale * z))
    again, _, _ = _estimate(case, 3, 1e-3)
    other, _, _ = _estimate(case, 4, 1e-3)
    yield agree("mezo", "same seed", again, g, np.abs(g).max(), 1e-9)
    yield exactly("mezo", "other seed differs", np.any(np.abs(other - g) > 1e-6), True)


@holds("mezo")
def mezo_is_even_in_its_noise(rng: np.random.Generator) -> Iterator[Finding]:
    """z → −z changes nothing: the two forwards change places, and g its sign."""
    case = _case(rng)
    g, _, loss = _estimate(case, 3, 1e-3)
    add = original("engine.mezo:_add_noise")

    def negated(arrays: dict[str, Array], rng: np.random.Generator, by: float) -> None:
        add(arrays, rng, -by)

    with planted({"engine.mezo:_add_noise": negated}):
        mirrored, _, same = _estimate(case, 3, 1e-3)
    yield agree("mezo", "estimate", mirrored, g, np.abs(g).max(), 1e-9)
    yield agree("mezo", "loss", same, loss, abs(loss), 1e-12)


@holds("mezo")
def mezo_averages_its_seeds(rng: np.random.Generator) -> Iterator[Finding]:
    """Three perturbations are the mean of three estimates, each with a g of its own."""
    case = _case(rng)
    alone = [_estimate(case, seed, 1e-3) for seed in perturbation_seeds(3, 3)]
    loss, found = loss_and_grads(*case, method="mezo", seed=3, eps=1e-3, perturbations=3)
    got = np.concatenate([g.ravel() for g in found.values()])
    mean = sum(g for g, _, _ in alone) / 3
    yield agree("mezo", "mean of three", got, mean, np.abs(mean).max(), 1e-9)
    yield agree("mezo", "mean loss", loss, sum(value for *_, value in alone) / 3, loss, 1e-12)


@holds("mezo")
def mezo_second_order(rng: np.random.Generator) -> Iterator[Finding]:
    """g(eps) − ⟨∇L, z⟩ falls fourfold when eps halves."""
    case = _case(rng)
    loss, gradient = _gradient(case)
    errors = []
    for eps in (4e-3, 2e-3):
        g, z, value = _estimate(case, 5, eps)
        errors.append(g @ z / (z @ z) - gradient @ z)
        yield agree("mezo", f"mean loss at {eps}", value, loss, 1.0, 1e3 * eps**2)
    yield scalar("properties", "mezo", "error ratio", errors[0] / errors[1], 4.0, 0.2,
                 "The estimate converges to the directional derivative at second order.")  # fmt: skip


@holds("mezo")
def mezo_restores(rng: np.random.Generator) -> Iterator[Finding]:
    """|θ' − θ| ≤ 4u(|θ| + eps·|z|), for every parameter."""
    case = _case(rng)
    before = {name: array.copy() for name, array in case[1].weights.items()}
    eps = 0.5
    _, z, _ = _estimate(case, 7, eps)
    ends = np.cumsum([array.size for array in before.values()])[:-1]
    for part, (name, array) in zip(np.split(z, ends), before.items(), strict=True):
        bound = 4 * 2.0**-53 * (np.abs(array) + eps * np.abs(part).reshape(array.shape))
        excess = np.abs(case[1].weights[name] - array) / bound
        yield scalar("properties", "mezo", name, excess.max(), 0.0, 1.0, "In units of the bound.")


@holds("mezo")
def mezo_cosine_is_beta(rng: np.random.Generator) -> Iterator[Finding]:
    """cos² of n estimates' mean with ∇L is Beta(n/2, (d−1)/2), by Kolmogorov and Smirnov's test."""
    case = _case(rng, "k_proj")
    _, gradient = _gradient(case)
    unit, d = gradient / norm(gradient), gradient.size
    z = np.stack([_estimate(case, seed, 1e-5)[0] for seed in range(240)])
    for n in (1, 3):
        means = z[: len(z) // n * n].reshape(-1, n, d).mean(axis=1)
        squares = (means @ unit) ** 2 / (means**2).sum(axis=1)
        p = kstest(squares, beta(n / 2, (d - 1) / 2).cdf).pvalue
        yield exactly("mezo", f"p of {n} seeds is above 1e-4", bool(p > 1e-4), True)


@holds("mezo")
def mezo_is_unbiased(rng: np.random.Generator) -> Iterator[Finding]:
    """E[g·z] = ∇L: no parameter's t-test rejects it, at 1e-4 over all of them (Bonferroni)."""
    case = _case(rng, "k_proj")
    _, gradient = _gradient(case)
    samples = np.stack([_estimate(case, seed, 1e-5)[0] for seed in range(200)])
    p = ttest_1samp(samples, gradient).pvalue
    yield exactly("mezo", "smallest p", bool(p.min() > 1e-4 / len(gradient)), True)


@holds("mezo")
def mezo_moments(rng: np.random.Generator) -> Iterator[Finding]:
    """E[g·z] = ∇L and E‖g·z‖² = (d + 2)·‖∇L‖², both within 5σ of the sample."""
    case = _case(rng, "k_proj")
    _, gradient = _gradient(case)
    samples = np.stack([_estimate(case, seed, 1e-5)[0] for seed in range(400)])
    spread = samples.std(axis=0) / np.sqrt(len(samples))
    off = np.abs(samples.mean(axis=0) - gradient) / spread
    yield scalar("properties", "mezo", "mean, in σ", off.max(), 0.0, 5.0, "The mean is biased.")
    norms = (samples**2).sum(axis=1)
    expected = (gradient.size + 2) * (gradient @ gradient)
    sigma = norms.std() / np.sqrt(len(norms))
    yield scalar("properties", "mezo", "E‖·‖²", norms.mean(), expected, 5 * sigma,
                 "The second moment of a Gaussian direction times its projection.")  # fmt: skip
