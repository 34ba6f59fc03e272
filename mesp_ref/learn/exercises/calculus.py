"""Questions about one derivative: a graph of scalars, LayerNorm, a blind cotangent, where eps stands."""

import math
from typing import Any

import numpy as np

from mesp_ref.learn.exercise import Case, Given, Outputs, Wrong
from mesp_ref.learn.exercises.question import question, sizes
from mesp_ref.ops import Array


def logistic_bwd(w: float, x: float) -> float:
    """One derivative by hand.

    Asked     L = log(1 + exp(−w·x)) as a graph: a = w·x, b = exp(−a), c = 1 + b, L = log c. dw = ∂L/∂w?
    Shapes    w, x numbers -> dw a number
    Answer    dc = 1/c, db = dc, da = −b·db, dw = x·da, which is −x·σ(−w·x)
    """
    return -x / (1 + math.exp(w * x))


def _logistic(g: Given, m: Wrong) -> Outputs:
    a = m.pick(g.w * g.x, exponent_sign=-g.w * g.x, no_x_in_a=g.w)
    b = math.exp(-a)
    c = m.pick(1 + b, c_is_b=b)
    db = m.pick(1 / c, no_log=1.0, log_value=math.log(c))
    da = m.pick(-b * db, no_exp=-db, slope_of_sigmoid=-b * db / c, no_minus=b * db)
    dw = m.pick(g.x * da, no_inner=da, of_x=g.w * da, x_twice=g.x * g.x * da)
    return {"dw": m.pick(dw, value=math.log(c), half=dw / 2, zero=0.0)}


LOGISTIC = question(
    logistic_bwd,
    "one derivative by hand: a graph of scalars",
    outputs="dw",
    cases=(
        sizes("stated", "w = 1, x = 2", w=1.0, x=2.0),
        sizes("negative", "w = −0.5, x = 3", w=-0.5, x=3.0),
        sizes("both", "w = 0.7, x = −1.3", w=0.7, x=-1.3),
    ),
    formula=_logistic,
    hints=(
        "Go back node by node: what does c receive from L, b from c, a from b, w from a?",
        "dc = 1/c; db = dc; the slope of exp(−a) is −exp(−a) = −b.",
    ),
    mistakes={
        "exponent_sign": "the slope of exp(−a) is −b: its factor b = exp(−w·x) is missing, or b has the wrong sign in the exponent; −x·σ(w·x) stands where −x·σ(−w·x) belongs.",
        "no_x_in_a": "a is w alone: a = w·x.",
        "c_is_b": "the 1 in c = 1 + b is missing: dc is 1/c, not 1/b.",
        "no_log": "the logarithm's slope 1/c is missing: dc = 1/c.",
        "log_value": "log c stands where its slope 1/c belongs.",
        "no_exp": "the slope of exp(−a) is −b: its factor b = exp(−w·x) is missing, or b has the wrong sign in the exponent; −x·σ(w·x) stands where −x·σ(−w·x) belongs.",
        "slope_of_sigmoid": "it holds 1/c twice (1/c², as in the slope of the sigmoid): the logarithm gives it once.",
        "no_minus": "the sign is wrong: the minus of exp(−a) is missing.",
        "no_inner": "the inner derivative is missing: a = w·x, so dw = x·da.",
        "of_x": "this is dx, the derivative with respect to x: dw holds x, not w.",
        "x_twice": "the factor x stands twice.",
        "value": "this is the value of L itself, not its slope.",
        "half": "it is half of what it must be: no square is derived here.",
        "zero": "it is 0.",
    },
)


def layernorm_bwd(dy: Array, x: Array, w: Array, *, eps: float) -> Array:
    """LayerNorm, which also subtracts the mean.

    Forward   c = x − mean(x), σ = √(mean(c²) + eps) over the last axis;  y = w ⊙ c/σ
    Backward  u = dy ⊙ w;  dx = (u − mean(u))/σ − c·mean(u ⊙ c)/σ³
    Shapes    x, dy [..., C], w [C] -> dx [..., C]
    Source    Ba, Kiros & Hinton 2016
    """
    centred = x - x.mean(axis=-1, keepdims=True)
    sigma = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    u = dy * w
    along = np.mean(u * centred, axis=-1, keepdims=True)
    dx: Array = (u - u.mean(axis=-1, keepdims=True)) / sigma - centred * along / sigma**3
    return dx


def _mean(a: Array) -> Array:
    found: Array = a.mean(axis=-1, keepdims=True)
    return found


def _layernorm(g: Given, m: Wrong) -> Outputs:
    c = m.pick(g.x - _mean(g.x), not_centred=g.x)
    square, width = _mean(c * c), g.x.shape[-1]
    sigma = m.pick(
        np.sqrt(square + g.eps), eps_outside=np.sqrt(square) + g.eps, no_eps=np.sqrt(square),
        unbiased=np.sqrt(square * width / (width - 1) + g.eps), no_root=square + g.eps,
    )  # fmt: skip
    u = m.pick(g.dy * g.w, no_weight=g.dy)
    shift = m.pick(
        _mean(u), no_shift=0.0, shift_of_dy=_mean(g.dy), shift_sum=u.sum(-1, keepdims=True)
    )
    other = m.pick(c, x_outside=g.x)
    along = m.pick(
        _mean(u * c), along_sum=(u * c).sum(-1, keepdims=True), along_of_x=_mean(u * g.x),
        along_of_dy=_mean(g.dy * c),
    )  # fmt: skip
    power = m.pick(sigma**3, sigma_2=sigma**2, sigma_1=sigma)
    second = m.pick(other * along / power, no_second=0.0, second_added=-other * along / power)
    return {"dx": m.pick((u - shift) / sigma - second, no_sigma=(u - shift) - second, negated=second - (u - shift) / sigma, passed_on=g.dy)}  # fmt: skip


def _rows(name: str, note: str, shape: tuple[int, ...], eps: float, size: float = 1.0) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        dy, x = rng.standard_normal((2, *shape))
        return {"dy": dy, "x": size * (x + 0.6), "w": 1 + 0.3 * rng.standard_normal(shape[-1]), "eps": eps}  # fmt: skip

    return Case(name, note, draw)


_ROWS = (
    _rows("small", "two rows of three", (2, 3), 1e-2),
    _rows("longer", "rows of seven in a batch", (2, 4, 7), 1e-3),
    _rows("tiny", "entries of a hundredth: eps counts", (3, 5), 1e-3, 1e-2),
)
LAYERNORM = question(
    layernorm_bwd,
    "LayerNorm: two things that all outputs share",
    outputs="dx",
    cases=_ROWS,
    formula=_layernorm,
    hints=(
        "Each x_c reaches the loss directly, through the mean, and through σ.",
        "The path through the mean takes mean(u) away; the path through σ takes the part along c away.",
    ),
    mistakes={
        "not_centred": "the mean is not subtracted: this is the backward of RMSNorm.",
        "eps_outside": "eps stands outside the root: σ = √(mean(c²) + eps).",
        "no_eps": "eps is missing in σ.",
        "unbiased": "σ is formed with C − 1 (ddof=1, unbiased): LayerNorm divides by C.",
        "no_root": "the root in σ is missing.",
        "no_weight": "the weight w is missing in u = dy ⊙ w.",
        "no_shift": "the term of the mean is missing: mean(u) must be subtracted from u.",
        "shift_of_dy": "the mean of dy is subtracted where that of u = dy ⊙ w belongs.",
        "shift_sum": "the sum of u is subtracted where its mean belongs.",
        "x_outside": "x itself stands where the centred c = x − mean(x) belongs in the second term.",
        "along_sum": "the sum of u ⊙ c stands where its mean belongs (divided by C).",
        "along_of_x": "mean(u ⊙ x) stands where mean(u ⊙ c) belongs: c is centred.",
        "along_of_dy": "the weight w is missing in mean(u ⊙ c).",
        "sigma_2": "σ² stands where σ³ belongs in the second term.",
        "sigma_1": "σ stands where σ³ belongs in the second term.",
        "no_second": "the second term is missing: the path through σ, along c.",
        "second_added": "the second term has the wrong sign: it is added.",
        "no_sigma": "the first term is not divided by σ.",
        "negated": "dx has the wrong sign.",
        "passed_on": "dx is dy itself.",
    },
)


def blind_spot(dy: Array, p: Array) -> float:
    """How wrong a softmax backward is that returns zeros.

    Asked     p = softmax(z). A backward returns dz = 0. How long is the error |dz| that it makes with
              the cotangent dy? For dy = 1 it is 0, whatever p is: such a check sees nothing.
    Shapes    dy, p [K] -> a number: the Euclidean length of the right dz
    Answer    dz = p ⊙ (dy − Σ dy·p);  |dz| = √(Σ dz²)
    """
    dz = p * (dy - np.sum(dy * p))
    return float(np.sqrt(np.sum(dz * dz)))


def _blind(g: Given, m: Wrong) -> Outputs:
    dot = m.pick(np.sum(g.dy * g.p), no_row_sum=0.0, plain_mean=g.dy.mean(), plain_sum=g.dy.sum())
    dz = m.pick(g.p, no_p=1.0, root_p=np.sqrt(g.p), one_minus=1 - g.p) * (g.dy - dot)
    return {"length": m.pick(
        np.sqrt(np.sum(dz * dz)), squared=np.sum(dz * dz), largest=np.abs(dz).max(), root_mean=np.sqrt(np.mean(dz * dz)),
        one_norm=np.abs(dz).sum(), summed=np.sum(dz), of_dy=np.sqrt(np.sum(g.dy**2)), zero=0.0, one=1.0, diagonal=np.linalg.norm(g.dy * g.p * (1 - g.p)),
    )}  # fmt: skip


def _probabilities(name: str, note: str, size: int, ones: bool = False) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        e = np.exp(rng.standard_normal(size))
        return {"dy": np.ones(size) if ones else rng.standard_normal(size), "p": e / e.sum()}

    return Case(name, note, draw)


BLIND = question(
    blind_spot,
    "what a cotangent of ones cannot see",
    outputs="length",
    cases=(
        _probabilities("small", "three keys", 3),
        _probabilities("longer", "eight keys", 8),
        _probabilities("ones", "dy = 1: the error is 0", 5, ones=True),
    ),
    formula=_blind,
    magnitudes=lambda args, want: {"length": np.linalg.norm(args["p"] * np.abs(args["dy"]))},
    hints=(
        "The error of a backward that returns zeros is the right gradient itself.",
        "dz = p ⊙ (dy − a number that all entries share); then its length.",
    ),
    mistakes={
        "no_row_sum": "the row sum Σ dy·p is missing in dz.",
        "plain_mean": "the plain mean of dy stands where Σ dy·p, weighted by p, belongs.",
        "plain_sum": "the sum of dy stands where Σ dy·p, weighted by p, belongs.",
        "no_p": "the factor p in front of dz is missing.",
        "root_p": "√p stands where p belongs: this is the standard deviation of dy under p.",
        "one_minus": "1 − p stands where p belongs.",
        "squared": "the root is missing: it is the squared length.",
        "largest": "it is the largest entry of dz: its Euclidean length is asked for.",
        "root_mean": "it is the root of the mean square: the length is the root of the sum.",
        "one_norm": "it is the sum of absolute entries: the length is the root of the sum of squares.",
        "summed": "the entries of dz are added up: their sum is always 0, because signs cancel.",
        "of_dy": "it is the length of dy itself, of the cotangent.",
        "zero": "it is 0: that holds for dy = 1 only.",
        "one": "it is 1 always.",
        "diagonal": "only the diagonal of the Jacobian, p·(1 − p), is there: the row sum Σ dy·p joins all entries.",
    },
)


def eps_outside_bwd(dy: Array, x: Array, w: Array, *, eps: float) -> Array:
    """RMSNorm with eps outside the root, and a backward that fits.

    Forward   n = √mean(x²) + eps over the last axis;  y = w ⊙ x/n
    Backward  u = dy ⊙ w;  dx = u/n − x·mean(u ⊙ x)/(n²·√mean(x²))
    Shapes    x, dy [..., C], w [C] -> dx [..., C]
    """
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    n, u = root + eps, dy * w
    dx: Array = u / n - x * np.mean(u * x, axis=-1, keepdims=True) / (n * n * root)
    return dx


def _outside(g: Given, m: Wrong) -> Outputs:
    square = _mean(g.x * g.x)
    root = m.pick(np.sqrt(square), no_root=square)
    n = m.pick(root + g.eps, eps_inside=np.sqrt(square + g.eps), no_eps=root)
    u = m.pick(g.dy * g.w, no_weight=g.dy)
    along = m.pick(
        _mean(u * g.x), along_sum=(u * g.x).sum(-1, keepdims=True), along_of_dy=_mean(g.dy * g.x)
    )
    under = m.pick(n * n * root, all_n=n**3, n_2=n * n, all_root=root**3, n_root_2=n * root * root, n_1=n, n_root=n * root)  # fmt: skip
    second = m.pick(g.x * along / under, no_second=0.0, second_added=-g.x * along / under)
    second = np.zeros_like(g.x) + second
    first = m.pick(u / n, not_divided=u)
    dx = m.pick(first - second, first_over_root=u / root - second, negated=second - first)
    as_inside = m.pick(None, eps_inside_all=np.sqrt(square + g.eps))
    return {"dx": dx if as_inside is None else u / as_inside - g.x * along / as_inside**3}


OUTSIDE = question(
    eps_outside_bwd,
    "RMSNorm with eps outside the root",
    outputs="dx",
    cases=_ROWS,
    formula=_outside,
    hints=(
        "Only ∂n/∂x changes: derive √mean(x²) itself.",
        "∂n/∂x_c = x_c/(C·√mean(x²)): the root in it has no eps.",
    ),
    mistakes={
        "all_n": "n³ stands under the second term, as where eps is inside the root: here it is n²·√mean(x²).",
        "eps_inside_all": "it is the backward for eps inside the root: n = √mean(x²) + eps here.",
        "eps_inside": "eps is put inside the root of n: here n = √mean(x²) + eps.",
        "no_eps": "eps is missing in n.",
        "no_root": "the root of mean(x²) is missing.",
        "n_2": "n² stands under the second term: the factor √mean(x²), of the root's slope, is missing.",
        "n_1": "n stands under the second term where n²·√mean(x²) belongs.",
        "n_root": "n·√mean(x²) stands under the second term where n²·√mean(x²) belongs: a power of n is missing.",
        "all_root": "root³ stands under the second term: eps is missing in two of the three factors, n²·root.",
        "n_root_2": "n·root² stands under the second term where n²·root belongs.",
        "no_weight": "the weight w is missing in u = dy ⊙ w.",
        "along_sum": "the sum of u ⊙ x stands where its mean belongs (divided by C).",
        "along_of_dy": "the weight w is missing in mean(u ⊙ x).",
        "no_second": "the second term is missing: the part along x.",
        "second_added": "the second term has the wrong sign: it is added.",
        "not_divided": "the first term is not divided by n.",
        "first_over_root": "eps is missing in the first term: u/n, not u over the root.",
        "negated": "dx has the wrong sign.",
    },
)


def eps_noticed(rtol: float, eps: float) -> float:
    """Where a forgotten eps is noticed.

    Asked     A backward of RMSNorm takes n = √mean(x²), without eps. Its 1/n is then too large. Below
              which size √mean(x²) is it off by more than a relative rtol, so that a test can notice?
    Shapes    rtol, eps numbers -> the size, a number
    Answer    √(mean(x²) + eps)/√mean(x²) > 1 + rtol where mean(x²) < eps/((1 + rtol)² − 1): the root of that
    """
    return math.sqrt(eps / ((1 + rtol) ** 2 - 1))


def _noticed(g: Given, m: Wrong) -> Outputs:
    r = g.rtol
    grown = m.pick(
        (1 + r) ** 2 - 1, first_order=2 * r, no_square=r, square_alone=r * r, no_minus_1=(1 + r) ** 2,
        too_small=1 - (1 - r) ** 2, other_base=1 / (1 - r) ** 2 - 1, one=1.0,
    )  # fmt: skip
    ratio = m.pick(g.eps / grown, upside_down=grown / g.eps, multiplied=g.eps * grown)
    return {"size": m.pick(
        math.sqrt(ratio), no_root=ratio, rtol_rooted=g.eps / math.sqrt(grown), eps_rooted=math.sqrt(g.eps) / grown, fourth_root=ratio**0.25,
    )}  # fmt: skip


NOTICED = question(
    eps_noticed,
    "the scale at which a forgotten eps shows",
    outputs="size",
    cases=(
        sizes("loose", "rtol = 0.1, eps = 1e-5", rtol=0.1, eps=1e-5),
        sizes("looser", "rtol = 0.5, eps = 1e-6", rtol=0.5, eps=1e-6),
        sizes("large", "rtol = 0.03, eps = 0.2", rtol=0.03, eps=0.2),
    ),
    formula=_noticed,
    hints=(
        "Write the ratio of the two 1/n: √(mean(x²) + eps) over √mean(x²).",
        "Set the ratio equal to 1 + rtol, square it, and solve for mean(x²). Then the root.",
    ),
    mistakes={
        "first_order": "it is the first order in rtol, eps/(2·rtol): exact is (1 + rtol)² − 1.",
        "no_square": "the square is missing: (1 + rtol)² − 1, about 2·rtol, not rtol; the root halves relative errors.",
        "square_alone": "rtol² stands where (1 + rtol)² − 1 belongs: the cross term 2·rtol is missing.",
        "no_minus_1": "the − 1 is missing in (1 + rtol)² − 1.",
        "too_small": "1 − (1 − rtol)² stands where (1 + rtol)² − 1 belongs: a forgotten eps makes 1/n too large, not too small; the sign.",
        "other_base": "the error is taken relative to the wrong 1/n (1/(1 − rtol)² − 1): it is relative to the right one.",
        "one": "rtol is missing.",
        "upside_down": "it is upside down: eps is divided by (1 + rtol)² − 1.",
        "multiplied": "eps is multiplied where it must be divided by (1 + rtol)² − 1.",
        "no_root": "the square root is missing: this is mean(x²), not its root.",
        "rtol_rooted": "the root of eps is missing: the root is of the whole eps/((1 + rtol)² − 1).",
        "eps_rooted": "only eps is under the root: the root is of the whole eps/((1 + rtol)² − 1).",
        "fourth_root": "the root is taken twice.",
    },
)
