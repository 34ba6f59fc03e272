"""Mistakes of softmax and attention."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Arrays, Plain, Weights
from mesp_ref.ops import Array

TILES = (2, 3, 4, 8, 16, 32, 64, 128)


class _Rebuilt(Plain):
    bias, turn, branch, normed = True, True, True, True

    def rebuilt_qkv(self, w: Weights, res: Arrays) -> tuple[Array, ...]:
        def rebuilt(letter: str) -> Array:
            part = f"self_attn.{letter}_proj"
            y = res["n1"] @ w[f"{part}.weight"].T
            if self.branch:
                h = res["n1"] @ w[f"{part}.lora_A.weight"].T
                y = y + self.scale() * h @ w[f"{part}.lora_B.weight"].T
            if self.bias and f"{part}.bias" in w:
                y = y + w[f"{part}.bias"]
            y = self.heads(y)
            if self.normed and self.set.head_norms and letter != "v":
                y = self.norm(y, self.gain(w[f"self_attn.{letter}_norm.weight"]))
            return self.rotate(y) if self.turn and letter != "v" else y

        return rebuilt("q"), rebuilt("k"), rebuilt("v")


class RebuiltWithoutRope(_Rebuilt):
    """q and k are recomputed in the backward without RoPE"""

    turn = False


class RebuiltWithoutBias(_Rebuilt):
    """q, k and v are recomputed in the backward without their biases"""

    bias = False


class RebuiltWithoutLora(_Rebuilt):
    """q, k and v are recomputed in the backward without their LoRA branch"""

    branch = False


class RebuiltWithoutNorm(_Rebuilt):
    """q and k are recomputed in the backward without their norms"""

    normed = False


class OnDevice(_Rebuilt):
    """q and k recomputed without RoPE and biases, dq and dk not rotated back (on-device MeSP)"""

    bias, turn = False, False

    def rotate_bwd(self, dy: Array) -> Array:
        return dy


class TiledHeads(Plain):
    """key/value heads tiled (head h reads h mod G) instead of repeated (h // (H/G))"""

    def share(self, k: Array) -> Array:
        return np.tile(k, (1, 1, self.set.heads // self.set.groups, 1))

    def unshare(self, dk: Array) -> Array:
        n, t, _, d = dk.shape
        return dk.reshape(n, t, -1, self.set.groups, d).sum(axis=2)


class TiledHeadsBackward(Plain):
    """gradients of key/value heads summed as if heads were tiled, though the forward repeats"""

    def unshare(self, dk: Array) -> Array:
        return TiledHeads.unshare(self, dk)  # type: ignore[arg-type]


class TiledHeadsForward(Plain):
    """key/value heads tiled (head h reads h mod G) in the forward, repeated in the backward"""

    def attention(self, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        share = self.set.heads // self.set.groups
        k, v = (np.tile(a, (1, 1, share, 1)) for a in (k, v))
        return (p := self.softmax(q, k)), self.mix(p, v)


class MeanOverGroup(Plain):
    """dk and dv averaged over the query heads of a group instead of summed"""

    def unshare(self, dk: Array) -> Array:
        return super().unshare(dk) * self.set.groups / self.set.heads


class FirstOfGroup(Plain):
    """dk and dv of only the first query head of each group"""

    def unshare(self, dk: Array) -> Array:
        return dk[:, :, :: self.set.heads // self.set.groups]


class LastOfGroup(Plain):
    """dk and dv of only the last query head of each group: overwritten, not summed"""

    def unshare(self, dk: Array) -> Array:
        share = self.set.heads // self.set.groups
        return dk[:, :, share - 1 :: share]


class FirstKeyHead(Plain):
    """every query head reads the first key/value head"""

    def share(self, k: Array) -> Array:
        return np.repeat(k[:, :, :1], self.set.heads, axis=2)

    def unshare(self, dk: Array) -> Array:
        summed = dk.sum(axis=2, keepdims=True)
        return np.concatenate([summed, *[0 * summed] * (self.set.groups - 1)], axis=2)


class NoScoreScale(Plain):
    """attention backward without the factor 1/√D"""

    def score_scale_bwd(self) -> float:
        return 1.0


class DetachedProbabilities(Plain):
    """attention probabilities treated as constants: dq and dk are 0"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        dq, dk, dv = super().attention_bwd(do, q, k, v, p)
        return 0 * dq, 0 * dk, dv


class SwappedQK(Plain):
    """dq formed with q and dk with k: the factors of the scores swapped"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        if q.shape[1] != k.shape[1]:
            return super().attention_bwd(do, q, k, v, p)
        ds, vs = scores_gradient(self, do, v, p), self.share(k)
        dq, dk = np.einsum("nhqk,nkhd->nqhd", ds, q), np.einsum("nhqk,nqhd->nkhd", ds, vs)
        return dq, self.unshare(dk), super().attention_bwd(do, q, k, v, p)[2]


def scores_gradient(self: Plain, do: Array, v: Array, p: Array) -> Array:
    dp = np.einsum("nqhd,nkhd->nhqk", do, self.share(v))
    return self.softmax_bwd(dp, p) * self.score_scale_bwd()


class TransposedScores(Plain):
    """ds not transposed where it meets the queries: dk = ds·q"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        dq, dk, dv = super().attention_bwd(do, q, k, v, p)
        if q.shape[1] == k.shape[1]:
            ds = scores_gradient(self, do, v, p)
            dk = self.unshare(np.einsum("nhqk,nkhd->nqhd", ds, q))
        return dq, dk, dv


class NotTransposedProbabilities(Plain):
    """p not transposed in the gradient of the values: dv = p·do"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        dq, dk, dv = super().attention_bwd(do, q, k, v, p)
        if q.shape[1] == k.shape[1]:
            dv = self.unshare(np.einsum("nhqk,nkhd->nqhd", p, do))
        return dq, dk, dv


class ValuesAsKeys(Plain):
    """dp formed with the keys instead of the values"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        dq, dk, _ = super().attention_bwd(do, q, k, k, p)
        return dq, dk, super().attention_bwd(do, q, k, v, p)[2]


class QueriesWithValues(Plain):
    """dq formed with the values instead of the keys: ds·v"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        dq = np.einsum("nhqk,nkhd->nqhd", scores_gradient(self, do, v, p), self.share(v))
        return dq, *super().attention_bwd(do, q, k, v, p)[1:]


class NoProbabilitiesInValues(Plain):
    """dv formed with ds instead of p"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        dq, dk, _ = super().attention_bwd(do, q, k, v, p)
        return (
            dq,
            dk,
            self.unshare(np.einsum("nhqk,nqhd->nkhd", scores_gradient(self, do, v, p), do)),
        )


class NoAttentionBackward(Plain):
    """the attention's backward returns zeros: dq, dk and dv are 0"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        return 0 * q, 0 * k, 0 * v


class SoftmaxWithoutRowSum(Plain):
    """softmax backward without the row sum: ds = p ⊙ dp"""

    def softmax_bwd(self, dp: Array, p: Array) -> Array:
        return p * dp


class SoftmaxAsSigmoid(Plain):
    """softmax backward of single entries: ds = dp ⊙ p ⊙ (1 − p)"""

    def softmax_bwd(self, dp: Array, p: Array) -> Array:
        return dp * p * (1 - p)


def softmax(sentence: str, ds: Callable[[Array, Array], Array]) -> type[Plain]:
    return variant(f"softmax backward {sentence}", softmax_bwd=lambda self, dp, p: ds(dp, p))


def total(x: Array, axis: int = -1) -> Array:
    found: Array = x.sum(axis=axis, keepdims=True)
    return found


def of_visible(dp: Array, p: Array) -> Array:
    """Mean over the keys that a query sees."""
    return total(dp * p) / np.maximum(1, total((p > 0) * 1.0))


SOFTMAX = (
    softmax(
        "with the row sum over queries, the wrong axis", lambda dp, p: p * (dp - total(dp * p, -2))
    ),
    softmax(
        "with the row sum over heads, the wrong axis", lambda dp, p: p * (dp - total(dp * p, 1))
    ),
    softmax(
        "with Σ dp for Σ p⊙dp: the row sum without the weights p",
        lambda dp, p: p * (dp - total(dp)),
    ),
    softmax("with Σ dp over visible keys for Σ p⊙dp", lambda dp, p: p * (dp - total(dp * (p > 0)))),
    softmax("with the sign of the row sum turned", lambda dp, p: p * (dp + total(dp * p))),
    softmax(
        "with a mean over keys for the row sum",
        lambda dp, p: p * (dp - (dp * p).mean(-1, keepdims=True)),
    ),
    softmax(
        "with a mean over visible keys for the row sum", lambda dp, p: p * (dp - of_visible(dp, p))
    ),
    softmax("without the factor p: ds = dp − Σ p⊙dp", lambda dp, p: dp - total(dp * p)),
    softmax(
        "without the factor p on visible keys: ds = dp − Σ p⊙dp",
        lambda dp, p: (dp - total(dp * p)) * (p > 0),
    ),
    softmax("with p twice: p²⊙(dp − Σ p⊙dp)", lambda dp, p: p * p * (dp - total(dp * p))),
    softmax("with p twice in the row sum", lambda dp, p: p * (dp - total(dp * p * p))),
    softmax(
        "without p in front of the row sum: p⊙dp − Σ p⊙dp", lambda dp, p: p * dp - total(dp * p)
    ),
    softmax("skipped: ds = dp", lambda dp, p: dp * 1.0),
    softmax("skipped: ds = dp on visible keys", lambda dp, p: dp * (p > 0)),
    softmax("of the row sum alone: ds = − p·Σ p⊙dp", lambda dp, p: -p * total(dp * p)),
    softmax(
        "with the largest p⊙dp for the row sum",
        lambda dp, p: p * (dp - (dp * p).max(-1, keepdims=True)),
    ),
    softmax("with its sign turned", lambda dp, p: -p * (dp - total(dp * p))),
)


def mask(sentence: str, hidden: Callable[[int, int], Array]) -> type[Plain]:
    """hidden(tq, tk) in place of the causal mask."""
    return variant(sentence, causal=lambda self, tq, tk: hidden(tq, tk))


def tri(tq: int, tk: int, shift: int = 0) -> Array:
    return np.tri(tq, tk, tk - tq + shift, dtype=bool)


def window(width: int) -> Callable[[int, int], Array]:
    return lambda tq, tk: tri(tq, tk) & ~tri(tq, tk, -width)


class NoMask(Plain):
    """attention without the causal mask"""

    def causal(self, tq: int, tk: int) -> Array:
        return np.ones((tq, tk), bool)


MASKS = (
    mask(
        "the causal mask is off by one: a query sees one key of the future",
        lambda a, b: tri(a, b, 1),
    ),
    mask(
        "the causal mask is off by one: a query does not see its own key",
        lambda a, b: tri(a, b, -1),
    ),
    mask(
        "the causal mask is off by two: a query sees two keys of the future",
        lambda a, b: tri(a, b, 2),
    ),
    mask(
        "the causal mask is aligned at the top left instead of the bottom right",
        lambda a, b: np.tri(a, b, dtype=bool),
    ),
    mask(
        "the causal mask is turned around: a query sees itself and the future",
        lambda a, b: ~tri(a, b, -1),
    ),
    mask("a query sees its own key only", lambda a, b: tri(a, b) & ~tri(a, b, -1)),
    mask("the first key is masked", lambda a, b: tri(a, b) & (np.arange(b) > 0)),
    *(
        mask(f"attention within a window of {w} keys", window(w))
        for w in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)
    ),
)


def scale(
    sentence: str, factor: Callable[[Plain], float], back: Callable[[Plain], float] | None = None
) -> type[Plain]:
    """Scores times another number than 1/√D; the backward the same or its own."""
    steps: dict[str, Any] = {"score_scale": lambda self: factor(self)}
    if back:
        steps["score_scale_bwd"] = lambda self: back(self)
    return variant(sentence, **steps)


def sizes(plain: Plain) -> tuple[int, int, int]:
    return plain.set.head_dim, plain.set.heads, plain.set.groups


def right_scale(plain: Plain) -> float:
    return Plain.score_scale(plain)


def temperature(factor: float) -> Callable[[Plain], float]:
    return lambda plain: right_scale(plain) * factor


SCALES = (
    scale("scores without the scale 1/√D, forward and backward", lambda p: 1.0),
    scale("scores scaled by 1/D instead of 1/√D", lambda p: 1 / sizes(p)[0]),
    scale("scores scaled by √D instead of 1/√D", lambda p: sizes(p)[0] ** 0.5),
    scale(
        "scores scaled by 1/√(H·D), the width of all heads, instead of 1/√D",
        lambda p: (sizes(p)[0] * sizes(p)[1]) ** -0.5,
    ),
    scale(
        "scores scaled by 1/√(G·D), the width of all key/value heads, instead of 1/√D",
        lambda p: (sizes(p)[0] * sizes(p)[2]) ** -0.5,
    ),
    scale(
        "scores scaled by 1/√H, the number of heads, instead of 1/√D", lambda p: sizes(p)[1] ** -0.5
    ),
    scale("scores scaled by 1/√(D/2) instead of 1/√D", lambda p: (sizes(p)[0] / 2) ** -0.5),
    scale("scores scaled by 1/√(2·D) instead of 1/√D", lambda p: (sizes(p)[0] * 2) ** -0.5),
    scale(
        "scores scaled by log₂e once too often: a base-2 exponential's factor",
        lambda p: right_scale(p) * np.log2(np.e),
    ),
    scale(
        "scores scaled by ln 2 once too often: a base-2 exponential without its factor log₂e",
        lambda p: right_scale(p) * np.log(2),
    ),
    *(scale(f"scores with a temperature: their scale × {f:g}", temperature(f)) for f in (0.5, 2.0)),
    scale(
        "the scale 1/√D is applied twice in the backward",
        right_scale,
        lambda p: right_scale(p) ** 2,
    ),
    scale("scores unscaled in the forward, scaled in the backward", lambda p: 1.0, right_scale),
    scale(
        "the backward multiplies by √D instead of 1/√D", right_scale, lambda p: sizes(p)[0] ** 0.5
    ),
)


def of_hidden(size: int) -> type[Plain]:
    """Scores scaled by the model's width."""
    return scale("scores scaled by 1/√C, the hidden size, instead of 1/√D", lambda p: size**-0.5)


def partly(sentence: str, change: Callable[..., tuple[Array, ...]]) -> type[Plain]:
    """change(plain, dq, dk, dv) in place of the right three."""

    def attention_bwd(
        self: Plain, do: Array, q: Array, k: Array, v: Array, p: Array
    ) -> tuple[Array, ...]:
        return change(self, *Plain.attention_bwd(self, do, q, k, v, p))

    return variant(sentence, attention_bwd=attention_bwd)


def back_scale(plain: Plain) -> float:
    return 1 / right_scale(plain)


PARTLY = (
    partly("dk without the factor 1/√D", lambda p, dq, dk, dv: (dq, dk * back_scale(p), dv)),
    partly("dq without the factor 1/√D", lambda p, dq, dk, dv: (dq * back_scale(p), dk, dv)),
    partly("dk with the factor 1/√D twice", lambda p, dq, dk, dv: (dq, dk / back_scale(p), dv)),
    partly("dq with the factor 1/√D twice", lambda p, dq, dk, dv: (dq / back_scale(p), dk, dv)),
    partly(
        "dv with the factor 1/√D of the scores", lambda p, dq, dk, dv: (dq, dk, dv / back_scale(p))
    ),
    partly("dk treated as a constant's: 0", lambda p, dq, dk, dv: (dq, 0 * dk, dv)),
    partly("dq treated as a constant's: 0", lambda p, dq, dk, dv: (0 * dq, dk, dv)),
    partly("dv treated as a constant's: 0", lambda p, dq, dk, dv: (dq, dk, 0 * dv)),
    partly("dk and dv are 0", lambda p, dq, dk, dv: (dq, 0 * dk, 0 * dv)),
    partly(
        "dk and dv summed over the batch",
        lambda p, dq, dk, dv: (dq, 0 * dk + dk.sum(0), 0 * dv + dv.sum(0)),
    ),
    *(
        partly(
            f"{names} averaged over the query heads of a group instead of summed",
            lambda p, dq, dk, dv, a=a, b=b: (dq, dk * share(p, a), dv * share(p, b)),
        )
        for names, a, b in (("dk", True, False), ("dv", False, True))
    ),
    variant(
        "dk and dv of groups that are not shared out: dv alone of the last query head of each group",
        unshare_v=LastOfGroup.unshare,
    ),
    variant("dv alone of the first query head of each group", unshare_v=FirstOfGroup.unshare),
    variant(
        "dk alone of the last query head of each group",
        unshare=LastOfGroup.unshare,
        unshare_v=lambda self, d: Plain.unshare(self, d),
    ),
    variant(
        "dk alone of the first query head of each group",
        unshare=FirstOfGroup.unshare,
        unshare_v=lambda self, d: Plain.unshare(self, d),
    ),
    variant(
        "key heads tiled (h mod G) where values are repeated",
        softmax=lambda self, q, k: Plain.softmax(
            self,
            q,
            np.tile(
                k[:, :, :: self.set.heads // self.set.groups],
                (1, 1, self.set.heads // self.set.groups, 1),
            ),
        ),
    ),
)


def share(plain: Plain, wrong: bool) -> float:
    return plain.set.groups / plain.set.heads if wrong else 1.0


KNOWN: tuple[type[Plain], ...] = (
    RebuiltWithoutRope,
    RebuiltWithoutBias,
    RebuiltWithoutLora,
    RebuiltWithoutNorm,
    OnDevice,
    TiledHeads,
    TiledHeadsBackward,
    TiledHeadsForward,
    MeanOverGroup,
    FirstOfGroup,
    LastOfGroup,
    FirstKeyHead,
    NoScoreScale,
    DetachedProbabilities,
    SwappedQK,
    TransposedScores,
    NotTransposedProbabilities,
    ValuesAsKeys,
    QueriesWithValues,
    NoProbabilitiesInValues,
    NoAttentionBackward,
    SoftmaxWithoutRowSum,
    SoftmaxAsSigmoid,
    NoMask,
    *SOFTMAX,
    *MASKS,
    *SCALES,
    *PARTLY,
)
