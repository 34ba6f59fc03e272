"""Qwen2 with LoRA written once more, so that a step can be wrong, or rounded, on purpose.

Every operation and every fan-out is a method: a mistake is a subclass that overrides one of them
(see mistakes.py), an emulation of a precision one that overrides `keep`. It shares no code with
`ops`, keeps everything, and computes in float64 or float32. Names of tensors are those of `trace`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.ops import IGNORED, Array


class Setting(NamedTuple):
    """What a block computes with. Weights by the part of their name after model.layers.N."""

    heads: int
    groups: int
    head_dim: int
    eps: float
    rank: int
    alpha: float
    cos: Array  # [T, D/2]
    sin: Array

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


Weights = Mapping[str, Array]
Arrays = dict[str, Array]


class Plain:
    """Forward and backward of a block and of a model, step by step, in `dtype`."""

    dtype: Any = np.float64

    def __init__(self, setting: Setting):
        self.set, self.trace = setting, Arrays()

    # -- operations ---------------------------------------------------------------------------

    def keep(self, name: str, value: Array) -> Array:
        """Record a tensor; what is returned goes on."""
        self.trace[name] = value
        return value

    def inverse_rms(self, x: Array) -> Array:
        return 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.set.eps)

    def norm(self, x: Array, w: Array) -> Array:
        return x * self.inverse_rms(x) * w

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        r, u = self.inverse_rms(x), dy * w
        return u * r - x * (u * x).mean(axis=-1, keepdims=True) * r**3

    def rotate(self, x: Array) -> Array:
        x1, x2 = np.split(x, 2, axis=-1)
        c, s = self.set.cos[:, None], self.set.sin[:, None]
        return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1)

    def rotate_bwd(self, dy: Array) -> Array:
        y1, y2 = np.split(dy, 2, axis=-1)
        c, s = self.set.cos[:, None], self.set.sin[:, None]
        return np.concatenate([y1 * c + y2 * s, y2 * c - y1 * s], axis=-1)

    def scale(self) -> float:
        return self.set.scale

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        """dx, dA, dB."""
        s = self.scale()
        dh, h = s * (dy @ B), x @ A.T
        dx = self.add("frozen weight", dh @ A, dy @ w)
        return dx, flat(dh).T @ flat(x), s * (flat(dy).T @ flat(h))

    def share(self, k: Array) -> Array:
        """Key/value heads [N,T,G,D] as seen by query heads [N,T,H,D]."""
        return np.repeat(k, self.set.heads // self.set.groups, axis=2)

    def unshare(self, dk: Array) -> Array:
        n, t, _, d = dk.shape
        return dk.reshape(n, t, self.set.groups, -1, d).sum(axis=3)

    def visible(self, t: int) -> Array:
        return np.tri(t, dtype=bool)

    def softmax(self, q: Array, k: Array) -> Array:
        s = np.einsum("nqhd,nkhd->nhqk", q, k) * self.set.head_dim**-0.5
        s = np.where(self.visible(q.shape[1]), s, -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        return p / p.sum(axis=-1, keepdims=True)

    def softmax_bwd(self, dp: Array, p: Array) -> Array:
        return p * (dp - (dp * p).sum(axis=-1, keepdims=True))

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        k, v, scale = self.share(k), self.share(v), self.set.head_dim**-0.5
        ds = self.softmax_bwd(np.einsum("nqhd,nkhd->nhqk", do, v), p) * scale
        dq, dk = np.einsum("nhqk,nkhd->nqhd", ds, k), np.einsum("nhqk,nqhd->nkhd", ds, q)
        return dq, self.unshare(dk), self.unshare(np.einsum("nhqk,nqhd->nkhd", p, do))

    def silu(self, gate: Array) -> Array:
        return gate / (1 + np.exp(-gate))

    def silu_slope(self, gate: Array) -> Array:
        sig = 1 / (1 + np.exp(-gate))
        return sig + gate * sig * (1 - sig)

    def swiglu_bwd(self, dz: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        return dz * up * self.silu_slope(gate), dz * self.silu(gate)

    def add(self, what: str, a: Array, b: Array) -> Array:
        """Where two gradients meet; `what` names b."""
        return a + b

    def cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """Loss and dlogits, labels as given."""
        labels = self.targets(labels)
        counted = labels != IGNORED
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        onehot = np.eye(logits.shape[-1], dtype=logits.dtype)[np.where(counted, labels, 0)]
        count = self.count(labels)
        loss = -np.log((p * onehot).sum(axis=-1))[counted].sum() / count
        return np.asarray(loss), (p - onehot) * counted[..., None] / count

    def targets(self, labels: Array) -> Array:
        """The label that each position predicts."""
        moved = np.full_like(labels, IGNORED)
        moved[:, :-1] = labels[:, 1:]
        return moved

    def count(self, targets: Array) -> int:
        return max(1, int((targets != IGNORED).sum()))

    # -- one block ----------------------------------------------------------------------------

    def project(self, w: Weights, part: str, x: Array) -> Array:
        A, B, b = w[f"{part}.lora_A.weight"], w[f"{part}.lora_B.weight"], w.get(f"{part}.bias")
        h = self.keep(f"{part}.h", x @ A.T)
        y = x @ w[f"{part}.weight"].T + self.scale() * (h @ B.T)
        return self.keep(part, y if b is None else y + b)

    def project_bwd(self, w: Weights, part: str, dy: Array, x: Array) -> Array:
        dy = self.keep(f"{part}.grad", dy)
        A, B = w[f"{part}.lora_A.weight"], w[f"{part}.lora_B.weight"]
        dx, dA, dB = self.lora_bwd(dy, x, w[f"{part}.weight"], A, B)
        self.keep(f"{part}.lora_A.weight.grad", dA)
        self.keep(f"{part}.lora_B.weight.grad", dB)
        self.keep(f"{part}.weight.grad", flat(dy).T @ flat(x))
        if f"{part}.bias" in w:
            self.keep(f"{part}.bias.grad", flat(dy).sum(axis=0))
        return dx

    def heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.set.head_dim)

    def qkv(self, w: Weights, n: Array) -> tuple[Array, ...]:
        q, k, v = (self.heads(self.project(w, f"self_attn.{c}_proj", n)) for c in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        return self.keep("self_attn.q_rope", q), self.keep("self_attn.k_rope", k), v

    def rebuilt_qkv(self, w: Weights, res: Arrays) -> tuple[Array, ...]:
        """q, k and v as the backward of attention sees them."""
        return res["q"], res["k"], res["v"]

    def block(self, w: Weights, x: Array) -> tuple[Array, Arrays]:
        """Output and residuals of a block."""
        res = {
            "x": x,
            "n1": self.keep("input_layernorm", self.norm(x, w["input_layernorm.weight"])),
        }
        res["q"], res["k"], res["v"] = self.qkv(w, res["n1"])
        res["p"] = self.keep("self_attn.attention.p", self.softmax(res["q"], self.share(res["k"])))
        o = np.einsum("nhqk,nkhd->nqhd", res["p"], self.share(res["v"]))
        res["o"] = flat_heads(self.keep("self_attn.attention", o))
        res["a"] = self.keep("after_attention", x + self.project(w, "self_attn.o_proj", res["o"]))
        n2 = self.norm(res["a"], w["post_attention_layernorm.weight"])
        res["n2"] = self.keep("post_attention_layernorm", n2)
        res["gate"] = self.project(w, "mlp.gate_proj", res["n2"])
        res["up"] = self.project(w, "mlp.up_proj", res["n2"])
        silu = self.keep("mlp.swiglu.silu", self.silu(res["gate"]))
        res["z"] = self.keep("mlp.swiglu", silu * res["up"])
        return self.keep("y", res["a"] + self.project(w, "mlp.down_proj", res["z"])), res

    def norm_back(self, w: Weights, part: str, dy: Array, x: Array) -> Array:
        dy = self.keep(f"{part}.grad", dy)
        self.keep(f"{part}.weight.grad", flat(dy * x * self.inverse_rms(x)).sum(axis=0))
        return self.norm_bwd(dy, x, w[f"{part}.weight"])

    def block_bwd(self, w: Weights, dy: Array, res: Arrays) -> Array:
        """dx; the parameters' gradients are kept."""
        dz = self.project_bwd(w, "mlp.down_proj", dy, res["z"])
        dz = self.keep("mlp.swiglu.grad", dz)
        dgate, dup = self.swiglu_bwd(dz, res["gate"], res["up"])
        dn = self.project_bwd(w, "mlp.gate_proj", dgate, res["n2"])
        dn = self.add("up_proj", dn, self.project_bwd(w, "mlp.up_proj", dup, res["n2"]))
        da = self.norm_back(w, "post_attention_layernorm", dn, res["a"])
        da = self.keep("after_attention.grad", self.add("residual around the MLP", da, dy))
        do = self.heads(self.project_bwd(w, "self_attn.o_proj", da, res["o"]))
        do = self.keep("self_attn.attention.grad", do)
        q, k, v = self.rebuilt_qkv(w, res)
        dq, dk, dv = self.attention_bwd(do, q, k, v, res["p"])
        dq = self.rotate_bwd(self.keep("self_attn.q_rope.grad", dq))
        dk = self.rotate_bwd(self.keep("self_attn.k_rope.grad", dk))
        dn = self.project_bwd(w, "self_attn.q_proj", flat_heads(dq), res["n1"])
        for letter, d in (("k", dk), ("v", dv)):
            part = f"self_attn.{letter}_proj"
            dn = self.add(part, dn, self.project_bwd(w, part, flat_heads(d), res["n1"]))
        dx = self.norm_back(w, "input_layernorm", dn, res["x"])
        return self.keep("dx", self.add("residual around the attention", dx, da))

    # -- the whole model ----------------------------------------------------------------------

    def model(self, layers: Sequence[Weights], top: Weights, ids: Array, labels: Array) -> Arrays:
        """Trace of a step: every tensor under its name in the whole model."""
        whole, kept = Arrays(), []
        x = self.keep("model.embed_tokens", top["embed"][ids])
        for number, w in enumerate(layers):
            x, res = self.block(w, x)
            kept.append(res)
            whole |= self._named(number)
        n = self.keep("model.norm", self.norm(x, top["norm"]))
        logits = self.keep("lm_head", n @ top["head"].T)
        loss, dlogits = self.cross_entropy(logits, labels)
        self.keep("loss", loss)
        dlogits = self.keep("lm_head.grad", dlogits)
        dn = self.keep("model.norm.grad", dlogits @ top["head"])
        self.keep("model.norm.weight.grad", flat(dn * x * self.inverse_rms(x)).sum(axis=0))
        dx = self.norm_bwd(dn, x, top["norm"])
        whole |= self.trace
        for number in reversed(range(len(layers))):
            whole[f"model.layers.{number}.grad"] = dx
            self.trace = Arrays()
            dx = self.block_bwd(layers[number], dx, kept.pop())
            whole |= self._named(number)
        whole["model.embed_tokens.grad"] = dx
        return whole | self._embedding(ids, dx, flat(dlogits).T @ flat(n), top)

    def _embedding(self, ids: Array, dx: Array, dhead: Array, top: Weights) -> Arrays:
        dw = np.zeros_like(top["embed"])
        np.add.at(dw, ids, dx)
        if top["head"] is top["embed"]:
            return {"model.embed_tokens.weight.grad": dw + dhead}
        return {"model.embed_tokens.weight.grad": dw, "lm_head.weight.grad": dhead}

    def _named(self, number: int) -> Arrays:
        """The block's tensors under their names in the model; empties the block's trace."""
        found, self.trace = self.trace, Arrays()
        return {model_name(name, number): a for name, a in found.items() if name != "dx"}


def flat(x: Array) -> Array:
    """All leading axes as one."""
    return x.reshape(-1, x.shape[-1])


def flat_heads(x: Array) -> Array:
    """[N,T,H,D] as [N,T,H·D]."""
    return x.reshape(*x.shape[:2], -1)


def model_name(name: str, number: int) -> str:
    """A block's tensor as `trace` calls it in a model."""
    if name == "y":
        return f"model.layers.{number}"
    if name.startswith("model.") or name in ("lm_head", "loss", "lm_head.grad"):
        return name
    prefix = "base_model.model." if ".lora_" in name else ""
    return f"{prefix}model.layers.{number}.{name}"
