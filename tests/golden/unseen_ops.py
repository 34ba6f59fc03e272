"""Wrong operations that were written before the namer was: what it says of them is its score.

Each row: the cases it is run on, the answer (NumPy, from the formulas, sharing nothing with
`mesp_ref`), and a pattern of the sentences that would be right. Every second row is held out: the
namer is worked on with the others in view (`seen`), and scored on both.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = Any
Answers = dict[str, Array]
Row = tuple[str, str, Callable[[Mapping[str, Array], Any], Answers], str]


class Unseen(NamedTuple):
    """A mistake, the cases it is made in, and what may be said of it."""

    name: str
    cases: tuple[str, ...]
    answer: Callable[[Mapping[str, Array], Any], Answers]
    pattern: re.Pattern[str]
    held_out: bool


# -- norm ------------------------------------------------------------------------------------------


def norm(v: Mapping[str, Array], at: Any, eps: float | None = None) -> tuple[Array, ...]:
    x, w, dy = v["x"], v["w"], v["dy"]
    eps = at["eps"] if eps is None else eps
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x, w, dy, r, dy * w


def norm_of(x: Array, w: Array, dy: Array, r: Array, u: Array) -> Answers:
    dx = u * r - x * (u * x).mean(-1, keepdims=True) * r**3
    return {"y": w * x * r, "dx": dx, "dw": (dy * x * r).reshape(-1, len(w)).sum(0)}


def norm_dx(f: Callable[..., Array]) -> Callable[..., Answers]:
    return lambda v, at: norm_of(*norm(v, at)) | {"dx": f(*norm(v, at))}


def norm_dw(f: Callable[..., Array]) -> Callable[..., Answers]:
    return lambda v, at: norm_of(*norm(v, at)) | {"dw": f(*norm(v, at))}


def norm_r(f: Callable[[Array, float], Array]) -> Callable[..., Answers]:
    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        x, w, dy, _, u = norm(v, at)
        return norm_of(x, w, dy, f(x, at["eps"]), u)

    return answer


def layer_norm(v: Mapping[str, Array], at: Any) -> Answers:
    x, w, dy, _, u = norm(v, at)
    z = x - x.mean(-1, keepdims=True)
    s = 1 / np.sqrt((z**2).mean(-1, keepdims=True) + at["eps"])
    dx = s * (u - u.mean(-1, keepdims=True)) - z * s**3 * (u * z).mean(-1, keepdims=True)
    return {"y": w * z * s, "dx": dx, "dw": (dy * z * s).reshape(-1, len(w)).sum(0)}


def one_plus(v: Mapping[str, Array], at: Any) -> Answers:
    return norm_of(*norm({**v, "w": 1 + v["w"]}, at))


def mean(a: Array) -> Array:
    return a.mean(-1, keepdims=True)


NORM: list[Row] = [
    (
        "layernorm mean in backward",
        "usual nine_tokens eps_1e-6",
        norm_dx(lambda x, w, dy, r, u: u * r - mean(u) * r - x * mean(u * x) * r**3),
        "LayerNorm|mean term|mean of",
    ),
    (
        "n4",
        "usual nine_tokens outlier",
        norm_dx(lambda x, w, dy, r, u: u * r - x * mean(u * x) * r**4),
        r"n⁴|fourth|power",
    ),
    (
        "n2",
        "usual nine_tokens",
        norm_dx(lambda x, w, dy, r, u: u * r - x * mean(u * x) * r**2),
        r"n²|power",
    ),
    (
        "eps outside",
        "usual tiny zero_row",
        norm_r(lambda x, e: 1 / (np.sqrt(mean(x**2)) + e)),
        "outside the root",
    ),
    (
        "no eps",
        "usual tiny nine_tokens",
        norm_r(lambda x, e: 1 / np.sqrt(mean(x**2) + 1e-30)),
        "without eps|eps (is )?(missing|left out)|no eps",
    ),
    ("layernorm", "usual nine_tokens", layer_norm, "LayerNorm|mean (is )?subtracted"),
    (
        "padded channels",
        "usual nine_tokens eps_1e-6",
        norm_r(lambda x, e: 1 / np.sqrt((x**2).sum(-1, keepdims=True) / 8 + e)),
        "padded|channels|divi",
    ),
    (
        "dx over tokens",
        "usual nine_tokens",
        norm_dx(
            lambda x, w, dy, r, u: u * r - x * (u * x).sum(-1, keepdims=True) / x.shape[-2] * r**3
        ),
        "divi|tokens|T for|instead of C",
    ),
    (
        "dw without norm",
        "usual nine_tokens",
        norm_dw(lambda x, w, dy, r, u: (dy * x).reshape(-1, len(w)).sum(0)),
        r"dw.*(x|norm)|without 1/n|not normalised",
    ),
    (
        "dw with y",
        "usual nine_tokens negative_weight",
        norm_dw(lambda x, w, dy, r, u: (dy * w * x * r).reshape(-1, len(w)).sum(0)),
        r"\by\b|weight|output",
    ),
    (
        "dw last batch",
        "usual zero_row",
        norm_dw(lambda x, w, dy, r, u: (dy * x * r)[-1].sum(0)),
        "last (sequence|batch|row)|only|overwrit",
    ),
    ("dx zeros", "usual nine_tokens", norm_dx(lambda x, w, dy, r, u: 0 * x), "zero|× 0"),
    (
        "dw mean",
        "usual nine_tokens",
        norm_dw(lambda x, w, dy, r, u: (dy * x * r).reshape(-1, len(w)).mean(0)),
        "mean|averag|1/|count|rows",
    ),
    ("1+w", "usual nine_tokens", one_plus, r"1 ?\+ ?w|Gemma"),
    ("eps constant", "usual tiny", lambda v, at: norm_of(*norm(v, at, 1e-5)), "eps"),
    (
        "cross term sign",
        "usual nine_tokens",
        norm_dx(lambda x, w, dy, r, u: u * r + x * mean(u * x) * r**3),
        "sign",
    ),
    (
        "bessel",
        "usual nine_tokens",
        norm_r(lambda x, e: 1 / np.sqrt((x**2).sum(-1, keepdims=True) / (x.shape[-1] - 1) + e)),
        r"C ?[−-] ?1|Bessel|unbiased|divi",
    ),
    (
        "dx added to dy",
        "usual nine_tokens",
        lambda v, at: (a := norm_of(*norm(v, at))) | {"dx": a["dx"] + v["dy"]},
        "dy|added|residual|accumulat",
    ),
    (
        "dw twice",
        "usual nine_tokens",
        norm_dw(lambda x, w, dy, r, u: 2 * (dy * x * r).reshape(-1, len(w)).sum(0)),
        "× 2|twice",
    ),
    (
        "dx no weight",
        "usual nine_tokens",
        norm_dx(lambda x, w, dy, r, u: dy * r - x * mean(dy * x) * r**3),
        "weight",
    ),
    (
        "rms for inverse",
        "usual nine_tokens",
        norm_dx(lambda x, w, dy, r, u: u / r - x * mean(u * x) / r**3),
        "invers|1/n|n for",
    ),
    (
        "cross term lost",
        "usual nine_tokens",
        norm_dx(lambda x, w, dy, r, u: u * r),
        "along x|cross term|second term",
    ),
    (
        "sum for mean",
        "usual nine_tokens",
        norm_dx(lambda x, w, dy, r, u: u * r - x * (u * x).sum(-1, keepdims=True) * r**3),
        "sum",
    ),
    (
        "bfloat16 rms",
        "usual nine_tokens",
        norm_r(lambda x, e: to_bfloat(1 / np.sqrt(mean(x**2) + e))),
        "precision|bfloat16|digits",
    ),
    (
        "last token lost",
        "usual nine_tokens",
        norm_dx(
            lambda x, w, dy, r, u: (
                norm_of(x, w, dy, r, u)["dx"] * (np.arange(x.shape[1]) < x.shape[1] - 1)[:, None]
            )
        ),
        "token|zero|from",
    ),
]


def to_bfloat(x: Array) -> Array:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).view(np.float32).astype(np.float64)


# -- rotary ----------------------------------------------------------------------------------------


def turn(x: Array, c: Array, s: Array) -> Array:
    a, b = np.split(x, 2, axis=-1)
    c, s = c[:, None], s[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def rotary(
    f: Callable[..., Array], b: Callable[..., Array] | None = None
) -> Callable[..., Answers]:
    """f(x, cos, sin), with the transpose of a rotation as its backward, or b."""

    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        c, s = v["cos"], v["sin"]
        return {"y": f(v["x"], c, s), "dx": b(v["dy"], c, s) if b else f(v["dy"], c, -s)}

    return answer


def neighbours(x: Array, c: Array, s: Array) -> Array:
    a, b, c, s = x[..., ::2], x[..., 1::2], c[:, None], s[:, None]
    return np.stack([a * c - b * s, b * c + a * s], -1).reshape(x.shape)


def next_angles(x: Array, c: Array, s: Array) -> Array:
    step = np.arctan2(s[1], c[1]) - np.arctan2(s[0], c[0])
    z = (c + 1j * s) * np.exp(1j * np.sign(s[-1] + 2) * step)
    return turn(x, z.real, z.imag)


def angles_of(x: Array, theta: float, start: int) -> tuple[Array, Array]:
    half = x.shape[-1] // 2
    turns = (start + np.arange(x.shape[1]))[:, None] * theta ** (-np.arange(half) / half)
    return np.cos(turns), np.sin(turns)


def signless(x: Array, c: Array, s: Array) -> Array:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * c[:, None] - b * s[:, None], b * c[:, None] - a * s[:, None]], -1)


def other_theta(v: Mapping[str, Array], at: Any) -> Answers:
    start = 2 if v["x"].shape[1] == 4 else 0
    c, s = angles_of(v["x"], 10000.0, start)
    return {"y": turn(v["x"], c, s), "dx": turn(v["dy"], c, -s)}


def half_rotary(x: Array, c: Array, s: Array) -> Array:
    c, s = c.copy(), s.copy()
    c[:, c.shape[1] // 2 :], s[:, c.shape[1] // 2 :] = 1, 0
    return turn(x, c, s)


ROPE: list[Row] = [
    ("interleaved", "usual wide_head far", rotary(neighbours), "neighbour|interleav|even"),
    (
        "sign both ways",
        "usual wide_head one_head",
        rotary(lambda x, c, s: turn(x, c, -s)),
        "sign|other way|backwards|direction|invers",
    ),
    ("one position late", "usual wide_head", rotary(next_angles), "position|token"),
    (
        "not rotated back",
        "usual wide_head far",
        rotary(turn, lambda dy, c, s: dy),
        "without inverse RoPE|not rotated",
    ),
    ("forward again", "usual wide_head", rotary(turn, turn), "forward again|same direction|sign"),
    (
        "cos and sin swapped",
        "usual wide_head",
        rotary(lambda x, c, s: turn(x, s, c), lambda x, c, s: turn(x, s, -c)),
        "swap|exchang|cos",
    ),
    ("partial", "usual wide_head", rotary(half_rotary), "partial|half|part of"),
    ("position 0", "usual wide_head", rotary(lambda x, c, s: turn(x, c[:1], s[:1])), "position"),
    ("theta 10000", "usual wide_head", other_theta, "theta|angle|frequenc"),
    ("no sign in the second", "usual wide_head", rotary(signless), "sign"),
    ("identity", "usual wide_head", rotary(lambda x, c, s: x), "no RoPE|not rotated"),
    (
        "tokens and heads swapped",
        "usual",
        rotary(lambda x, c, s: turn(x.swapaxes(1, 2), c, s).swapaxes(1, 2)),
        "head|position|axis",
    ),
    (
        "last head forgotten",
        "usual wide_head",
        rotary(
            turn, lambda dy, c, s: np.concatenate([turn(dy, c, -s)[:, :, :-1], dy[:, :, -1:]], 2)
        ),
        "head",
    ),
    ("dx negative", "usual far", rotary(turn, lambda dy, c, s: -turn(dy, c, -s)), "sign|−1|-1"),
]


# -- softmax and attention -------------------------------------------------------------------------


def visible(s: Array, shift: int = 0, top: bool = False) -> Array:
    tq, tk = s.shape[-2:]
    return np.tri(tq, tk, (0 if top else tk - tq) + shift, dtype=bool)


def probabilities(s: Array, seen: Array) -> Array:
    s = np.where(seen, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def softmax_back(dp: Array, p: Array) -> Array:
    return p * (dp - (dp * p).sum(-1, keepdims=True))


def softmax(back: Callable[..., Array] = softmax_back, **mask: Any) -> Callable[..., Answers]:
    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        p = probabilities(v["s"], visible(v["s"], **mask))
        return {"y": p, "ds": back(v["dy"], p)}

    return answer


SOFTMAX: list[Row] = [
    ("no sum", "usual square tiny", softmax(lambda dp, p: p * dp), "sum"),
    ("diagonal", "usual square", softmax(lambda dp, p: p * (1 - p) * dp), r"1 ?− ?p|diagonal"),
    (
        "one key more",
        "usual square equal",
        softmax(shift=1),
        "future|one (key|token|position)|mask|off by one",
    ),
    ("no mask", "usual square", softmax(shift=99), "mask"),
    ("top left", "usual equal tiny", softmax(top=True), "top.left|aligned|mask"),
    (
        "sum over queries",
        "usual square",
        softmax(lambda dp, p: p * (dp - (dp * p).sum(-2, keepdims=True))),
        "axis|queries|column",
    ),
    (
        "sum without p",
        "usual square",
        softmax(lambda dp, p: p * (dp - dp.sum(-1, keepdims=True))),
        "sum|weight",
    ),
    (
        "p twice",
        "usual square",
        softmax(lambda dp, p: p * p * (dp - (dp * p).sum(-1, keepdims=True))),
        "twice|p²|square",
    ),
    (
        "sum added",
        "usual square",
        softmax(lambda dp, p: p * (dp + (dp * p).sum(-1, keepdims=True))),
        "sign",
    ),
    (
        "mean for sum",
        "usual square",
        softmax(lambda dp, p: p * (dp - (dp * p).mean(-1, keepdims=True))),
        "mean|divi",
    ),
    (
        "p left out",
        "usual square",
        softmax(lambda dp, p: dp - (dp * p).sum(-1, keepdims=True)),
        r"without.*p|factor p|p is missing",
    ),
    (
        "temperature",
        "usual square",
        lambda v, at: softmax()({**v, "s": v["s"] * 0.5}, at),
        "scale|temperature|factor",
    ),
]


def attend(
    v: Mapping[str, Array],
    *,
    scale: Any = None,
    back_scale: Any = None,
    mapping: str = "block",
    seen: Any = None,
    back: Any = softmax_back,
    group: str = "sum",
    window: int = 0,
) -> Answers:
    q, k, v_, do = v["q"], v["k"], v["v"], v["dy"]
    h, g, d = q.shape[2], k.shape[2], q.shape[3]
    of = np.arange(h) // (h // g) if mapping == "block" else np.arange(h) % g
    K, V = k[:, :, of], v_[:, :, of]
    scale = d**-0.5 if scale is None else scale(d)
    s = np.einsum("nqhd,nkhd->nhqk", q, K) * scale
    m = visible(s) if seen is None else seen(s)
    if window:
        m &= ~visible(s, -window)
    p = probabilities(s, m)
    ds = back(np.einsum("nqhd,nkhd->nhqk", do, V), p) * (
        scale if back_scale is None else back_scale(d)
    )
    full = {"dk": np.einsum("nhqk,nqhd->nkhd", ds, q), "dv": np.einsum("nhqk,nqhd->nkhd", p, do)}
    out = {"y": np.einsum("nhqk,nkhd->nqhd", p, V), "dq": np.einsum("nhqk,nkhd->nqhd", ds, K)}
    for name, a in full.items():
        parts = np.stack([a[:, :, of == j] for j in range(g)], 2)  # n t g share d
        how = {
            "sum": parts.sum(3),
            "mean": parts.mean(3),
            "last": parts[:, :, :, -1],
            "first": parts[:, :, :, 0],
        }
        out[name] = how[group]
    return out


def attention(
    change: Callable[[Answers, Any], Answers] | None = None, **how: Any
) -> Callable[..., Answers]:
    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        found = attend(v, **how)
        return found | change(found, v) if change else found

    return answer


def no_rescale(v: Mapping[str, Array], at: Any) -> Answers:
    """Tiles of two keys, the sum of an earlier tile not scaled to the new maximum."""
    q, k, v_ = v["q"], v["k"], v["v"]
    of = np.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
    s = np.einsum("nqhd,nkhd->nhqk", q, k[:, :, of]) * q.shape[3] ** -0.5
    s = np.where(visible(s), s, -np.inf)
    top, total, mix = np.full(s.shape[:3], -np.inf), np.zeros(s.shape[:3]), 0
    for a in range(0, s.shape[3], 2):
        top = np.maximum(top, s[..., a : a + 2].max(-1))
        e = np.exp(s[..., a : a + 2] - top[..., None])
        total = total + e.sum(-1)
        mix = mix + np.einsum("nhqk,nkhd->nqhd", e, v_[:, a : a + 2, of])
    return attend(v) | {"y": mix / total.swapaxes(1, 2)[..., None]}


ATTENTION: list[Row] = [
    ("no scale", "usual square nine_tokens", attention(scale=lambda d: 1.0), "√D|scale"),
    ("scale 1/D", "usual square", attention(scale=lambda d: 1 / d), r"1/D|scale"),
    ("no scale back", "usual square", attention(back_scale=lambda d: 1.0), "√D|scale"),
    ("scale twice back", "usual square", attention(back_scale=lambda d: 1 / d), "√D|scale|twice"),
    (
        "heads modulo",
        "usual square",
        attention(mapping="modulo"),
        "tiled|h % G|modulo|order|mapping",
    ),
    (
        "last of group",
        "usual square one_kv_head",
        attention(group="last"),
        "last|overwrit|one query head|only",
    ),
    ("mean of group", "usual square", attention(group="mean"), "averag|mean|× 0.5"),
    (
        "P not transposed",
        "square nine_tokens",
        attention(
            lambda f, v: {
                "dv": attend(dict(v, q=v["q"]), back=lambda dp, p: p)["dv"] * 0 + not_transposed(v)
            }
        ),
        "transpos",
    ),
    ("dk zeros", "usual square", attention(lambda f, v: {"dk": 0 * f["dk"]}), "zero|× 0"),
    (
        "one key more",
        "usual square",
        attention(seen=lambda s: visible(s, 1)),
        "future|one (key|token|position)|mask|off by one",
    ),
    ("no sum", "usual square", attention(back=lambda dp, p: p * dp), "sum"),
    ("no rescale", "usual nine_tokens", no_rescale, "rescal|online|maximum"),
    (
        "dk unscaled",
        "usual square",
        attention(lambda f, v: {"dk": f["dk"] * v["q"].shape[3] ** 0.5}),
        "√D|scale|× 2",
    ),
    ("window", "usual nine_tokens", attention(window=3), "window"),
    (
        "own key hidden",
        "usual cached",
        attention(seen=lambda s: visible(s, -1)),
        "own|itself|mask|off by one",
    ),
    ("no mask", "square nine_tokens", attention(seen=lambda s: visible(s, 99)), "mask"),
    (
        "top left mask",
        "usual one_kv_head",
        attention(seen=lambda s: visible(s, top=True)),
        "top.left|aligned|mask",
    ),
    (
        "dq and dk swapped",
        "every_head_its_own",
        attention(lambda f, v: {"dq": f["dk"], "dk": f["dq"]}),
        "holds|swap",
    ),
    (
        "dq as if values were keys",
        "usual square",
        attention(lambda f, v: {"dq": attend({**v, "v": v["k"]})["dq"]}),
        "v",
    ),
    (
        "all gradients zero",
        "usual square",
        attention(lambda f, v: {n: 0 * f[n] for n in ("dq", "dk", "dv")}),
        "zero|× 0",
    ),
    ("scale by hidden", "usual square", attention(scale=lambda d: (4 * d) ** -0.5), "scale|√"),
    (
        "dv from scores",
        "usual square",
        attention(lambda f, v: {"dv": f["dv"] * 0.5}),
        "× 0.5|averag|1/2",
    ),
    (
        "batch summed",
        "usual square",
        attention(lambda f, v: {n: np.broadcast_to(f[n].sum(0), f[n].shape) for n in ("dk", "dv")}),
        "batch|sequence",
    ),
    (
        "mask from the other end",
        "usual nine_tokens",
        attention(seen=lambda s: visible(s)[:, ::-1] | (np.arange(s.shape[-1]) == s.shape[-1] - 1)),
        "mask",
    ),
]


def not_transposed(v: Mapping[str, Array]) -> Array:
    q, k, do = v["q"], v["k"], v["dy"]
    of = np.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
    s = np.einsum("nqhd,nkhd->nhqk", q, k[:, :, of]) * q.shape[3] ** -0.5
    a = np.einsum("nhqk,nkhd->nqhd", probabilities(s, visible(s)), do)
    return np.stack([a[:, :, of == j].sum(2) for j in range(k.shape[2])], 2)


# -- swiglu ----------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gated(act: Any = None, slope: Any = None, change: Any = None) -> Callable[..., Answers]:
    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        g, u, d = v["gate"], v["up"], v["dy"]
        sig = sigmoid(g)
        a = g * sig if act is None else act(g)
        b = sig + g * sig * (1 - sig) if slope is None else slope(g, sig)
        found = {"y": a * u, "dgate": d * u * b, "dup": d * a}
        return found | change(g, u, d, sig, found) if change else found

    return answer


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def slope_of(f: Any) -> Any:
    return lambda g, s: np.imag(f(g + 1e-100j)) / 1e-100


SWIGLU: list[Row] = [
    (
        "gate and up swapped",
        "usual large tiny",
        lambda v, at: (
            (a := gated()({"gate": v["up"], "up": v["gate"], "dy": v["dy"]}, at))
            and {"y": a["y"], "dgate": a["dup"], "dup": a["dgate"]}
        ),
        "swap|exchang",
    ),
    ("slope sigmoid", "usual large", gated(slope=lambda g, s: s), "σ alone"),
    ("gelu", "usual large", gated(gelu, slope_of(gelu)), "GELU|gelu"),
    (
        "dup with sigmoid",
        "usual large",
        gated(change=lambda g, u, d, s, f: {"dup": d * s}),
        "σ|sigmoid",
    ),
    (
        "dgate without up",
        "usual large zero_gate",
        gated(change=lambda g, u, d, s, f: {"dgate": f["dgate"] / u}),
        "without.*up|up.*(missing|left out)",
    ),
    ("slope sign", "usual large", gated(slope=lambda g, s: s - g * s * (1 - s)), "sign"),
    ("second term only", "usual large", gated(slope=lambda g, s: g * s * (1 - s)), "term|σ"),
    (
        "dgate zero",
        "usual zero_gate",
        gated(change=lambda g, u, d, s, f: {"dgate": 0 * g}),
        "zero|× 0",
    ),
    (
        "quick gelu",
        "usual large",
        gated(lambda g: g * sigmoid(1.702 * g), slope_of(lambda g: g * sigmoid(1.702 * g))),
        "1.702|gelu|GELU",
    ),
    (
        "relu",
        "usual large",
        gated(lambda g: np.maximum(g, 0), lambda g, s: (g > 0) * 1.0),
        "relu|ReLU",
    ),
    (
        "sigmoid gate (GLU)",
        "usual large",
        gated(lambda g: sigmoid(g), lambda g, s: s * (1 - s)),
        "σ|sigmoid|GLU",
    ),
    ("slope without 1", "usual large", gated(slope=lambda g, s: s + g * s), "σ"),
    (
        "dup from the slope",
        "usual large",
        gated(change=lambda g, u, d, s, f: {"dup": d * (s + g * s * (1 - s))}),
        "slope|derivative",
    ),
    ("half of tanh", "usual large", gated(slope=lambda g, s: s + g * s * s), "σ|slope|term"),
    (
        "bfloat16 sigmoid",
        "usual large",
        gated(slope=lambda g, s: to_bfloat(s) + g * to_bfloat(s) * (1 - to_bfloat(s))),
        "precision|bfloat16|digits",
    ),
    (
        "tail of five",
        "usual large",
        gated(
            change=lambda g, u, d, s, f: {n: a * (np.arange(a.shape[-1]) < 4) for n, a in f.items()}
        ),
        "zero|column|from|tail",
    ),
]


# -- losses ----------------------------------------------------------------------------------------


def entropy(
    v: Mapping[str, Array],
    *,
    count: Any = None,
    labels: Any = None,
    rows: Any = None,
    grad: Any = None,
    loss: Any = None,
    extra: int = 0,
) -> Answers:
    z, y, dy = v["logits"], np.array(v["labels"]), v["dy"]
    y = y if labels is None else labels(y)
    c = y != -100
    n = max(1, c.sum()) if count is None else count(y, z)
    if extra:
        z = np.concatenate([z, np.zeros((len(z), extra))], 1)
    top = z.max(-1, keepdims=True)
    e = np.exp(z - top)
    p = e / e.sum(-1, keepdims=True)
    lse = np.log(e.sum(-1)) + top[:, 0]
    hot = np.eye(z.shape[1])[np.where(c, y, 0)]
    g = (
        (p - hot if grad is None else grad(p, hot, lse))
        * (c if rows is None else rows(c))[:, None]
        / n
    )
    each = lse - (z * hot).sum(-1) if loss is None else loss(z, hot, lse)
    found = dy * g
    return {"y": np.asarray((each * c).sum() / n), "dlogits": found[:, : v["logits"].shape[1]]}


def ce(change: Any = None, **how: Any) -> Callable[..., Answers]:
    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        found = entropy(v, **how)
        return found | change(found, v) if change else found

    return answer


def lse_no_rescale(v: Mapping[str, Array], at: Any) -> Answers:
    z, y = v["logits"], np.array(v["labels"])
    top, total = np.full(len(z), -np.inf), 0
    for a in range(0, z.shape[1], 3):
        top = np.maximum(top, z[:, a : a + 3].max(1))
        total = total + np.exp(z[:, a : a + 3] - top[:, None]).sum(1)
    lse, c = np.log(total) + top, y != -100
    hot = np.eye(z.shape[1])[np.where(c, y, 0)] * c[:, None]
    n = max(1, c.sum())
    return {
        "y": np.asarray(((lse - (z * hot).sum(1)) * c).sum() / n),
        "dlogits": v["dy"] * (np.exp(z - lse[:, None]) * c[:, None] - hot) / n,
    }


CE: list[Row] = [
    (
        "mean over all",
        "usual",
        ce(count=lambda y, z: len(y)),
        "all (tokens|rows|labels|positions)|ignored",
    ),
    ("sum", "usual none_ignored", ce(count=lambda y, z: 1), "sum"),
    (
        "ignored rows get softmax",
        "usual",
        ce(rows=lambda c: np.ones_like(c), labels=None, grad=lambda p, h, l: p - h),
        "ignored",
    ),
    (
        "smoothing",
        "usual none_ignored",
        ce(
            grad=lambda p, h, l: p - 0.9 * h - 0.1 / p.shape[1],
            loss=lambda z, h, l: l - (z * (0.9 * h + 0.1 / z.shape[1])).sum(-1),
        ),
        "smooth",
    ),
    (
        "z-loss",
        "usual none_ignored",
        ce(
            grad=lambda p, h, l: p - h + 2e-2 * l[:, None] * p,
            loss=lambda z, h, l: l - (z * h).sum(-1) + 1e-2 * l**2,
        ),
        "z.loss|lse²|log Σ",
    ),
    (
        "divided twice",
        "usual none_ignored",
        ce(lambda f, v: {"dlogits": f["dlogits"] / max(1, (np.array(v["labels"]) != -100).sum())}),
        "twice|1/count|count|label",
    ),
    (
        "cotangent forgotten",
        "usual none_ignored",
        ce(lambda f, v: {"dlogits": f["dlogits"] / v["dy"]}),
        "dloss|cotangent|dy|upstream",
    ),
    ("onehot forgotten", "usual none_ignored", ce(grad=lambda p, h, l: p), "onehot|one-hot|label"),
    (
        "over the vocabulary",
        "usual none_ignored",
        ce(count=lambda y, z: z.shape[1]),
        "vocabulary|V\\b",
    ),
    ("padded vocabulary", "usual none_ignored", ce(extra=3), "padd|vocabulary"),
    (
        "label 0 ignored",
        "usual label_0_counts",
        ce(labels=lambda y: np.where(y == 0, -100, y)),
        "token id 0|label 0",
    ),
    ("base 2", "usual none_ignored", ce(lambda f, v: {"y": f["y"] / np.log(2)}), "log|base|1.44"),
    (
        "labels one up",
        "usual none_ignored",
        ce(labels=lambda y: np.where(y < 0, y, (y + 1) % 9)),
        "label",
    ),
    ("no rescale", "usual none_ignored", lse_no_rescale, "rescal|online|maximum"),
    ("negative", "usual none_ignored", ce(lambda f, v: {"dlogits": -f["dlogits"]}), "−1|-1|sign"),
    (
        "divisor padded to 8",
        "usual",
        ce(count=lambda y, z: 8),
        "all (tokens|rows|labels|positions)|padd|ignored",
    ),
    ("ignored rows in the mean", "usual", ce(labels=lambda y: np.maximum(y, 0)), "−100|ignored"),
    (
        "one label fewer",
        "usual none_ignored",
        ce(count=lambda y, z: (y != -100).sum() - 1),
        "count|divi|label",
    ),
    (
        "dlogits zero",
        "usual none_ignored",
        ce(lambda f, v: {"dlogits": 0 * f["dlogits"]}),
        "zero|× 0",
    ),
    (
        "loss only of the first half",
        "none_ignored",
        ce(lambda f, v: {"y": f["y"] * 0.7311}),
        "not a mistake",
    ),
    ("shifted inside", "usual none_ignored", ce(labels=lambda y: np.append(y[1:], -100)), "shift"),
    (
        "two logits are one tile",
        "usual",
        ce(lambda f, v: {"dlogits": f["dlogits"] * (np.arange(9) < 8)}),
        "column|from|zero|tail|last",
    ),
]


def head(change: Any = None, **how: Any) -> Callable[..., Answers]:
    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        x, w = v["x"].reshape(-1, v["x"].shape[-1]), v["w"]
        a = entropy({"logits": x @ w.T, "labels": v["labels"].reshape(-1), "dy": v["dy"]}, **how)
        d = a["dlogits"]
        found = {"y": a["y"], "dx": (d @ w).reshape(v["x"].shape), "dw": d.T @ x}
        return found | change(found, v, d) if change else found

    return answer


def mean_of_means(v: Mapping[str, Array], at: Any) -> Answers:
    rows = []
    for x, y in zip(v["x"], v["labels"], strict=True):
        rows.append(head()({**v, "x": x[None], "labels": y[None]}, at))
    n = len(rows)
    return {
        "y": sum(r["y"] for r in rows) / n,
        "dx": np.concatenate([r["dx"] for r in rows]) / n,
        "dw": sum(r["dw"] for r in rows) / n,
    }


LM: list[Row] = [
    ("sum", "usual none_ignored", head(count=lambda y, z: 1), "sum"),
    (
        "mean over all",
        "usual",
        head(count=lambda y, z: len(y)),
        "all (tokens|rows|labels|positions)|ignored",
    ),
    ("mean of means", "usual", mean_of_means, "mean of"),
    (
        "dw of the first sequence",
        "usual none_ignored",
        head(lambda f, v, d: {"dw": d[:4].T @ v["x"][0]}),
        "first sequence|only",
    ),
    ("dw zero", "usual none_ignored", head(lambda f, v, d: {"dw": 0 * f["dw"]}), "zero|× 0"),
    (
        "shifted inside",
        "usual none_ignored",
        head(labels=lambda y: np.append(y[1:], -100)),
        "shift",
    ),
    (
        "onehot forgotten",
        "usual none_ignored",
        head(grad=lambda p, h, l: p),
        "onehot|one-hot|label",
    ),
    (
        "dx unscaled by dy",
        "usual none_ignored",
        head(lambda f, v, d: {"dx": f["dx"] / v["dy"]}),
        "dloss|cotangent|dy|upstream",
    ),
    ("padded vocabulary", "usual none_ignored", head(extra=7), "padd|vocabulary"),
    (
        "last tile of V lost",
        "usual none_ignored",
        head(lambda f, v, d: {"dw": f["dw"] * (np.arange(9) < 8)[:, None]}),
        "row|zero|from|tail|last",
    ),
    (
        "z-loss",
        "usual none_ignored",
        head(
            grad=lambda p, h, l: p - h + 2e-2 * l[:, None] * p,
            loss=lambda z, h, l: l - (z * h).sum(-1) + 1e-2 * l**2,
        ),
        "z.loss|lse²",
    ),
    (
        "labels of ignored rows count",
        "usual",
        head(labels=lambda y: np.maximum(y, 0)),
        "−100|ignored",
    ),
]


# -- linear layers ---------------------------------------------------------------------------------


def lora(
    v: Mapping[str, Array], at: Any, change: Any = None, s: Any = None, keep: float = 1.0
) -> Answers:
    x, w, A, B, dy = (v[n] for n in ("x", "w", "A", "B", "dy"))
    b = v.get("b")
    s = at["s"] if s is None else s(at["s"], A)
    f = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    h, dh = x @ A.T / keep, s * (dy @ B) / keep
    y = x @ w.T + s * (h @ B.T) + (0 if b is None else b)
    found = {
        "y": y,
        "dx": dy @ w + dh @ A,
        "dA": f(dh).T @ f(x),
        "dB": s * f(dy).T @ f(h),
        "dw": f(dy).T @ f(x),
    }
    if b is not None:
        found["db"] = f(dy).sum(0)
    return found | change(found, v, s, f) if change else found


def lo(change: Any = None, **how: Any) -> Callable[..., Answers]:
    return lambda v, at: lora(v, at, change, **how)


def dropped(v: Mapping[str, Array], at: Any) -> Answers:
    m = np.random.default_rng(3).random(v["x"].shape) > 0.1
    z = v["x"] * m / 0.9
    A, B, dy, s = v["A"], v["B"], v["dy"], at["s"]
    h, dh = z @ A.T, s * (dy @ B)
    return lora(v, at) | {
        "y": v["x"] @ v["w"].T + v["b"] + s * h @ B.T,
        "dx": dy @ v["w"] + (dh @ A) * m / 0.9,
        "dA": dh.reshape(-1, dh.shape[-1]).T @ z.reshape(-1, z.shape[-1]),
        "dB": s * dy.reshape(-1, dy.shape[-1]).T @ h.reshape(-1, h.shape[-1]),
    }


LORA: list[Row] = [
    ("no scale", "usual scale_2 no_bias", lo(s=lambda s, A: 1.0), "scale"),
    ("scale twice", "usual scale_2", lo(s=lambda s, A: s * s), "twice|s²|squared"),
    ("rslora", "usual scale_2", lo(s=lambda s, A: s * len(A) ** 0.5), "rsLoRA|√"),
    ("alpha", "usual scale_2", lo(s=lambda s, A: s * len(A)), "alpha"),
    ("dA unscaled", "usual scale_2", lo(lambda f, v, s, r: {"dA": f["dA"] / s}), "scale|1/s|× 1/s"),
    ("dB unscaled", "usual scale_2", lo(lambda f, v, s, r: {"dB": f["dB"] / s}), "scale|1/s"),
    (
        "dx without frozen",
        "usual no_bias nine_tokens",
        lo(lambda f, v, s, r: {"dx": s * v["dy"] @ v["B"] @ v["A"]}),
        "frozen",
    ),
    (
        "dx without adapter",
        "usual nine_tokens",
        lo(lambda f, v, s, r: {"dx": v["dy"] @ v["w"]}),
        "adapter",
    ),
    (
        "dx unscaled adapter",
        "usual scale_2",
        lo(lambda f, v, s, r: {"dx": v["dy"] @ v["w"] + v["dy"] @ v["B"] @ v["A"]}),
        "scale",
    ),
    ("dropout on", "usual nine_tokens", dropped, "dropout"),
    ("dropout's 1/(1-p) only", "usual scale_2", lo(keep=0.9), "dropout|1\\.1|factor"),
    ("bias forgotten", "usual nine_tokens", lo(lambda f, v, s, r: {"y": f["y"] - v["b"]}), "bias"),
    (
        "db mean",
        "usual nine_tokens",
        lo(lambda f, v, s, r: {"db": f["db"] / (v["dy"].size // v["dy"].shape[-1])}),
        "mean|averag|1/|rows",
    ),
    (
        "A read as [in, R]",
        "usual",
        lambda v, at: lora({**v, "A": v["A"].reshape(v["A"].shape[::-1]).T}, at),
        "transpos|column|read",
    ),
    (
        "B read transposed",
        "usual",
        lambda v, at: lora({**v, "B": v["B"].reshape(v["B"].shape[::-1]).T}, at),
        "transpos|column|read",
    ),
    (
        "dB from dropped h",
        "usual",
        lo(lambda f, v, s, r: {"dB": s * r(v["dy"]).T @ r(np.zeros_like(v["x"]) @ v["A"].T)}),
        "zero|× 0",
    ),
    (
        "dA and dB of the last row",
        "usual nine_tokens",
        lo(
            lambda f, v, s, r: {
                "dA": s * np.outer(r(v["dy"])[-1] @ v["B"], r(v["x"])[-1]),
                "dB": s * np.outer(r(v["dy"])[-1], r(v["x"])[-1] @ v["A"].T),
            }
        ),
        "last (token|row)|only",
    ),
    (
        "gradients twice",
        "usual nine_tokens",
        lo(lambda f, v, s, r: {n: 2 * f[n] for n in ("dA", "dB")}),
        "× 2|twice",
    ),
    (
        "dA, dB mean over rows",
        "usual nine_tokens",
        lo(lambda f, v, s, r: {n: f[n] / len(r(v["x"])) for n in ("dA", "dB")}),
        "rows|tokens|mean|averag",
    ),
    (
        "dA from y",
        "usual",
        lo(lambda f, v, s, r: {"dA": (s * r(v["dy"]) @ (v["B"] * s)).T @ r(v["x"])}),
        "scale|twice|× s|s²|× 0.75",
    ),
    (
        "branch missing",
        "usual nine_tokens",
        lambda v, at: lora({**v, "B": 0 * v["B"]}, at),
        "adapter|branch|without LoRA|B = 0",
    ),
    (
        "bias scaled",
        "usual scale_2",
        lo(lambda f, v, s, r: {"y": f["y"] + (s - 1) * v["b"]}),
        "bias",
    ),
    (
        "dA over rank",
        "usual nine_tokens",
        lo(lambda f, v, s, r: {n: f[n] / len(v["A"]) for n in ("dA", "dB")}),
        "rank",
    ),
    (
        "dw forgets a sequence",
        "usual scale_2",
        lo(lambda f, v, s, r: {"dw": r(v["dy"][:1]).T @ r(v["x"][:1])}),
        "first sequence|only",
    ),
    (
        "B after the update",
        "usual nine_tokens",
        lambda v, at: (
            lora(v, at)
            | {
                "dx": lora(
                    {
                        **v,
                        "A": v["A"] - 0.1 * lora(v, at)["dA"],
                        "B": v["B"] - 0.1 * lora(v, at)["dB"],
                    },
                    at,
                )["dx"]
            }
        ),
        "updated|not a mistake|after",
    ),
    (
        "A not scaled, B doubly",
        "usual scale_2",
        lo(lambda f, v, s, r: {"dA": f["dA"] / s, "dB": f["dB"] * s}),
        "scale|1/s",
    ),
]


def line(change: Any) -> Callable[..., Answers]:
    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        f = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
        x, w, dy = v["x"], v["w"], v["dy"]
        found = {"y": x @ w.T + v.get("b", 0), "dx": dy @ w, "dw": f(dy).T @ f(x)}
        if "b" in v:
            found["db"] = f(dy).sum(0)
        return found | change(found, v, f)

    return answer


LINEAR: list[Row] = [
    ("no bias", "usual nine_tokens", line(lambda f, v, r: {"y": f["y"] - v["b"]}), "bias"),
    (
        "db of one sequence",
        "usual",
        line(lambda f, v, r: {"db": v["dy"][0].sum(0)}),
        "first sequence|only",
    ),
    (
        "dw mean over batch",
        "usual",
        line(lambda f, v, r: {"dw": f["dw"] / 2}),
        "batch|0.5|1/2|sequence",
    ),
    (
        "dw not summed: last batch",
        "usual large",
        line(lambda f, v, r: {"dw": v["dy"][-1].T @ v["x"][-1]}),
        "last sequence|only",
    ),
    (
        "weight read by columns",
        "usual",
        line(
            lambda f, v, r: {
                "y": v["x"] @ v["w"].reshape(v["w"].shape[::-1]) + v["b"],
                "dx": v["dy"] @ v["w"].reshape(v["w"].shape[::-1]).T,
            }
        ),
        "transpos|column|read",
    ),
    ("dx of zeros", "usual no_bias", line(lambda f, v, r: {"dx": 0 * f["dx"]}), "zero|× 0"),
    ("bias twice", "usual nine_tokens", line(lambda f, v, r: {"y": f["y"] + v["b"]}), "bias"),
    (
        "last input channel lost",
        "usual no_bias",
        line(lambda f, v, r: {"y": f["y"] - v["x"][..., -1:] * v["w"][:, -1]}),
        "channel|column|tail|rank|last",
    ),
]


# -- embedding -------------------------------------------------------------------------------------


def table(f: Callable[..., Array], forward: Any = None) -> Callable[..., Answers]:
    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        ids, w, dy = v["ids"], v["w"], v["dy"]
        dw = np.zeros_like(w)
        np.add.at(dw, ids, dy)
        y = w[ids]
        return {"y": forward(y, w, ids) if forward else y, "dw": f(dw, ids, dy, w)}

    return answer


def overwrite(dw: Array, ids: Array, dy: Array, w: Array) -> Array:
    out = np.zeros_like(w)
    for i, d in zip(ids.reshape(-1), dy.reshape(-1, w.shape[1]), strict=True):
        out[i] = d
    return out


def first_only(dw: Array, ids: Array, dy: Array, w: Array) -> Array:
    return overwrite(dw, ids.reshape(-1)[::-1], dy.reshape(-1, w.shape[1])[::-1], w)


EMBEDDING: list[Row] = [
    ("overwrites", "usual one_word", table(overwrite), "overwrit|last"),
    (
        "mean per token",
        "usual one_word",
        table(
            lambda dw, ids, dy, w: (
                dw / np.maximum(1, np.bincount(ids.reshape(-1), minlength=len(w)))[:, None]
            )
        ),
        "mean|averag|count|occurr",
    ),
    ("first only", "usual one_word", table(first_only), "first|overwrit"),
    (
        "token 0 is padding",
        "usual",
        table(lambda dw, ids, dy, w: dw * (np.arange(len(w)) > 0)[:, None]),
        "token id 0|padding|row 0",
    ),
    (
        "gemma's √C",
        "usual one_word",
        table(lambda dw, ids, dy, w: dw * w.shape[1] ** 0.5, lambda y, w, i: y * w.shape[1] ** 0.5),
        "√C|sqrt",
    ),
    ("zeros", "usual one_word", table(lambda dw, ids, dy, w: 0 * dw), "zero|× 0"),
    (
        "next row",
        "usual distinct",
        table(lambda dw, ids, dy, w: np.roll(dw, 1, 0), lambda y, w, i: w[(i - 1) % len(w)]),
        "row|one (token|row)|off by one|id",
    ),
    (
        "first sequence",
        "usual",
        table(lambda dw, ids, dy, w: overwrite(dw, ids[:0], dy[:0], w) + add(ids[:1], dy[:1], w)),
        "first sequence|only",
    ),
]


def add(ids: Array, dy: Array, w: Array) -> Array:
    dw = np.zeros_like(w)
    np.add.at(dw, ids, dy)
    return dw


# -- 4 bits ----------------------------------------------------------------------------------------


def unpacked(f: Callable[..., Array]) -> Callable[..., Answers]:
    """f(codes, scales, biases per code, at) -> w."""

    def answer(v: Mapping[str, Array], at: Any) -> Answers:
        bits = at["bits"]
        n = 32 // bits
        c = (
            (
                v["packed"][..., None].astype(np.uint64)
                >> (np.arange(n, dtype=np.uint64) * np.uint64(bits))
            )
            & np.uint64(2**bits - 1)
        ).astype(np.int64)
        g = at["group_size"]
        s, b = (np.repeat(v[k], g, 1) for k in ("scales", "biases"))
        w = f(c, s, b, at, v)
        return {"w": w, "y": v["x"] @ w.T, "dx": v["dy"] @ w}

    return answer


def flat(c: Array) -> Array:
    return c.reshape(len(c), -1)


QUANT: list[Row] = [
    (
        "high nibble first",
        "4_group_64 4_group_32 8_",
        unpacked(lambda c, s, b, at, v: flat(c.reshape(*c.shape[:2], -1, 2)[..., ::-1]) * s + b),
        "nibble|order",
    ),
    (
        "word reversed",
        "4_group_64 8_",
        unpacked(lambda c, s, b, at, v: flat(c[..., ::-1]) * s + b),
        "order|word|endian|revers",
    ),
    (
        "signed",
        "4_group_64 4_group_32 8_",
        unpacked(
            lambda c, s, b, at, v: (
                np.where(flat(c) >= 2 ** (at["bits"] - 1), flat(c) - 2 ** at["bits"], flat(c)) * s
                + b
            )
        ),
        "signed|two's",
    ),
    (
        "zero point 8",
        "4_group_64 8_",
        unpacked(lambda c, s, b, at, v: (flat(c) - 2 ** (at["bits"] - 1)) * s),
        "zero point|bias",
    ),
    (
        "zero point and bias",
        "4_group_64 4_group_32",
        unpacked(lambda c, s, b, at, v: (flat(c) - 8) * s + b),
        "zero point",
    ),
    (
        "no bias",
        "4_group_64 4_group_32",
        unpacked(lambda c, s, b, at, v: flat(c) * s),
        "bias|zero point",
    ),
    (
        "bias subtracted",
        "4_group_64 8_",
        unpacked(lambda c, s, b, at, v: flat(c) * s - b),
        "bias|sign|subtract",
    ),
    (
        "(q+b)s",
        "4_group_64 4_group_32",
        unpacked(lambda c, s, b, at, v: (flat(c) + b) * s),
        "bias|scaled|parenthes",
    ),
    (
        "other group axis",
        "4_group_32",
        unpacked(
            lambda c, s, b, at, v: flat(c) * np.tile(v["scales"], 32) + np.tile(v["biases"], 32)
        ),
        "group",
    ),
    (
        "first group for all",
        "4_group_32",
        unpacked(lambda c, s, b, at, v: flat(c) * v["scales"][:, :1] + v["biases"][:, :1]),
        "group",
    ),
    (
        "bytes swapped",
        "4_group_64 8_",
        unpacked(lambda c, s, b, at, v: flat(c.reshape(*c.shape[:2], 4, -1)[..., ::-1, :]) * s + b),
        "byte|order|endian",
    ),
    (
        "scale and bias exchanged",
        "4_group_64",
        unpacked(lambda c, s, b, at, v: flat(c) * b + s),
        "exchang|swap",
    ),
    (
        "dx unscaled",
        "4_group_64",
        lambda v, at: (
            unpacked(lambda c, s, b, at, v: flat(c) * s + b)(v, at)
            | {"dx": v["dy"] @ flat(v["codes"]).astype(float)}
        ),
        "codes|scale|decod",
    ),
    (
        "NF4 for affine",
        "4_group_64 4_group_32",
        unpacked(lambda c, s, b, at, v: np.linspace(-1, 1, 16)[flat(c)] * s),
        "not a mistake|zero point|bias|table",
    ),
]


TABLES: dict[str, list[Row]] = {
    "ops/rmsnorm/": NORM,
    "ops/rope/": ROPE,
    "ops/causal_softmax/": SOFTMAX,
    "ops/attention/": ATTENTION,
    "ops/swiglu/": SWIGLU,
    "ops/cross_entropy/": CE,
    "ops/lm_loss/": LM,
    "ops/lora_linear/": LORA,
    "ops/linear/": LINEAR,
    "ops/embedding/": EMBEDDING,
    "quant/bits_": QUANT,
}


def unseen(names: list[str]) -> list[Unseen]:
    """Every row with the cases it names among `names`."""
    found = []
    for prefix, rows in TABLES.items():
        for number, (name, cases, answer, pattern) in enumerate(rows):
            ours = tuple(
                n
                for c in cases.split()
                for n in names
                if n == prefix + c or (prefix.startswith("quant") and n.startswith(prefix + c))
            )
            assert ours, (prefix, name)
            found.append(
                Unseen(f"{prefix}{name}", ours, answer, re.compile(pattern), number % 2 == 1)
            )
    return found
