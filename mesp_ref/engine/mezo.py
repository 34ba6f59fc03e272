"""MeZO: a gradient from forwards alone, and what such an estimate is worth."""

import math
from collections.abc import Callable

import numpy as np

from mesp_ref.engine.half import Gradients
from mesp_ref.engine.inputs import finite
from mesp_ref.engine.methods import Step
from mesp_ref.engine.model import hidden_states, shift
from mesp_ref.ops import Array


def mezo(step: Step) -> Array:
    """Zeroth-order estimate: two forwards for each of n seeds, whose z ~ N(0, 1) is never stored.

    Estimate  g = (L(θ + eps·z) − L(θ − eps·z)) / (2·eps);  gradient ≈ the mean of g·z
    Returns   the mean of the 2n losses; the estimate goes to `emit`, block by block
    Restores  θ, perturbed in place, within 4u·(|θ| + eps·|z|) a seed, u the unit roundoff
    Source    Malladi et al. 2023, arXiv 2305.17333, algorithms 1 and 2
    """
    losses = (step.probe or two_sided_losses)(step)
    if not losses:  # a probe that leaves the estimate for later
        return np.asarray(math.nan)
    noise = [np.random.default_rng(seed) for seed in step.seeds]
    for number, parameters in step.parameters.items():
        grads = {name: np.zeros_like(array) for name, array in parameters.items()}
        for (up, down), rng in zip(losses, noise, strict=True):
            _add_noise(grads, rng, (up - down) / (2 * step.eps) / len(losses))
        step.emit(number, grads)
        del grads  # handed over
    return np.asarray(np.mean(losses))


def two_sided_losses(step: Step) -> list[list[float]]:
    """L(θ + eps·z) and L(θ − eps·z) for each seed: all that mezo takes from the batch."""
    return [_two_sides(step, seed, _forward) for seed in step.seeds]


def replay(step: Step) -> list[list[float]]:
    """The same changes of θ, and so the same rounding of it, without a forward; no losses."""
    for seed in step.seeds:
        _two_sides(step, seed, lambda step: 0.0)
    return []


def perturbation_seeds(seed: int, perturbations: int) -> tuple[int, ...]:
    """The seeds that mezo averages over: `seed` itself, then 64-bit words drawn from it.

    More perturbations keep the seeds of fewer. Not seed + 1, seed + 2, …: a caller who counts
    `seed` up from step to step would meet the same noise again.
    """
    more = np.random.SeedSequence(seed).generate_state(perturbations - 1, np.uint64)
    return seed, *map(int, more)


def expected_cosine(parameters: int, perturbations: int = 1) -> float:
    """E cos(ĝ, ∇L) of mezo's estimate, as eps → 0, with d parameters and n perturbations.

    Estimate  ĝ = Z·Zᵀ·∇L/n with Z [d,n] of N(0, 1). Split Z along u = ∇L/|∇L| and across it: with
              a = Zᵀu [n], ĝ is |a|²·u plus a vector across u that given a is |a|·N(0, I_{d−1}). So
              cos = sqrt(p/(p + q)) with p = χ²_n and q = χ²_{d−1} independent: never negative,
              and cos² is Beta(n/2, (d−1)/2) distributed, whatever the model
    Mean      E cos² = n/(n + d − 1);  E cos = Γ((n+1)/2)·Γ((n+d−1)/2) / (Γ(n/2)·Γ((n+d)/2)), for
              n ≪ d sqrt(2/(π·d)) at n = 1 and about sqrt(n/d) from a few on
    Source    ĝ is the n-SPSA of Malladi et al. 2023, arXiv 2305.17333, definition 1; a Gaussian has
              no preferred direction, hence the rest
    """
    n, d, ln = perturbations, parameters, math.lgamma
    return math.exp(ln((n + 1) / 2) - ln(n / 2) + ln((n + d - 1) / 2) - ln((n + d) / 2))


def _two_sides(step: Step, seed: int, forward: Callable[[Step], float]) -> list[float]:
    """L(θ + eps·z) and L(θ − eps·z)."""
    at, losses = 0.0, []
    try:
        for side in (step.eps, -step.eps):
            _perturb(step, seed, side - at)
            at = side
            losses.append(forward(step))
    finally:  # an interrupted step leaves the parameters as they were, too
        _perturb(step, seed, -at)
    return losses


def _forward(step: Step) -> float:
    """The loss alone.  Raises MespRefError for one that is not finite."""
    n = hidden_states(step.model, step.ids, step.layers, step.halves)
    w, labels = step.model.weights[step.model.head], shift(step.labels)
    return finite("loss", step.lm_loss(n, w, labels, drop=frozenset({"dx"}))[0].item())


def _perturb(step: Step, seed: int, by: float) -> None:
    """θ += by·z, in place: the same z for the same seed."""
    rng = np.random.default_rng(seed)
    for parameters in step.parameters.values():
        _add_noise(parameters, rng, by)


def _add_noise(arrays: Gradients, rng: np.random.Generator, by: float) -> None:
    """w += by·z for every w, in place, z ~ N(0, 1) drawn tensor by tensor."""
    for w in arrays.values():
        w += by * rng.standard_normal(w.shape, dtype=w.dtype)
