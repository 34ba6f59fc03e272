"""The mistakes people make in this backward, each as one overridden step of Plain.

The first line of a docstring is the name by which a report calls the mistake. Mistakes of the loss
need a whole model, the others show in one block.
"""

from typing import Any

import numpy as np

from mesp_ref.golden.plain import Arrays, Plain, Weights
from mesp_ref.ops import IGNORED, Array


class NoInverseRope(Plain):
    """backward without inverse RoPE: dq and dk are not rotated back"""

    def rotate_bwd(self, dy: Array) -> Array:
        return dy


class RopeTwice(Plain):
    """backward rotates dq and dk forward again instead of back"""

    def rotate_bwd(self, dy: Array) -> Array:
        return self.rotate(dy)


class NeighbourRope(Plain):
    """RoPE pairs neighbours (2i, 2i+1) instead of halves (i, i + D/2)"""

    def rotate(self, x: Array) -> Array:
        return _neighbours(super().rotate, x)

    def rotate_bwd(self, dy: Array) -> Array:
        return _neighbours(super().rotate_bwd, dy)


def _neighbours(turn: Any, x: Array) -> Array:
    d = x.shape[-1]
    order = np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])
    y = np.empty_like(x)
    y[..., order] = turn(x[..., order])
    return y


class NoRope(Plain):
    """no RoPE at all"""

    def rotate(self, x: Array) -> Array:
        return x

    def rotate_bwd(self, dy: Array) -> Array:
        return dy


class _Rebuilt(Plain):
    bias, turn, branch = True, True, True

    def rebuilt_qkv(self, w: Weights, res: Arrays) -> tuple[Array, ...]:
        def rebuilt(letter: str) -> Array:
            part = f"self_attn.{letter}_proj"
            y = res["n1"] @ w[f"{part}.weight"].T
            if self.branch:
                h = res["n1"] @ w[f"{part}.lora_A.weight"].T
                y = y + self.scale() * h @ w[f"{part}.lora_B.weight"].T
            if self.bias:
                y = y + w[f"{part}.bias"]
            y = self.heads(y)
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


class MeanOverGroup(Plain):
    """dk and dv averaged over the query heads of a group instead of summed"""

    def unshare(self, dk: Array) -> Array:
        return super().unshare(dk) * self.set.groups / self.set.heads


class FirstOfGroup(Plain):
    """dk and dv of only the first query head of each group"""

    def unshare(self, dk: Array) -> Array:
        return dk[:, :, :: self.set.heads // self.set.groups]


class NoScoreScale(Plain):
    """attention backward without the factor 1/√D"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        dq, dk, dv = super().attention_bwd(do, q, k, v, p)
        return dq * self.set.head_dim**0.5, dk * self.set.head_dim**0.5, dv


class DetachedProbabilities(Plain):
    """attention probabilities treated as constants: dq and dk are 0"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        dq, dk, dv = super().attention_bwd(do, q, k, v, p)
        return 0 * dq, 0 * dk, dv


class SwappedQK(Plain):
    """dq formed with q and dk with k: the factors of the scores swapped"""

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        ks, vs, scale = self.share(k), self.share(v), self.set.head_dim**-0.5
        ds = self.softmax_bwd(np.einsum("nqhd,nkhd->nhqk", do, vs), p) * scale
        dq, dk = np.einsum("nhqk,nkhd->nqhd", ds, q), np.einsum("nhqk,nqhd->nkhd", ds, ks)
        return dq, self.unshare(dk), self.unshare(np.einsum("nhqk,nqhd->nkhd", p, do))


class SoftmaxWithoutRowSum(Plain):
    """softmax backward without the row sum: ds = p ⊙ dp"""

    def softmax_bwd(self, dp: Array, p: Array) -> Array:
        return p * dp


class SoftmaxAsSigmoid(Plain):
    """softmax backward of single entries: ds = dp ⊙ p ⊙ (1 − p)"""

    def softmax_bwd(self, dp: Array, p: Array) -> Array:
        return dp * p * (1 - p)


class NoMask(Plain):
    """attention without the causal mask"""

    def visible(self, t: int) -> Array:
        return np.ones((t, t), bool)


class NormScaleOnly(Plain):
    """RMSNorm backward without the term along x: dx = dy ⊙ w / n"""

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        return dy * w * self.inverse_rms(x)


class NormWithoutWeight(Plain):
    """RMSNorm backward without the norm's weight"""

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        return super().norm_bwd(dy, x, np.ones_like(w))


class NormSumForMean(Plain):
    """RMSNorm backward with a sum over channels where the mean belongs"""

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        r, u = self.inverse_rms(x), dy * w
        return u * r - x * (u * x).sum(axis=-1, keepdims=True) * r**3


class NormPassedThrough(Plain):
    """RMSNorm skipped in the backward: dx = dy"""

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        return dy


class SiluSigmoidOnly(Plain):
    """SiLU's derivative taken as σ alone, without gate·σ·(1 − σ)"""

    def silu_slope(self, gate: Array) -> Array:
        return 1 / (1 + np.exp(-gate))


class SiluAsSigmoid(Plain):
    """SiLU's derivative taken as that of the sigmoid, σ·(1 − σ)"""

    def silu_slope(self, gate: Array) -> Array:
        return np.exp(-gate) / (1 + np.exp(-gate)) ** 2


class SwappedGateUp(Plain):
    """silu applied to up instead of gate in the backward"""

    def swiglu_bwd(self, dz: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        dup, dgate = super().swiglu_bwd(dz, up, gate)
        return dgate, dup


class UpWithoutSilu(Plain):
    """dup formed with gate instead of silu(gate)"""

    def swiglu_bwd(self, dz: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        return super().swiglu_bwd(dz, gate, up)[0], dz * gate


class _Without(Plain):
    term = ""

    def add(self, what: str, a: Array, b: Array) -> Array:
        return a if what == self.term else super().add(what, a, b)


class NoMlpResidual(_Without):
    """the residual path around the MLP is missing in the backward"""

    term = "residual around the MLP"


class NoAttentionResidual(_Without):
    """the residual path around the attention is missing in the backward"""

    term = "residual around the attention"


class NoFrozenWeight(_Without):
    """dx of a LoRA layer without dy·W: the frozen weight's term is missing"""

    term = "frozen weight"


class NoUpPath(_Without):
    """the gradient through up_proj is missing before the second norm"""

    term = "up_proj"


class NoKeyPath(_Without):
    """the gradient through k_proj is missing before the first norm"""

    term = "self_attn.k_proj"


class NoValuePath(_Without):
    """the gradient through v_proj is missing before the first norm"""

    term = "self_attn.v_proj"


class NoLoraPath(Plain):
    """dx of a LoRA layer without dh·A: the adapter's term is missing"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        _, dA, dB = super().lora_bwd(dy, x, w, A, B)
        return dy @ w, dA, dB


class NoScaleInBackward(Plain):
    """the LoRA scale alpha/rank is missing in the backward"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        _, dA, dB = super().lora_bwd(dy, x, w, A, B)
        return dy @ (w + B @ A), dA / self.scale(), dB / self.scale()


class AlphaForScale(Plain):
    """the LoRA scale is alpha instead of alpha/rank, forward and backward"""

    def scale(self) -> float:
        return self.set.alpha


class UnitScale(Plain):
    """the LoRA scale is 1 instead of alpha/rank, forward and backward"""

    def scale(self) -> float:
        return 1.0


class RootScale(Plain):
    """the LoRA scale is alpha/√rank (rsLoRA) instead of alpha/rank, forward and backward"""

    def scale(self) -> float:
        return self.set.alpha / self.set.rank**0.5


class ScaledTwice(Plain):
    """the LoRA scale is applied twice to dB"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        dx, dA, dB = super().lora_bwd(dy, x, w, A, B)
        return dx, dA, dB * self.scale()


class UnscaledA(Plain):
    """the LoRA scale is missing in dA"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        dx, dA, dB = super().lora_bwd(dy, x, w, A, B)
        return dx, dA / self.scale(), dB


class LastTokenOnly(Plain):
    """LoRA gradients of the last token only: not summed over positions"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        dx, _, _ = super().lora_bwd(dy, x, w, A, B)
        _, dA, dB = super().lora_bwd(dy[:, -1:], x[:, -1:], w, A, B)
        return dx, dA, dB


class FirstSequenceOnly(Plain):
    """LoRA gradients of the first sequence of the batch only"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        dx, _, _ = super().lora_bwd(dy, x, w, A, B)
        _, dA, dB = super().lora_bwd(dy[:1], x[:1], w, A, B)
        return dx, dA, dB


class EpsOutside(Plain):
    """RMSNorm with eps outside the root: n = sqrt(mean(x²)) + eps"""

    def inverse_rms(self, x: Array) -> Array:
        return 1 / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + self.set.eps)


class SumOverTokens(Plain):
    """the loss is a sum over tokens instead of their mean"""

    def count(self, targets: Array) -> int:
        return 1


class MeanOverAll(Plain):
    """the loss is divided by all positions instead of those with a label"""

    def count(self, targets: Array) -> int:
        return int(targets.size)


class IgnoresTokenZero(Plain):
    """labels of token id 0 are ignored as if they were padding"""

    def targets(self, labels: Array) -> Array:
        moved = super().targets(labels)
        return np.where(moved == 0, IGNORED, moved)


class UnshiftedLabels(Plain):
    """labels are not shifted: each position predicts itself"""

    def targets(self, labels: Array) -> Array:
        return labels


class CountsIgnored(Plain):
    """labels of −100 count, as token 0"""

    def targets(self, labels: Array) -> Array:
        moved = super().targets(labels)
        moved[:, :-1][moved[:, :-1] == IGNORED] = 0
        return moved


OF_BLOCKS: tuple[type[Plain], ...] = (
    NoInverseRope, RopeTwice, NeighbourRope, NoRope, RebuiltWithoutRope, RebuiltWithoutBias,
    RebuiltWithoutLora, OnDevice, TiledHeads, TiledHeadsBackward, MeanOverGroup, FirstOfGroup,
    NoScoreScale, DetachedProbabilities, SwappedQK, SoftmaxWithoutRowSum, SoftmaxAsSigmoid, NoMask,
    NormScaleOnly, NormWithoutWeight, NormSumForMean, NormPassedThrough, SiluSigmoidOnly,
    SiluAsSigmoid, SwappedGateUp, UpWithoutSilu, NoMlpResidual, NoAttentionResidual,
    NoFrozenWeight, NoUpPath, NoKeyPath, NoValuePath, NoLoraPath, NoScaleInBackward, AlphaForScale,
    UnitScale, RootScale, ScaledTwice, UnscaledA, LastTokenOnly, FirstSequenceOnly, EpsOutside,
)  # fmt: skip
OF_LOSSES: tuple[type[Plain], ...] = (
    SumOverTokens, MeanOverAll, IgnoresTokenZero, UnshiftedLabels, CountsIgnored,
)  # fmt: skip


def title(mistake: type[Plain]) -> str:
    """How a report calls a mistake."""
    return (mistake.__doc__ or "").strip()
