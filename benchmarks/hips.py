"""gradcheck over the vector-Jacobian products of HIPS autograd: python benchmarks/hips.py

Every function is checked at ordinary values inside its domain and, where 0 belongs to that, at values
with exact zeros and ties. autograd is watched meanwhile: what it holds a product for and was never asked
is listed by name. Needs the extra `checkers`.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from mesp_ref.verify import gradcheck

Subject = tuple[str, Callable[..., Any], tuple[Any, ...]]

# Functions of one array in autograd.numpy; zeros and ties are asked too where 0 is inside the domain.
ANYWHERE = """
    abs absolute arctan arcsinh cos cosh exp exp2 expm1 negative sin sinc sinh square tan tanh
    cumsum diff fabs max min amax amin mean median std var sum prod sort ravel flipud fliplr rot90
    transpose tril triu
    real imag conj angle diagonal diag trace squeeze deg2rad rad2deg degrees radians nan_to_num gradient
    real_if_close atleast_1d atleast_2d atleast_3d fftshift
"""
POSITIVE = "sqrt log log2 log10 log1p reciprocal"
INSIDE = "arcsin arccos arctanh"
BINARY = """
    add subtract multiply divide maximum minimum fmax fmin logaddexp logaddexp2 arctan2 hypot power dot
    outer inner matmul kron remainder mod cross
"""
LINALG = "inv det norm pinv cholesky slogdet eigh eig svd"
SPECIAL = """
    gamma gammaln digamma psi rgamma gammasgn erf erfc erfinv erfcinv expit logit i0 i1 j0 j1
    y0 y1 logsumexp
"""
TRANSFORMS = "fft ifft fft2 ifft2 fftn ifftn rfft rfft2 rfftn"


def _numbers() -> tuple[Any, Any]:
    x = np.random.default_rng(0).standard_normal((3, 3))
    return x, np.array([[0.0, 1, 1], [0, 0, 2], [-1, 3, 3]])


def _after(function: Callable[..., Any], *fixed: float) -> Callable[..., Any]:
    """The function with numbers held right after its first argument."""
    return lambda first, *more: function(first, *fixed, *more)


def of_one_array() -> Iterator[Subject]:
    """Elementwise functions, reductions and rearrangements."""
    import autograd.numpy as anp

    x, tied = _numbers()
    for name in ANYWHERE.split():
        if hasattr(anp, name):
            yield name, getattr(anp, name), (x,)
            yield f"{name} with zeros and ties", getattr(anp, name), (tied,)
    for name in POSITIVE.split():
        yield name, getattr(anp, name), (np.abs(x) + 0.1,)
    for name in INSIDE.split():
        yield name, getattr(anp, name), (np.tanh(x),)
    yield "arccosh", anp.arccosh, (np.abs(x) + 1.5,)


def of_two_arrays() -> Iterator[Subject]:
    """Binary ones, of equal shapes and broadcast."""
    import autograd.numpy as anp

    x, _ = _numbers()
    for name in BINARY.split():
        if hasattr(anp, name):
            yield name, getattr(anp, name), (np.abs(x) + 0.1, x.T.copy())
            yield f"{name} broadcast", getattr(anp, name), (np.abs(x) + 0.1, x[0].copy())
    yield "tensordot", lambda a, b: anp.tensordot(a, b, 1), (x, x.T.copy())
    yield "einsum", lambda a, b: anp.einsum("ij,jk->ik", a, b), (x, x.T.copy())
    yield "einsum broadcast", lambda a, b: anp.einsum("...j,jk->...k", a, b), (x, x.T.copy())
    yield "einsum sums", lambda a, b: anp.einsum("ij,kl->i", a, b), (x, x.T.copy())
    yield "where", lambda a, b: anp.where(x > 0, a, b), (x, x.T.copy())
    yield "append", lambda a, b: anp.concatenate([a, b], 1), (x, x.T.copy())
    yield "stack", lambda a, b: anp.stack([a, b]), (x, x.T.copy())
    yield "linspace", lambda a, b: anp.linspace(a, b, 4), (x[0], x[1])


def with_options() -> Iterator[Subject]:
    """Rearrangements that take more than an array."""
    import autograd.numpy as anp

    x, tied = _numbers()
    wide = np.random.default_rng(1).standard_normal((4, 4, 2))
    made: dict[str, Callable[..., Any]] = {
        "reshape": lambda a: anp.reshape(a, (2, 16)), "roll": lambda a: anp.roll(a, 1, 0),
        "rollaxis": lambda a: anp.rollaxis(a, 2), "moveaxis": lambda a: anp.moveaxis(a, 0, 2),
        "swapaxes": lambda a: anp.swapaxes(a, 0, 2), "tile": lambda a: anp.tile(a, (2, 1, 3)),
        "repeat": lambda a: anp.repeat(a, 3, 1), "expand_dims": lambda a: anp.expand_dims(a, 1),
        "pad": lambda a: anp.pad(a, 1, "constant"), "split": lambda a: tuple(anp.split(a, 2, 0)),
        "array_split": lambda a: tuple(anp.array_split(a, 3, 0)),
        "hsplit": lambda a: tuple(anp.hsplit(a, 2)), "vsplit": lambda a: tuple(anp.vsplit(a, 2)),
        "dsplit": lambda a: tuple(anp.dsplit(a, 2)), "clip": lambda a: anp.clip(a, -0.5, 0.5),
        "index": lambda a: a[np.array([0, 2, 2])], "slice": lambda a: a[1:, ::2],
        "astype": lambda a: a.astype(np.float64),
        "broadcast_to": lambda a: anp.broadcast_to(a, (3, 4, 4, 2)),
        "array": lambda a: anp.array([a[0, 0], a[1, 1]]), "full": lambda a: anp.full((2,), a[0, 0, 0]),
        "make_diagonal": lambda a: anp.make_diagonal(a, axis1=-1, axis2=-2),
    }  # fmt: skip
    for name, function in made.items():
        yield name, function, (wide,)
    yield "partition", lambda a: anp.partition(a, 2), (x[0],)
    yield "sort of one axis", anp.sort, (tied.ravel(),)
    yield "std along an axis with ties", lambda a: anp.std(a, 1), (np.ones((2, 3)),)


def matrices() -> Iterator[Subject]:
    """numpy.linalg and scipy.linalg."""
    import autograd.numpy as anp
    import autograd.scipy.linalg as asl

    x, _ = _numbers()
    spd = x @ x.T + np.eye(3)
    for name in ("inv", "det", "norm", "pinv", "cholesky"):
        yield f"linalg.{name}", getattr(anp.linalg, name), (spd,)
    sym: Callable[[Any], Any] = lambda a: (a + a.T) / 2  # noqa: E731
    yield "linalg.cholesky of the symmetric part", lambda a: anp.linalg.cholesky(sym(a)), (spd,)
    yield "linalg.slogdet", lambda a: anp.linalg.slogdet(a)[1], (spd,)
    yield "linalg.eigh", lambda a: anp.linalg.eigh(sym(a))[0], (spd,)
    yield "linalg.eigh of equal values", lambda a: anp.linalg.eigh(sym(a))[0], (np.eye(3),)
    yield "linalg.eig", lambda a: anp.real(anp.linalg.eig(a)[0]).sum(), (spd,)
    yield "linalg.svd", lambda a: anp.linalg.svd(a, full_matrices=False)[1], (x[:2].copy(),)
    yield "linalg.norm at 0", anp.linalg.norm, (np.zeros((2, 2)),)
    yield "linalg.norm, nuclear", lambda a: anp.linalg.norm(a, "nuc"), (x,)
    yield "linalg.det of a singular matrix", anp.linalg.det, (np.ones((3, 3)),)
    yield "linalg.pinv, wide", anp.linalg.pinv, (x[:2].copy(),)
    yield "linalg.solve", anp.linalg.solve, (spd, x[0].copy())
    yield "linalg.solve of a matrix", anp.linalg.solve, (spd, x)
    low = np.tril(x) + 3 * np.eye(3)
    yield (
        "solve_triangular",
        lambda a, b: asl.solve_triangular(a, b, lower=True),
        (low, x[0].copy()),
    )
    yield "sqrtm", asl.sqrtm, (spd,)
    yield "solve_sylvester", asl.solve_sylvester, (spd, spd + np.eye(3), x)
    if hasattr(asl, "solve_banded"):
        band = np.array([[0.0, 0.3, 0.2], [2, 3, 2.5], [0.1, 0.4, 0]])
        yield "solve_banded", lambda a, b: asl.solve_banded((1, 1), a, b), (band, x[0].copy())


def transforms() -> Iterator[Subject]:
    """numpy.fft with its real and imaginary parts, even and odd lengths; scipy.signal."""
    import autograd.numpy as anp
    from autograd.scipy.signal import convolve

    for length in (4, 5):
        x = np.random.default_rng(2).standard_normal((4, length))
        for name in TRANSFORMS.split():

            def parts(a: Any, name: str = name) -> Any:
                y = getattr(anp.fft, name)(a)
                return anp.concatenate([anp.real(y), anp.imag(y)], 0)

            yield f"fft.{name} of length {length}", parts, (x,)
    x, y = np.random.default_rng(3).standard_normal((2, 4, 4))
    for name in ("irfft", "irfft2", "irfftn"):
        yield f"fft.{name}", lambda a, b, n=name: getattr(anp.fft, n)(a + 1j * b), (x, y)
    for name in ("fftshift", "ifftshift"):
        yield f"fft.{name}", getattr(anp.fft, name), (x,)
    yield "fft of another length", lambda a: anp.real(anp.fft.fft(a, 6)), (x,)
    yield "signal.convolve", lambda a, b: convolve(a, b), (x[0], y[0, :2].copy())
    yield "signal.convolve, valid", lambda a, b: convolve(a, b, mode="valid"), (x, y[:2, :2].copy())


def special() -> Iterator[Subject]:
    """scipy.special."""
    import autograd.scipy.special as asp

    x, _ = _numbers()
    unit = 1 / (1 + np.exp(-x))
    inside = {
        "logit",
        "y0",
        "y1",
        "gammaln",
        "digamma",
        "psi",
        "gamma",
        "rgamma",
        "erfcinv",
        "gammasgn",
    }
    for name in SPECIAL.split():
        if hasattr(asp, name):
            at = unit if name in inside else np.tanh(x) if name == "erfinv" else x
            yield f"special.{name}", getattr(asp, name), (at,)
    yield "special.logsumexp with weights", lambda a: asp.logsumexp(a, 1, b=unit), (x,)
    yield (
        "special.logsumexp with −inf",
        lambda a: asp.logsumexp(a, 1),
        (np.where(unit > 0.7, -np.inf, x),),
    )
    for name in ("jn", "jv", "yn", "iv", "ive"):
        if hasattr(asp, name):
            yield f"special.{name}", partial(getattr(asp, name), 2), (unit + 1,)
    yield "special.polygamma", lambda a: asp.polygamma(1, a), (unit + 1,)
    yield "special.multigammaln", lambda a: asp.multigammaln(a, 2), (unit + 1,)
    for name in ("beta", "betaln"):
        if hasattr(asp, name):
            yield f"special.{name}", getattr(asp, name), (unit + 1, unit.T + 0.5)
    for name in ("gammainc", "gammaincc"):
        if hasattr(asp, name):
            yield f"special.{name}", partial(getattr(asp, name), 2.5), (unit + 1,)
    if hasattr(asp, "betainc"):
        yield "special.betainc", lambda a: asp.betainc(1.5, 2.5, a), (unit,)


def distributions() -> Iterator[Subject]:
    """scipy.stats, in the variable and the parameters that are real numbers."""
    from autograd.scipy.stats import (
        beta,
        chi2,
        dirichlet,
        gamma,
        multivariate_normal,
        norm,
        poisson,
        t,
    )  # fmt: skip

    x, _ = _numbers()
    unit, positive = 1 / (1 + np.exp(-x)), np.exp(x)
    for name in ("pdf", "cdf", "logpdf", "logcdf", "sf", "logsf"):
        yield f"norm.{name}", getattr(norm, name), (x, x.T / 3, unit + 0.5)
    for name in ("pdf", "cdf", "logpdf", "logcdf"):
        yield (
            f"t.{name}",
            _after(getattr(t, name), 4.0),
            (x, x.T / 3, unit + 0.5),
        )
    for name in ("pdf", "cdf", "logpdf"):
        yield f"gamma.{name}", _after(getattr(gamma, name), 2.5), (positive,)
        yield f"chi2.{name}", _after(getattr(chi2, name), 3.0), (positive,)
        yield f"beta.{name}", _after(getattr(beta, name), 1.5, 2.5), (unit,)
    for name in ("pdf", "logpdf"):
        yield f"beta.{name} of its parameters", getattr(beta, name), (unit, unit + 1, unit.T + 0.5)
        yield f"gamma.{name} of its parameter", getattr(gamma, name), (positive, unit + 1)
    k = np.arange(9.0).reshape(3, 3)
    for name in ("pmf", "logpmf", "cdf"):
        yield f"poisson.{name}", partial(getattr(poisson, name), k), (positive,)
    spd = x @ x.T + np.eye(3)
    for name in ("pdf", "logpdf"):
        density = getattr(multivariate_normal, name)
        yield f"multivariate_normal.{name}", density, (x[0].copy(), x[1].copy(), spd)
        yield (
            f"dirichlet.{name}",
            getattr(dirichlet, name),
            (np.array([0.2, 0.3, 0.5]), unit[0] + 1),
        )
    yield (
        "multivariate_normal.entropy",
        lambda c: multivariate_normal.entropy(np.zeros(3), c),
        (spd,),
    )


def odes() -> Iterator[Subject]:
    """scipy.integrate."""
    from autograd.scipy.integrate import odeint

    def run(y: Any, rate: Any) -> Any:
        return odeint(
            lambda y, t, r: -r * y, y, np.linspace(0, 1, 4), (rate,), rtol=1e-11, atol=1e-12
        )

    yield "odeint", run, (np.array([1.0, 2.0]), np.array([0.5, 1.5]))


GROUPS = (
    of_one_array,
    of_two_arrays,
    with_options,
    matrices,
    transforms,
    special,
    distributions,
    odes,
)


def watched(seen: set[int]) -> dict[int, str]:
    """Every function that autograd has a product for; whose is asked is noted in `seen`."""
    from autograd.core import primitive_vjps

    names = {}
    for key, (function, maker) in enumerate(list(primitive_vjps.items())):

        def noted(*given: Any, key: int = key, maker: Any = maker) -> Any:
            seen.add(key)
            return maker(*given)

        primitive_vjps[function] = noted
        inner: Any = getattr(function, "fun", function)
        names[key] = (
            f"{getattr(inner, '__module__', '') or 'special'}.{getattr(inner, '__name__', inner)}"
        )
    return names


def judged(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, str]:
    """The verdict and the first line of what is wrong."""
    from autograd.builtins import tuple as traced
    from autograd.core import make_vjp

    def forward(*given: Any) -> Any:
        y = function(*given)
        return tuple(map(np.asarray, y)) if isinstance(y, tuple) else np.asarray(y)

    def backward(dy: Any, *given: Any) -> tuple[Any, ...]:
        def one(i: int) -> Any:
            def alone(v: Any) -> Any:
                y = function(*given[:i], v, *given[i + 1 :])
                return traced(y) if isinstance(y, tuple) else y

            return np.asarray(make_vjp(alone, given[i])[0](dy))

        return tuple(one(i) for i in range(len(given)))

    try:
        result = gradcheck(forward, backward, args, ranks=False)
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}".splitlines()[0]
    return result.verdict, str(result).splitlines()[1].strip()


def main() -> None:
    """One line per function that does not pass, the counts, and what was never asked."""
    import autograd.numpy
    import autograd.scipy.integrate
    import autograd.scipy.linalg
    import autograd.scipy.signal
    import autograd.scipy.special
    import autograd.scipy.stats  # noqa: F401

    warnings.simplefilter("ignore")
    seen: set[int] = set()
    names, counts = watched(seen), dict[str, int]()
    for group in GROUPS:
        for name, function, args in group():
            verdict, report = judged(function, args)
            counts[verdict] = counts.get(verdict, 0) + 1
            if verdict != "passed":
                print(f"{name}: {verdict}: {report[:300]}", flush=True)
    print(counts)
    print(f"{len(seen)} of {len(names)} products asked; not asked:")
    print(", ".join(sorted(name for key, name in names.items() if key not in seen)))


if __name__ == "__main__":
    main()
