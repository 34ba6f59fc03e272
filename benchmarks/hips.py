"""gradcheck over the vector-Jacobian products of HIPS autograd: python benchmarks/hips.py

Every function below is checked at ordinary values inside its domain and, where 0 belongs to that,
at values with exact zeros and ties. Needs the extra `checkers`.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mesp_ref.verify import gradcheck

ANYWHERE = """
    abs arctan arcsinh cos cosh exp exp2 expm1 negative sin sinc sinh square tan
    tanh cumsum diff fabs max min mean median std var sum prod sort ravel flipud
    fliplr rot90 transpose tril triu real diagonal trace squeeze
"""
POSITIVE = """
    sqrt log log2 log10 log1p reciprocal
"""
INSIDE = """
    arcsin arccos arctanh
"""
BINARY = """
    add subtract multiply divide maximum minimum logaddexp arctan2 hypot power dot
    outer
"""
SQUARE = """
    linalg.inv linalg.det linalg.norm linalg.cholesky
"""
SPECIAL = """
    gammaln digamma erf erfc expit logit i0 i1 j0 j1 y0 y1 logsumexp
"""


def subjects() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Name, function and arguments."""
    import autograd.numpy as anp
    import autograd.scipy.special as asp

    rng = np.random.default_rng(0)
    x, tied = rng.standard_normal((3, 3)), np.array([[0.0, 1, 1], [0, 0, 2], [-1, 3, 3]])
    for name in ANYWHERE.split():
        if hasattr(anp, name):
            yield name, getattr(anp, name), (x,)
            yield f"{name} with zeros and ties", getattr(anp, name), (tied,)
    for name in POSITIVE.split():
        yield name, getattr(anp, name), (np.abs(x) + 0.1,)
    for name in INSIDE.split():
        yield name, getattr(anp, name), (np.tanh(x),)
    for name in BINARY.split():
        if hasattr(anp, name):
            yield name, getattr(anp, name), (np.abs(x) + 0.1, x.T.copy())
            yield f"{name} broadcast", getattr(anp, name), (np.abs(x) + 0.1, x[0].copy())
    spd = x @ x.T + np.eye(3)
    for name in SQUARE.split():
        yield name, getattr(anp.linalg, name.split(".")[1]), (spd,)
    for name in SPECIAL.split():
        if hasattr(asp, name):
            inside = (
                1 / (1 + np.exp(-x)) if name in ("logit", "y0", "y1", "gammaln", "digamma") else x
            )
            yield f"special.{name}", getattr(asp, name), (inside,)


def main() -> None:
    """One line per function that does not pass, and the count."""
    from autograd.core import make_vjp

    warnings.simplefilter("ignore")
    counts: dict[str, int] = {}
    for name, function, args in subjects():

        def backward(dy: Any, *given: Any, function: Any = function) -> tuple[Any, ...]:
            vjps = (
                make_vjp(lambda v, i=i: function(*given[:i], v, *given[i + 1 :]), given[i])[0]
                for i in range(len(given))
            )
            return tuple(np.asarray(vjp(dy)) for vjp in vjps)

        try:
            result = gradcheck(lambda *a, f=function: np.asarray(f(*a)), backward, args)
            verdict, report = result.verdict, str(result).splitlines()[1].strip()
        except Exception as error:
            verdict, report = "error", f"{type(error).__name__}: {error}".splitlines()[0]
        counts[verdict] = counts.get(verdict, 0) + 1
        if verdict != "passed":
            print(f"{name}: {verdict}: {report[:220]}")
    print(counts)


if __name__ == "__main__":
    main()
