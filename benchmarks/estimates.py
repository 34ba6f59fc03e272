"""MeZO's estimate g·z beside the true gradient: what it should be, and what it is.

Notation: ∇ [d] the gradient in the d parameters that are perturbed, z ~ N(0, I) [d],
g = (L(θ + eps·z) − L(θ − eps·z))/(2·eps), which is <∇, z> as eps → 0. The functions on arrays need
no model; `Point` is a model with an adapter whose parameters lie in one vector.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import beta

import mesp_ref as mr
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.mezo import expected_cosine
from mesp_ref.engine.model import Model
from mesp_ref.ops import Array

# What is expected, eps → 0


def cosine_of_part(parameters: int, share: float) -> float:
    """E cos of g·z with ∇ on a part of the perturbed parameters.

    With share = |∇_part|/|∇|, g/|∇| and <z_part, ∇_part>/|∇_part| are standard normal with
    correlation `share`, so sign(g) is right more often by that: E cos = share·E|cos| up to O(1/d).
    """
    return share * expected_cosine(parameters)


def sign_agreement(part: Array, norm: float) -> float:
    """Expected share of entries of g·z with the sign of ∇'s, over the entries ≠ 0 of `part`.

    g/|∇| and z_i·sign(∇_i) are normal with correlation r = |∇_i|/|∇|; both have one sign with
    probability 1/2 + arcsin(r)/π (Sheppard 1899). `norm` is |∇|.
    """
    r = np.abs(part[part != 0].astype(np.float64)) / norm
    return float(np.mean(0.5 + np.arcsin(np.minimum(r, 1)) / np.pi))


def norm_ratio(parameters: int, share: float = 1.0, perturbations: int = 1) -> float:
    """Root mean square of |ĝ_part|/|∇_part| for the mean ĝ of n estimates.

    E|ĝ_part|² = |∇_part|²·(1 + 1/n) + |∇|²·d_part/n, from E a_i·a_j·z_i·z_j of normal vectors.
    """
    n = perturbations
    return math.sqrt(1 + 1 / n + parameters / n / share**2)


def cosine_quantiles(parameters: int, perturbations: int, levels: Sequence[float]) -> list[float]:
    """Quantiles of cos(ĝ, ∇): cos² is Beta(n/2, (d−1)/2) distributed, see expected_cosine."""
    found = beta.ppf(levels, perturbations / 2, (parameters - 1) / 2)
    return [math.sqrt(value) for value in found]


def perturbations_for(cosine: float, parameters: int) -> float:
    """How many perturbations bring sqrt(E cos²) = sqrt(n/(n + d − 1)) up to `cosine`."""
    return cosine**2 / (1 - cosine**2) * (parameters - 1)


# What is found


class Tally(NamedTuple):
    """Sums of z with ∇ over each tensor: of one seed [tensors], stacked [S, tensors]."""

    dot: Array  # <z, ∇>
    square: Array  # |z|²
    agree: Array  # entries in which z has the sign of ∇
    differ: Array  # entries in which it has the other


def tally(z: Array, gradient: Array, starts: Array) -> Tally:
    """Sums by tensor; tensor i of the vectors [d] begins at starts[i]."""
    product = z * gradient
    dot, square = (np.add.reduceat(a, starts, dtype=np.float64) for a in (product, z * z))
    agree, differ = (np.add.reduceat(a, starts, dtype=np.int64) for a in (product > 0, product < 0))
    return Tally(dot, square, agree, differ)


def stack(rows: Iterable[Tally]) -> Tally:
    """The tallies of many seeds as one."""
    return Tally(*(np.array(column) for column in zip(*rows, strict=True)))


class Mean(NamedTuple):
    """A mean over seeds and its standard error, which one seed alone does not tell."""

    value: float
    error: float | None


def mean(samples: Array) -> Mean:
    count = len(samples)
    error = float(samples.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return Mean(float(samples.mean()), error)


class Part(NamedTuple):
    """What the seeds gave for some of the tensors, and what was expected."""

    parameters: int
    share: float  # |∇_part|/|∇|
    alone: Mean  # |cos| if nothing but the part is perturbed
    cosine: Mean  # cos on the part if all is perturbed
    signs: Mean  # share of entries ≠ 0 whose sign is right, all perturbed
    signs_expected: float
    norm: float  # root mean square of |g·z_part|/|∇_part|, all perturbed


def part_statistics(
    found: Tally, gradient: Array, slices: Sequence[slice], members: Sequence[int]
) -> Part:
    """Statistics of the tensors numbered `members`."""
    whole = float(np.linalg.norm(gradient.astype(np.float64)))
    entries = np.concatenate([gradient[slices[i]] for i in members])
    size = float(np.linalg.norm(entries.astype(np.float64)))
    g = found.dot.sum(1)
    dot, square, agree, differ = (
        sums[:, members].sum(1) for sums in (found.dot, found.square, found.agree, found.differ)
    )
    cosine = dot / (np.sqrt(square) * size)
    right = np.where(g > 0, agree, differ) / np.maximum(agree + differ, 1)
    return Part(
        len(entries), size / whole, mean(np.abs(cosine)), mean(np.sign(g) * cosine), mean(right),
        sign_agreement(entries, whole), float(np.sqrt(np.mean(g**2 * square))) / size,
    )  # fmt: skip


def cosine(a: Array, b: Array) -> float:
    """Of two vectors of any one shape."""
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def averaged_cosines(gradient: Array, estimates: Iterable[Array]) -> list[tuple[int, Mean]]:
    """cos with ∇ of the mean of n estimates, n = 1, 2, 4, …, each estimate in one mean of each n.

    Sums of equal size merge as the carry of a binary counter does: log2(S) vectors are alive.
    """
    waiting: list[tuple[int, Array]] = []
    found: dict[int, list[float]] = {}
    for estimate in estimates:
        n, total = 1, estimate
        found.setdefault(n, []).append(cosine(total, gradient))
        while waiting and waiting[-1][0] == n:
            n, total = 2 * n, waiting.pop()[1] + total
            found.setdefault(n, []).append(cosine(total, gradient))
        waiting.append((n, total))
    return [(n, mean(np.array(values))) for n, values in found.items()]


class Slope(NamedTuple):
    """g of some seeds beside <∇, z>, with one part perturbed and one eps."""

    part: str
    parameters: int
    eps: float
    g: list[float]
    projected: list[float]

    @property
    def correlation(self) -> float:
        return float(np.corrcoef(self.g, self.projected)[0, 1])

    @property
    def right_signs(self) -> int:
        """Seeds whose g has the sign of <∇, z>: g enters the cosine by its sign alone."""
        return int(np.sum(np.sign(self.g) == np.sign(self.projected)))

    @property
    def error(self) -> float:
        """Root mean square of g − <∇, z> over that of <∇, z>."""
        exact = np.array(self.projected)
        return float(np.linalg.norm(np.array(self.g) - exact) / np.linalg.norm(exact))


class Averages(NamedTuple):
    """Cosines of means of n estimates, n = 1, 2, 4, …"""

    part: str
    parameters: int
    measured: bool  # g from two forwards, else <∇, z>
    cosines: list[tuple[int, Mean]]


# On a model


class Point:
    """A model, a batch, and an adapter whose parameters are views of one vector `theta` [d]."""

    def __init__(self, model: Model, adapter: Adapter, ids: Array, labels: Array):
        self.model, self.batch = model, (ids, labels)
        self.names = list(adapter.weights)
        sizes = [adapter.weights[name].size for name in self.names]
        ends = np.cumsum(sizes)
        self.starts = ends - sizes
        self.slices = [slice(int(a), int(b)) for a, b in zip(self.starts, ends, strict=True)]
        self.theta = self._vector(adapter.weights)
        views = {
            name: self.theta[part].reshape(adapter.weights[name].shape)
            for name, part in zip(self.names, self.slices, strict=True)
        }
        self.adapter = Adapter(adapter.rank, adapter.alpha, adapter.targets, False, views)
        self.loss, grads = mr.loss_and_grads(model, self.adapter, ids, labels)
        self.gradient = self._vector(grads)

    def _vector(self, tensors: dict[str, Array]) -> Array:
        return np.concatenate([tensors[name].reshape(-1) for name in self.names])

    def noise(self, seed: int) -> Array:
        """The z [d] that loss_and_grads(method="mezo") draws from this seed."""
        return np.random.default_rng(seed).standard_normal(self.theta.size, self.theta.dtype)

    def mezo(self, seed: int, perturbations: int, eps: float) -> Array:
        """The library's estimate [d]."""
        return self._vector(
            mr.loss_and_grads(
                self.model, self.adapter, *self.batch, method="mezo", seed=seed, eps=eps,
                perturbations=perturbations,
            )[1]
        )  # fmt: skip

    def two_forwards(self, part: slice, seeds: Iterable[int], eps: float) -> Iterator[float]:
        """g of each seed, with only the entries `part` of theta perturbed."""
        start = self.theta.copy()
        for seed in seeds:
            step = eps * self.noise(seed)[part]
            losses = []
            for side in (step, -step):
                self.theta[part] = start[part] + side
                losses.append(mr.loss(self.model, self.adapter, *self.batch))
            self.theta[:] = start
            yield (losses[0] - losses[1]) / (2 * eps)

    def members(self, text: str) -> list[int]:
        """Numbers of the tensors whose name contains `text`."""
        return [i for i, name in enumerate(self.names) if text in name]

    def span(self, members: Sequence[int]) -> slice:
        """The entries of tensors that follow each other."""
        return slice(self.slices[members[0]].start, self.slices[members[-1]].stop)
