"""Qwen2, Qwen3, Llama and Gemma 3 with LoRA written once more, so that a step can be wrong, or rounded.

Every operation and every fan-out is a method: a mistake is a subclass that overrides one of them
(see mistakes.py), an emulation of a precision one that overrides `keep`. It shares no code with
`ops`, keeps everything, and computes in float64 or float32. Names of tensors are those of `trace`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.ops import IGNORED, Array

SLIDING = "sliding_attention"  # a layer's type in Hugging Face's configs
QWEN2_NORMS = ("input_layernorm", ""), ("post_attention_layernorm", "")


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
    score_scale: float | None = None  # in place of 1/√D
    window: int | None = None  # keys that a query sees at most, its own included
    positions: Array | None = None  # [N, T], 0 where a document begins; one document without
    norms: tuple[tuple[str, str], ...] = QWEN2_NORMS  # of each half: before it, and behind it
    head_norms: bool = False  # q and k are normalised before RoPE
    gelu: bool = False  # GELU in place of SiLU
    gain: float = 0.0  # of a norm: gain + w
    embedding: float = 1.0  # the factor of the embedding
    kinds: tuple[str, ...] = ()  # of layers; those called SLIDING have the window and `local`
    local: tuple[Array, Array] | None = None  # cos and sin of sliding layers

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def of_layer(self, number: int) -> "Setting":
        """That of one layer of a model whose layers are not all alike."""
        if not self.kinds:
            return self
        if self.kinds[number] != SLIDING or self.local is None:
            return self._replace(window=None)
        cos, sin = self.local
        return self._replace(cos=cos, sin=sin)


Weights = Mapping[str, Array]
Arrays = dict[str, Array]


class Plain:
    """Forward and backward of a block and of a model, step by step, in `dtype`."""

    dtype: Any = np.float64
    number = 0  # of the layer that is worked on
    at = ""  # the part of a block that is worked on: "self_attn.q_proj", "input_layernorm"

    def __init__(self, setting: Setting):
        self.set, self.trace = setting.of_layer(0), Arrays()
        self.whole = setting

    def enter(self, number: int) -> None:
        """Work on a layer of a model."""
        self.number, self.set = number, self.whole.of_layer(number)

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

    def causal(self, tq: int, tk: int) -> Array:
        return np.tri(tq, tk, tk - tq, dtype=bool)

    def window(self) -> int | None:
        """How many keys a query sees at most."""
        return self.set.window

    def positions(self) -> Array | None:
        """Of tokens in their documents."""
        return self.set.positions

    def visible(self, tq: int, tk: int) -> Array:
        """[Tq, Tk], or [N, 1, Tq, Tk] where rows hold documents."""
        seen, window, positions = self.causal(tq, tk), self.window(), self.positions()
        ago = np.arange(tk - tq, tk)[:, None] - np.arange(tk)  # how far back a key lies
        if window is not None:
            seen = seen & (ago < window)
        if positions is not None:
            seen = seen & (ago <= positions[:, None, :, None])
        return seen

    def scores(self, q: Array, k: Array) -> Array:
        return np.einsum("nqhd,nkhd->nhqk", q, k)

    def mixed(self, p: Array, v: Array) -> Array:
        return np.einsum("nhqk,nkhd->nqhd", p, v)

    def score_scale(self) -> float:
        return self.set.score_scale or self.set.head_dim**-0.5

    def score_scale_bwd(self) -> float:
        return self.score_scale()

    def probabilities(self, s: Array) -> Array:
        s = np.where(self.visible(*s.shape[-2:]), s, -np.inf)
        p = np.exp(s - np.maximum(s.max(axis=-1, keepdims=True), np.finfo(s.dtype).min))
        total: Array = p.sum(axis=-1, keepdims=True)
        return p / np.where(total > 0, total, 1)

    def softmax(self, q: Array, k: Array) -> Array:
        return self.probabilities(self.scores(q, k) * self.score_scale())

    def mix(self, p: Array, v: Array) -> Array:
        return self.mixed(p, v)

    def attention(self, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """p and o."""
        p = self.keep("self_attn.attention.p", self.softmax(q, self.share(k)))
        return p, self.mix(p, self.share(v))

    def softmax_bwd(self, dp: Array, p: Array) -> Array:
        return p * (dp - (dp * p).sum(axis=-1, keepdims=True))

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        k, v = self.share(k), self.share(v)
        ds = self.softmax_bwd(self.scores(do, v), p) * self.score_scale_bwd()
        dq, dk = self.mixed(ds, k), self.mixed(ds.swapaxes(2, 3), q)
        return dq, self.unshare(dk), self.unshare_v(self.mixed(p.swapaxes(2, 3), do))

    def unshare_v(self, dv: Array) -> Array:
        return self.unshare(dv)

    def activation(self, gate: Array) -> Array:
        """silu, or gelu in its tanh form."""
        if self.set.gelu:
            return gate / 2 * (1 + np.tanh(gelu_argument(gate)))
        return gate / (1 + np.exp(-gate))

    def activation_slope(self, gate: Array) -> Array:
        """The activation's derivative."""
        if self.set.gelu:
            t = np.tanh(gelu_argument(gate))
            inner = (2 / np.pi) ** 0.5 * (1 + 3 * 0.044715 * gate**2)
            return (1 + t) / 2 + gate / 2 * (1 - t * t) * inner
        sig = 1 / (1 + np.exp(-gate))
        return sig + gate * sig * (1 - sig)

    def swiglu_bwd(self, dz: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        return dz * up * self.activation_slope(gate), dz * self.activation(gate)

    def add(self, what: str, a: Array, b: Array) -> Array:
        """Where two gradients meet; `what` names b."""
        return a + b

    def side_by_side(self, parts: list[Array]) -> Array:
        """Results of a fused op, side by side."""
        return np.concatenate(parts, axis=-1)

    def apart(self, dy: Array, sizes: list[int]) -> list[Array]:
        """The cotangent of each of them."""
        return np.split(dy, np.cumsum(sizes)[:-1], axis=-1)

    @property
    def gated(self) -> str:
        """What of gate and up is called."""
        return "mlp.geglu" if self.set.gelu else "mlp.swiglu"

    def swiglu(self, gate: Array, up: Array) -> tuple[Array, Array]:
        """silu or gelu, and z."""
        name = f"{self.gated}.{'gelu' if self.set.gelu else 'silu'}"
        found = self.keep(name, self.activation(gate))
        return found, found * up

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

    def gain(self, w: Array) -> Array:
        """A norm's factor of its weight."""
        return self.set.gain + w if self.set.gain else w

    def norm_at(self, w: Weights, part: str, x: Array) -> Array:
        self.at = part
        return self.keep(part, self.norm(x, self.gain(w[f"{part}.weight"])))

    def norm_back(self, w: Weights, part: str, dy: Array, x: Array) -> Array:
        self.at = part
        dy, gain = self.keep(f"{part}.grad", dy), self.gain(w[f"{part}.weight"])
        self.keep(f"{part}.weight.grad", self.norm_params(dy, x, gain))
        return self.norm_bwd(dy, x, gain)

    def behind(self, w: Weights, half: int, y: Array) -> Array:
        """What a half gives, normalised where the family does that."""
        part = self.set.norms[half][1]
        return self.norm_at(w, part, y) if part else y

    def behind_back(self, w: Weights, half: int, dy: Array, y: Array) -> Array:
        part = self.set.norms[half][1]
        return self.norm_back(w, part, dy, y) if part else dy

    def heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.set.head_dim)

    def rotate_at(self, part: str, x: Array) -> Array:
        self.at = part
        return self.keep(part, self.rotate(x))

    def rotate_back(self, part: str, dy: Array) -> Array:
        self.at = part
        return self.rotate_bwd(self.keep(f"{part}.grad", dy))

    def head_norm(self, w: Weights, letter: str, x: Array) -> Array:
        """q or k [N,T,heads,D], each head normalised where the family does that."""
        return self.norm_at(w, f"self_attn.{letter}_norm", x) if self.set.head_norms else x

    def head_norm_back(self, w: Weights, letter: str, dy: Array, x: Array) -> Array:
        return self.norm_back(w, f"self_attn.{letter}_norm", dy, x) if self.set.head_norms else dy

    def turned(self, w: Weights, letter: str, x: Array) -> Array:
        """q or k as attention reads it."""
        return self.rotate_at(f"self_attn.{letter}_rope", self.head_norm(w, letter, x))

    def turned_back(self, w: Weights, letter: str, dy: Array, x: Array) -> Array:
        return self.head_norm_back(w, letter, self.rotate_back(f"self_attn.{letter}_rope", dy), x)

    def qkv(self, w: Weights, n: Array, raw: Arrays) -> tuple[Array, ...]:
        """q, k and v; `raw` is given q and k as their projections have them."""
        for letter in "qkv":
            raw[letter] = self.heads(self.project(w, f"self_attn.{letter}_proj", n))
        return self.turned(w, "q", raw["q"]), self.turned(w, "k", raw["k"]), raw["v"]

    def rebuilt_qkv(self, w: Weights, res: Arrays) -> tuple[Array, ...]:
        """q, k and v as the backward of attention sees them."""
        return res["q"], res["k"], res["v"]

    def block(self, w: Weights, x: Array) -> tuple[Array, Arrays]:
        """Output and residuals of a block."""
        raw, res = Arrays(), {"x": x, "n1": self.norm_at(w, self.set.norms[0][0], x)}
        res["q"], res["k"], res["v"] = self.qkv(w, res["n1"], raw)
        res |= {"raw q": raw["q"], "raw k": raw["k"]}
        res["p"], o = self.attention(res["q"], res["k"], res["v"])
        res["o"] = flat_heads(self.keep("self_attn.attention", o))
        res["mixed"] = self.project(w, "self_attn.o_proj", res["o"])
        mixed = self.behind(w, 0, res["mixed"])
        res["a"] = self.keep(
            "after_attention", self.join("residual around the attention", x, mixed)
        )
        res["n2"] = self.norm_at(w, self.set.norms[1][0], res["a"])
        res["gate"] = self.project(w, "mlp.gate_proj", res["n2"])
        res["up"] = self.project(w, "mlp.up_proj", res["n2"])
        res["z"] = self.keep(self.gated, self.swiglu(res["gate"], res["up"])[1])
        res["down"] = self.project(w, "mlp.down_proj", res["z"])
        down = self.behind(w, 1, res["down"])
        return self.keep("y", self.join("residual around the MLP", res["a"], down)), res

    def join(self, what: str, x: Array, f: Array) -> Array:
        """x + f(norm(x)); `what` names x."""
        return x + f

    def block_bwd(self, w: Weights, dy: Array, res: Arrays) -> Array:
        """dx; the parameters' gradients are kept."""
        dz = self.behind_back(w, 1, dy, res["down"])
        dz = self.project_bwd(w, "mlp.down_proj", dz, res["z"])
        dz = self.keep(f"{self.gated}.grad", dz)
        dgate, dup = self.swiglu_bwd(dz, res["gate"], res["up"])
        dn = self.project_bwd(w, "mlp.gate_proj", dgate, res["n2"])
        dn = self.add("up_proj", dn, self.project_bwd(w, "mlp.up_proj", dup, res["n2"]))
        da = self.norm_back(w, self.set.norms[1][0], dn, res["a"])
        da = self.keep("after_attention.grad", self.add("residual around the MLP", da, dy))
        dn = self.attention_half_bwd(w, self.behind_back(w, 0, da, res["mixed"]), res)
        dx = self.norm_back(w, self.set.norms[0][0], dn, res["x"])
        return self.keep("dx", self.add("residual around the attention", dx, da))

    def attention_half_bwd(self, w: Weights, dy: Array, res: Arrays) -> Array:
        """dn of what q, k and v are projected from."""
        do = self.heads(self.project_bwd(w, "self_attn.o_proj", dy, res["o"]))
        do = self.keep("self_attn.attention.grad", do)
        q, k, v = self.rebuilt_qkv(w, res)
        dq, dk, dv = self.attention_bwd(do, q, k, v, res["p"])
        dq = self.turned_back(w, "q", dq, res["raw q"])
        dk = self.turned_back(w, "k", dk, res["raw k"])
        dn = self.project_bwd(w, "self_attn.q_proj", flat_heads(dq), res["n1"])
        for letter, d in (("k", dk), ("v", dv)):
            part = f"self_attn.{letter}_proj"
            dn = self.add(part, dn, self.project_bwd(w, part, flat_heads(d), res["n1"]))
        return dn

    # -- the whole model ----------------------------------------------------------------------

    def model(self, layers: Sequence[Weights], top: Weights, ids: Array, labels: Array) -> Arrays:
        """Trace of a step: every tensor under its name in the whole model."""
        whole, kept = Arrays(), []
        x = self.embedding() * self.embed(top["embed"], ids)
        x = self.keep("model.embed_tokens", x)
        for number, w in enumerate(layers):
            self.enter(number)
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
            self.trace = Arrays()
            self.enter(number)
            dx = self.block_bwd(layers[number], dx, kept.pop())
            whole |= self._named(number)
        whole["model.embed_tokens.grad"] = dx
        return whole | self._embedding(ids, dx, self.linear_params(dlogits, n)[0], top)

    def embedding(self) -> float:
        """The factor of the embedding."""
        return self.set.embedding

    def embedding_bwd(self) -> float:
        return self.embedding()

    def cut(self, number: int, dx: Array) -> Array:
        """The gradient that reaches the output of a layer."""
        return dx

    def _embedding(self, ids: Array, dx: Array, dhead: Array, top: Weights) -> Arrays:
        dw = self.embed_bwd(self.embedding_bwd() * dx, ids, top["embed"])
        if top["head"] is top["embed"]:
            return {"model.embed_tokens.weight.grad": self.add("head", dw, dhead)}
        return {"model.embed_tokens.weight.grad": dw, "lm_head.weight.grad": dhead}

    def _named(self, number: int) -> Arrays:
        """The block's tensors under their names in the model; empties the block's trace."""
        found, self.trace = self.trace, Arrays()
        return {model_name(name, number): a for name, a in found.items() if name != "dx"}


def gelu_argument(gate: Array) -> Array:
    """√(2/π)·(gate + 0.044715·gate³)"""
    found: Array = (2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return found


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
