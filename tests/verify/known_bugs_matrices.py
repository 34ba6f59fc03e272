"""Mistakes of matrices and transforms: singular, degenerate, wide, odd, with repeated indices."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from known_bugs import Known, drawn, numbers, quiet
from scipy import linalg

from mesp_ref.verify import strategies
from mesp_ref.verify.drawn import arguments

_X = numbers(3, 3)
_SQUARE = drawn(lambda draw: (lambda n: (draw(strategies.values((n, n), (1.0,))),))(
    draw(st.integers(1, 4))))  # fmt: skip
_ROWS = arguments("n c")


def cofactors(x: Any) -> Any:
    assert x.ndim == 2
    made = np.ones_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            rest = np.delete(np.delete(x, i, 0), j, 1)
            made[i, j] = (-1) ** (i + j) * (np.linalg.det(rest) if len(rest) else 1)
    return made


def solid(draw: st.DrawFn) -> Any:
    """A square matrix that has an inverse."""
    n = draw(st.integers(1, 4))
    x = draw(strategies.values((n, n), (1.0,)))
    return x + (np.abs(x).sum(-1).max() + 0.5) * np.eye(n)


def system(draw: st.DrawFn) -> tuple[Any, ...]:
    a = solid(draw)
    return a, draw(strategies.values((len(a), draw(st.integers(1, 3)))))


def solve_bwd(dy: Any, a: Any, b: Any, transposed: bool = True) -> Any:
    g = np.linalg.solve(a.T if transposed else a, dy)
    return -g @ np.linalg.solve(a, b).T, g


def lower(a: Any, b: Any) -> Any:
    return linalg.solve_triangular(a, b, lower=True)


def lower_bwd(dy: Any, a: Any, b: Any, masked: bool = True) -> Any:
    g = linalg.solve_triangular(a.T, dy, lower=False)
    da = -g @ lower(a, b).T
    return np.tril(da) if masked else da, g


def root(x: Any) -> Any:
    """Cholesky factor of x·xᵀ + 1."""
    return np.linalg.cholesky(x @ x.T + np.eye(len(x)))


def root_bwd(dy: Any, x: Any, half: bool = True) -> Any:
    low = root(x)
    phi = np.tril(low.T @ dy)
    if half:
        phi[np.diag_indices(len(x))] /= 2
    inverse = np.linalg.inv(low)
    s = inverse.T @ phi @ inverse
    return (s + s.T) @ x


def of_symmetric(x: Any) -> Any:
    """V·exp(λ)·Vᵀ of the symmetric part."""
    values, vectors = np.linalg.eigh((x + x.T) / 2)
    return vectors * np.exp(values) @ vectors.T


def of_symmetric_bwd(dy: Any, x: Any, safe: bool = True) -> Any:
    values, v = np.linalg.eigh((x + x.T) / 2)
    e, gap = np.exp(values), values[:, None] - values[None]
    near = np.abs(gap) < 1e-4
    middle = np.exp((values[:, None] + values[None]) / 2)
    close = middle * (1 + gap**2 / 24)
    quotient = (e[:, None] - e[None]) / (np.where(near, 1, gap) if safe else gap)
    loewner = np.where(near, close, quotient) if safe else np.where(
        np.eye(len(x)) > 0, e[:, None], quotient)  # fmt: skip
    g = v @ (loewner * (v.T @ dy @ v)) @ v.T
    return (g + g.T) / 2


def largest(x: Any) -> Any:
    return np.linalg.svd(x, compute_uv=False)[..., :1]


def largest_bwd(dy: Any, x: Any, wide: bool = True) -> Any:
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    g = dy[0] * np.outer(u[:, 0], vt[0])
    return g if wide else g.T.reshape(x.shape)


def spectrum(x: Any) -> Any:
    y = np.fft.rfft(x, axis=-1)
    return np.stack([y.real, y.imag])


def spectrum_bwd(dy: Any, x: Any, odd: bool = True) -> Any:
    """Σ_k dRe·cos − dIm·sin, by an inverse transform whose middle terms count twice."""
    n = x.shape[-1]
    twice = np.full(dy.shape[-1], 0.5)
    twice[0] = 1
    if n % 2 == 0 or not odd:
        twice[-1] = 1
    return n * np.fft.irfft((dy[0] + 1j * dy[1]) * twice, n, -1)


def back(re: Any, im: Any, n: int) -> Any:
    return np.fft.irfft(re + 1j * im, n, -1)


def back_bwd(dy: Any, re: Any, im: Any, n: int, twice: bool = True) -> Any:
    g = np.fft.rfft(dy, axis=-1) / n
    count = np.full(g.shape[-1], 2.0)
    count[0] = 1
    if n % 2 == 0 or not twice:
        count[-1] = 1
    flow = g * count
    imaginary = flow.imag.copy()
    imaginary[..., 0] = 0
    if n % 2 == 0:
        imaginary[..., -1] = 0
    return flow.real, imaginary


def halves(draw: st.DrawFn) -> tuple[Any, ...]:
    n = draw(st.integers(1, 9))
    one = strategies.values((2, n // 2 + 1), (1.0,))
    return draw(one), draw(one), n


def product(a: Any, b: Any, c: Any, d: Any) -> Any:
    """(a + ib)·(c + id)"""
    return a * c - b * d, a * d + b * c


def product_bwd(dy: Any, a: Any, b: Any, c: Any, d: Any, conj: bool = True) -> Any:
    s = 1 if conj else -1
    return (dy[0] * c + s * dy[1] * d, -s * dy[0] * d + dy[1] * c,
            dy[0] * a + s * dy[1] * b, -s * dy[0] * b + dy[1] * a)  # fmt: skip


def four(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = draw(strategies.shapes(1))
    return tuple(draw(strategies.values(shape, (1.0,))) for _ in range(4))


def quadratic(x: Any, a: Any) -> Any:
    return np.einsum("ni,ij,nj->n", x, a, x)


def quadratic_bwd(dy: Any, x: Any, a: Any, both: bool = True) -> Any:
    up = dy[:, None]
    dx = up * (x @ a.T + x @ a) if both else 2 * up * (x @ a)
    return dx, np.einsum("n,ni,nj->ij", dy, x, x)


def form(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c = draw(strategies.shapes(2, 4))
    return draw(strategies.values((n, c))), draw(strategies.values((c, c)))


def volume(x: Any) -> Any:
    return np.linalg.slogdet(x)[1]


def one_long(x: Any, w: Any) -> Any:
    return x @ w


def one_long_bwd(dy: Any, x: Any, w: Any, outer: bool = True) -> Any:
    dx = w @ dy if w.ndim == 2 else w * dy
    dw = (
        np.multiply.outer(x, dy)
        if outer or w.ndim == 1
        else np.multiply.outer(dy, x).reshape(w.shape)
    )
    return dx, dw


def row_and_matrix(draw: st.DrawFn) -> tuple[Any, ...]:
    n, c = draw(strategies.shapes(2))
    return draw(strategies.values((n,))), draw(strategies.values((n, c)))


def kron_bwd(dy: Any, a: Any, b: Any, right: bool = True) -> Any:
    (m, n), (p, q) = a.shape, b.shape
    parts = dy.reshape(m, p, n, q) if right else dy.reshape(p, m, q, n).transpose(1, 0, 3, 2)
    return np.einsum("mpnq,pq->mn", parts, b), np.einsum("mpnq,mn->pq", parts, a)


def two_matrices(draw: st.DrawFn) -> tuple[Any, ...]:
    m, n, p, q = draw(strategies.shapes(4, 3))
    return draw(strategies.values((m, n))), draw(strategies.values((p, q)))


def exp_bwd(dy: Any, x: Any) -> Any:
    return linalg.expm_frechet(x.T, dy, compute_expm=False)


def pinv_bwd(dy: Any, x: Any, whole: bool = True) -> Any:
    p = np.linalg.pinv(x)
    n, m = x.shape
    g = -p.T @ dy @ p.T
    if whole:
        g = g + (np.eye(n) - x @ p) @ dy.T @ (p @ p.T)
        g = g + (p.T @ p) @ dy.T @ (np.eye(m) - p @ x)
    return g


def full_rank(draw: st.DrawFn) -> tuple[Any, ...]:
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    x = draw(strategies.values((n, m), (1.0,))) / 4
    return (x + 2 * np.eye(n, m),)


KNOWN = (
    Known(
        "determinant of a singular matrix",
        np.linalg.det,
        lambda d, x: d * cofactors(x),
        lambda d, x: (
            d * np.linalg.det(x) * np.linalg.inv(x + 1e-30 * np.eye(len(x))).T
            if np.linalg.matrix_rank(x) == len(x)
            else 0 * x
        ),
        (_X,),
        _SQUARE,
    ),
    Known(
        "inverse: the transposes",
        np.linalg.inv,
        lambda d, x: -np.linalg.inv(x).T @ d @ np.linalg.inv(x).T,
        lambda d, x: -np.linalg.inv(x) @ d @ np.linalg.inv(x),
        (np.diag([1.0, 2, 3]),),
        drawn(lambda draw: (solid(draw),)),
    ),
    Known(
        "solve with the matrix itself",
        np.linalg.solve,
        solve_bwd,
        lambda d, a, b: solve_bwd(d, a, b, False),
        (_X @ _X.T + np.eye(3), numbers(3, 2)),
        drawn(system),
    ),
    Known(
        "a triangle's other half",
        lower,
        lower_bwd,
        lambda d, a, b: lower_bwd(d, a, b, False),
        (np.tril(_X) + 3 * np.eye(3), numbers(3, 2)),
        drawn(system),
    ),
    Known(
        "cholesky: half of the diagonal",
        root,
        root_bwd,
        lambda d, x: root_bwd(d, x, False),
        (_X,),
        _SQUARE,
    ),
    Known(
        "eigenvalues that are equal",
        of_symmetric,
        of_symmetric_bwd,
        quiet(lambda d, x: of_symmetric_bwd(d, x, False)),
        (_X,),
        _SQUARE,
    ),
    Known(
        "singular vectors of a wide matrix",
        largest,
        largest_bwd,
        lambda d, x: largest_bwd(d, x, False),
        (_X @ _X.T,),
        drawn(lambda draw: (draw(strategies.values(draw(strategies.shapes(2, 4)))),)),
    ),
    Known(
        "half a spectrum of odd length",
        spectrum,
        spectrum_bwd,
        lambda d, x: spectrum_bwd(d, x, False),
        (numbers(2, 6),),
        _ROWS,
    ),
    Known(
        "and back",
        back,
        back_bwd,
        lambda d, r, i, n: back_bwd(d, r, i, n, False),
        (numbers(2, 4), numbers(2, 4, seed=1), 6),
        drawn(halves),
    ),
    Known(
        "the conjugate",
        product,
        product_bwd,
        lambda d, *a: product_bwd(d, *a, conj=False),
        tuple(numbers(4, seed=k) for k in range(4)),
        drawn(four),
    ),
    Known(
        "a matrix seen twice",
        quadratic,
        quadratic_bwd,
        lambda d, x, a: quadratic_bwd(d, x, a, False),
        (numbers(2, 3), _X + _X.T),
        drawn(form),
    ),
    Known(
        "logarithm of a volume",
        volume,
        lambda d, x: d * np.linalg.inv(x).T,
        lambda d, x: d * np.linalg.inv(x),
        (_X @ _X.T + np.eye(3),),
        drawn(lambda draw: (solid(draw),)),
    ),
    Known(
        "a row times a matrix",
        one_long,
        one_long_bwd,
        lambda d, x, w: one_long_bwd(d, x, w, False),
        (np.ones(3), _X),
        drawn(row_and_matrix),
    ),
    Known(
        "kronecker: which block",
        np.kron,
        kron_bwd,
        lambda d, a, b: kron_bwd(d, a, b, False),
        (numbers(1, 2), numbers(1, 2, seed=1)),
        drawn(two_matrices),
    ),
    Known(
        "exponential of a matrix",
        linalg.expm,
        exp_bwd,
        lambda d, x: linalg.expm(x).T @ d,
        (_X,),
        _SQUARE,
    ),
    Known(
        "pseudo-inverse of a tall matrix",
        np.linalg.pinv,
        pinv_bwd,
        lambda d, x: pinv_bwd(d, x, False),
        (_X + 3 * np.eye(3),),
        drawn(full_rank),
    ),
    Known(
        "trace of a product",
        lambda a, b: np.trace(a @ b),
        lambda d, a, b: (d * b.T, d * a.T),
        lambda d, a, b: (d * b.reshape(a.shape), d * a.reshape(b.shape)),
        (_X + _X.T, _X @ _X.T),
        drawn(
            lambda draw: (lambda n: (draw(strategies.values(n)), draw(strategies.values(n[::-1]))))(
                draw(strategies.shapes(2))
            )
        ),
    ),
)
