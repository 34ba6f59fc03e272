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
    number = 0  # of the layer that is worked on
    at = ""  # the part of a block that is worked on: "self_attn.q_proj", "input_layernorm"

    def __init__(self, setting: Setting):
        self.set, self.trace = setting, Arrays()

    def stepped(self, name: str, value: Array) -> Array:
        """A matrix after a step of an optimiser."""
        return value

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

    def norm_params(self, dy: Array, x: Array, w: Array) -> Array:
        return flat(dy * x * self.inverse_rms(x)).sum(axis=0)

    def linear(self, x: Array, w: Array, b: Array | None) -> Array:
        return x @ w.T if b is None else x @ w.T + b

    def linear_bwd(self, dy: Array, w: Array) -> Array:
        return dy @ w

    def linear_params(self, dy: Array, x: Array) -> tuple[Array, Array]:
        """dw, db."""
        return flat(dy).T @ flat(x), flat(dy).sum(axis=0)

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

    def lora(self, x: Array, w: Array, b: Array | None, A: Array, B: Array) -> Array:
        h = self.keep(f"{self.at}.h", x @ A.T)
        return self.linear(x, w, b) + self.scale() * (h @ B.T)

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        """dx, dA, dB."""
        s = self.scale()
        dh, h = s * (dy @ B), x @ A.T
        dx = self.add("frozen weight", dh @ A, self.linear_bwd(dy, w))
        return dx, flat(dh).T @ flat(x), s * (flat(dy).T @ flat(h))

    def share(self, k: Array) -> Array:
        """Key/value heads [N,T,G,D] as seen by query heads [N,T,H,D]."""
        return np.repeat(k, self.set.heads // self.set.groups, axis=2)

    def unshare(self, dk: Array) -> Array:
        n, t, _, d = dk.shape
        return dk.reshape(n, t, self.set.groups, -1, d).sum(axis=3)

    def visible(self, tq: int, tk: int) -> Array:
        return np.tri(tq, tk, tk - tq, dtype=bool)

    def score_scale(self) -> float:
        return self.set.head_dim**-0.5

    def score_scale_bwd(self) -> float:
        return self.score_scale()

    def probabilities(self, s: Array) -> Array:
        s = np.where(self.visible(*s.shape[-2:]), s, -np.inf)
        p = np.exp(s - np.maximum(s.max(axis=-1, keepdims=True), np.finfo(s.dtype).min))
        total: Array = p.sum(axis=-1, keepdims=True)
        return p / np.where(total > 0, total, 1)

    def softmax(self, q: Array, k: Array) -> Array:
        return self.probabilities(np.einsum("nqhd,nkhd->nhqk", q, k) * self.score_scale())

    def mix(self, p: Array, v: Array) -> Array:
        return np.einsum("nhqk,nkhd->nqhd", p, v)

    def attention(self, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """p and o."""
        p = self.keep("self_attn.attention.p", self.softmax(q, self.share(k)))
        return p, self.mix(p, self.share(v))

    def softmax_bwd(self, dp: Array, p: Array) -> Array:
        return p * (dp - (dp * p).sum(axis=-1, keepdims=True))

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        k, v = self.share(k), self.share(v)
        ds = self.softmax_bwd(np.einsum("nqhd,nkhd->nhqk", do, v), p) * self.score_scale_bwd()
        dq, dk = np.einsum("nhqk,nkhd->nqhd", ds, k), np.einsum("nhqk,nqhd->nkhd", ds, q)
        return dq, self.unshare(dk), self.unshare_v(np.einsum("nhqk,nqhd->nkhd", p, do))

    def unshare_v(self, dv: Array) -> Array:
        return self.unshare(dv)

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

    def swiglu(self, gate: Array, up: Array) -> tuple[Array, Array]:
        """silu and z."""
        silu = self.keep("mlp.swiglu.silu", self.silu(gate))
        return silu, silu * up

    def cross_entropy(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Loss and dlogits of logits [N, T, V] and the label that each position predicts."""
        counted = targets != IGNORED
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        total = e.sum(axis=-1, keepdims=True)
        lse = np.log(total) + logits.max(axis=-1, keepdims=True)
        onehot = np.zeros_like(logits)
        np.put_along_axis(onehot, np.where(counted, targets, 0)[..., None], 1, axis=-1)
        share = self.shares(targets).astype(logits.dtype)
        loss = (self.losses(logits, lse, onehot)[counted] * share[counted]).sum()
        rows = self.row_gradient(e / total, lse, onehot) * self.kept(counted)[..., None]
        return np.asarray(loss), rows * share[..., None]

    def scaled_loss(self, dloss: Array, dlogits: Array) -> Array:
        """The gradient for the cotangent of the loss."""
        return dloss * dlogits

    def losses(self, logits: Array, lse: Array, onehot: Array) -> Array:
        """Of every row."""
        return lse[..., 0] - (logits * onehot).sum(axis=-1)

    def row_gradient(self, p: Array, lse: Array, onehot: Array) -> Array:
        return p - onehot

    def kept(self, counted: Array) -> Array:
        """Rows that have a gradient."""
        return counted

    def shares(self, targets: Array) -> Array:
        """What each row weighs in the mean."""
        return np.full(targets.shape, 1 / self.count(targets))

    def targets(self, labels: Array) -> Array:
        """The label that each position predicts."""
        moved = np.full_like(labels, IGNORED)
        moved[:, :-1] = labels[:, 1:]
        return moved

    def labels(self, targets: Array) -> Array:
        """Which of them count, and as what."""
        return targets

    def count(self, targets: Array) -> int:
        return max(1, int((targets != IGNORED).sum()))

    def embed(self, w: Array, ids: Array) -> Array:
        return w[ids]

    def embed_bwd(self, dy: Array, ids: Array, w: Array) -> Array:
        dw = np.zeros_like(w)
        np.add.at(dw, ids, dy)
        return dw

    # -- weights in few bits ------------------------------------------------------------------

    def unpack(self, words: Array, bits: int) -> Array:
        """Codes [out, words, codes of a word], the first in the lowest bits."""
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        return (words[..., None] >> shifts) & np.uint32(2**bits - 1)

    def decode(self, codes: Array, scales: Array, biases: Array, bits: int) -> Array:
        """scale·q + bias of codes [out, in], scales and biases [out, groups]."""
        group = codes.shape[1] // scales.shape[1]
        return codes * np.repeat(scales, group, axis=1) + np.repeat(biases, group, axis=1)

    # -- optimisers: one step of one tensor, in `state` what it keeps -----------------------------

    def sgd(self, w: Array, g: Array, state: Arrays, t: int, at: Any) -> Array:
        state["u"] = at["momentum"] * state.get("u", 0.0) + g + at["weight_decay"] * w
        return w - at["lr"] * state["u"]

    def adamw(self, w: Array, g: Array, state: Arrays, t: int, at: Any) -> Array:
        b1, b2 = at["beta1"], at["beta2"]
        state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
        state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g**2
        mean, square = state["m"] / (1 - b1**t), state["v"] / (1 - b2**t)
        decayed = w * (1 - at["lr"] * at["weight_decay"])
        return decayed - at["lr"] * mean / (np.sqrt(square) + at["eps"])

    def slope(self, up: float, down: float, eps: float) -> float:
        """MeZO's derivative along z from the losses of its two sides."""
        return (up - down) / (2 * eps)

    def mezo_loss(self, up: float, down: float) -> float:
        return (up + down) / 2

    def mezo(self, w: Array, g: float, z: Array, at: Any) -> Array:
        return w - at["lr"] * g * z

    # -- one block ----------------------------------------------------------------------------

    def project(self, w: Weights, part: str, x: Array) -> Array:
        self.at = part
        A, B, b = w[f"{part}.lora_A.weight"], w[f"{part}.lora_B.weight"], w.get(f"{part}.bias")
        return self.keep(part, self.lora(x, w[f"{part}.weight"], b, A, B))

    def project_bwd(self, w: Weights, part: str, dy: Array, x: Array) -> Array:
        self.at = part
        dy = self.keep(f"{part}.grad", dy)
        A, B = w[f"{part}.lora_A.weight"], w[f"{part}.lora_B.weight"]
        dx, dA, dB = self.lora_bwd(dy, x, w[f"{part}.weight"], A, B)
        dw, db = self.linear_params(dy, x)
        self.keep(f"{part}.lora_A.weight.grad", dA)
        self.keep(f"{part}.lora_B.weight.grad", dB)
        self.keep(f"{part}.weight.grad", dw)
        if f"{part}.bias" in w:
            self.keep(f"{part}.bias.grad", db)
        return dx

    def norm_at(self, w: Weights, part: str, x: Array) -> Array:
        self.at = part
        return self.keep(part, self.norm(x, w[f"{part}.weight"]))

    def norm_back(self, w: Weights, part: str, dy: Array, x: Array) -> Array:
        self.at = part
        dy = self.keep(f"{part}.grad", dy)
        self.keep(f"{part}.weight.grad", self.norm_params(dy, x, w[f"{part}.weight"]))
        return self.norm_bwd(dy, x, w[f"{part}.weight"])

    def heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.set.head_dim)

    def rotate_at(self, part: str, x: Array) -> Array:
        self.at = part
        return self.keep(part, self.rotate(x))

    def rotate_back(self, part: str, dy: Array) -> Array:
        self.at = part
        return self.rotate_bwd(self.keep(f"{part}.grad", dy))

    def qkv(self, w: Weights, n: Array) -> tuple[Array, ...]:
        q, k, v = (self.heads(self.project(w, f"self_attn.{c}_proj", n)) for c in "qkv")
        return self.rotate_at("self_attn.q_rope", q), self.rotate_at("self_attn.k_rope", k), v

    def rebuilt_qkv(self, w: Weights, res: Arrays) -> tuple[Array, ...]:
        """q, k and v as the backward of attention sees them."""
        return res["q"], res["k"], res["v"]

    def block(self, w: Weights, x: Array) -> tuple[Array, Arrays]:
        """Output and residuals of a block."""
        res = {"x": x, "n1": self.norm_at(w, "input_layernorm", x)}
        res["q"], res["k"], res["v"] = self.qkv(w, res["n1"])
        res["p"], o = self.attention(res["q"], res["k"], res["v"])
        res["o"] = flat_heads(self.keep("self_attn.attention", o))
        mixed = self.project(w, "self_attn.o_proj", res["o"])
        res["a"] = self.keep(
            "after_attention", self.join("residual around the attention", x, mixed)
        )
        res["n2"] = self.norm_at(w, "post_attention_layernorm", res["a"])
        res["gate"] = self.project(w, "mlp.gate_proj", res["n2"])
        res["up"] = self.project(w, "mlp.up_proj", res["n2"])
        res["z"] = self.keep("mlp.swiglu", self.swiglu(res["gate"], res["up"])[1])
        down = self.project(w, "mlp.down_proj", res["z"])
        return self.keep("y", self.join("residual around the MLP", res["a"], down)), res

    def join(self, what: str, x: Array, f: Array) -> Array:
        """x + f(norm(x)); `what` names x."""
        return x + f

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
        dq = self.rotate_back("self_attn.q_rope", dq)
        dk = self.rotate_back("self_attn.k_rope", dk)
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
        x = self.keep("model.embed_tokens", self.embed(top["embed"], ids))
        for number, w in enumerate(layers):
            self.number = number
            x, res = self.block(w, x)
            kept.append(res)
            whole |= self._named(number)
        n = self.norm_at({"model.norm.weight": top["norm"]}, "model.norm", x)
        logits = self.keep("lm_head", self.linear(n, top["head"], None))
        loss, dlogits = self.cross_entropy(logits, self.labels(self.targets(labels)))
        self.keep("loss", loss)
        dlogits = self.keep("lm_head.grad", dlogits)
        dn = self.linear_bwd(dlogits, top["head"])
        dx = self.norm_back({"model.norm.weight": top["norm"]}, "model.norm", dn, x)
        whole |= self.trace
        for number in reversed(range(len(layers))):
            dx = self.cut(number, dx)
            whole[f"model.layers.{number}.grad"] = dx
            self.trace, self.number = Arrays(), number
            dx = self.block_bwd(layers[number], dx, kept.pop())
            whole |= self._named(number)
        whole["model.embed_tokens.grad"] = dx
        return whole | self._embedding(ids, dx, self.linear_params(dlogits, n)[0], top)

    def cut(self, number: int, dx: Array) -> Array:
        """The gradient that reaches the output of a layer."""
        return dx

    def _embedding(self, ids: Array, dx: Array, dhead: Array, top: Weights) -> Arrays:
        dw = self.embed_bwd(dx, ids, top["embed"])
        if top["head"] is top["embed"]:
            return {"model.embed_tokens.weight.grad": self.add("head", dw, dhead)}
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
