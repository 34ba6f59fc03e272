"""Exercises: a whole block's backward, and the same from what MeSP keeps.

The formula is made of the formulas of the operations, so that a mistake inside one is known here, too.
"""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.engine import block as engine
from mesp_ref.engine.adapter import tensor_name
from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.engine.half import Gradients
from mesp_ref.engine.layer import Layer
from mesp_ref.golden.builder.models import Shape, draw_model
from mesp_ref.learn.exercise import Case, Exercise, Formula, Given, Outputs, Wrong
from mesp_ref.learn.exercises import attention, linear, norm, swiglu
from mesp_ref.ops import Array, rope_tables
from mesp_ref.registry import Args

ORDER = (
    "down_proj",
    "gate_proj",
    "up_proj",
    "o_proj",
    "q_proj",
    "k_proj",
    "v_proj",
)  # of the backward
_PREFIX = "model.layers.0."
_MLP_NORM = "post_attention_layernorm"


def block_bwd(dy: Array, res: engine.BlockRes, layer: Layer) -> tuple[Array, Gradients]:
    """VJP of a block from all that its forward kept; see engine/block.py."""
    return engine.block_bwd(dy, res, layer)


def mesp_block_bwd(dy: Array, res: engine.BlockRes, layer: Layer) -> tuple[Array, Gradients]:
    """VJP of a block from what MeSP keeps: q, k, v, z, silu and every h are rebuilt.

    Backward  q, k, v from n with biases, LoRA and RoPE, as in the forward;  z = silu(gate) ⊙ up
    """
    return engine.block_bwd(dy, res, layer)


def _named(returned: Any) -> Outputs:
    """dx and the gradients of A and B, in the order in which a backward meets them."""
    if not isinstance(returned, tuple | list) or len(returned) != 2 or not isinstance(returned[1], dict):  # fmt: skip
        found = "None" if returned is None else type(returned).__name__
        raise ValueError(f"expected dx and a dictionary of gradients; found {found}")
    dx, grads = returned
    gradients = Outputs()
    for short in ORDER:
        for matrix in "AB":
            name = tensor_name(_PREFIX + PROJECTIONS[short], matrix)
            if name not in grads:
                raise ValueError(f"the dictionary of gradients lacks {name}")
            gradients[f"d{matrix} of {short}"] = grads[name]
    return gradients | {"dx": dx}


def _case(shape: Shape, drop: frozenset[str], scale: float = 1.0) -> Case:
    def draw(rng: np.random.Generator) -> Args:
        model, adapter = draw_model(shape, rng)
        c = model.config
        cos, sin = rope_tables(1, shape.t + 1, c.head_dim, c.rope_theta, np.dtype(np.float64))
        layer = Layer(0, c, model.weights, adapter, cos, sin)
        x, dy = rng.standard_normal((2, shape.n, shape.t, c.hidden_size))
        _, res = engine.block(scale * x, layer, drop=drop)
        return {"dy": dy, "res": res, "layer": layer}

    return Case(shape.name, shape.note, draw)


_SHAPES = (
    (Shape("small", "H = 2 on G = 1, three tokens", n=1, t=3, heads=2, groups=1, rank=2), 1.0),
    (Shape("uneven", "H = 4 on G = 2, batch of two, five tokens", n=2, t=5), 1.0),
    (Shape("one token", "T = 1", n=2, t=1), 1.0),
    (Shape("large", "inputs of hundreds, H = G = 3", n=1, t=4, heads=3, groups=3), 300.0),
)


class _Inside:
    """The mistakes of an operation, under its name."""

    def __init__(self, wrong: Wrong, prefix: str):
        self.wrong, self.prefix = wrong, prefix
        self.keys = {k.removeprefix(prefix) for k in wrong.keys if k.startswith(prefix)}

    def pick(self, right: Any, **others: Any) -> Any:
        return self.wrong.pick(right, **{self.prefix + key: value for key, value in others.items()})

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.wrong


class _Pass:
    """One backward through a block: what it knows, and the gradients it has found."""

    def __init__(self, g: Given, m: Wrong):
        self.layer, self.m, self.grads = g.layer, m, Outputs()
        self.eps = self.layer.config.rms_norm_eps

    def op(self, formula: Formula, name: str, **given: Any) -> Outputs:
        return formula(Given(given), _Inside(self.m, f"{name}."))  # type: ignore[arg-type]

    def back(self, short: str, dy: Array, x: Array) -> Array:
        """Through a projection: dx, its dA and dB noted."""
        part = PROJECTIONS[short]
        A, B = self.layer.pair(part)
        w = self.layer.weight(part)[...]
        found = self.op(linear._lora, "lora", x=x, dy=dy, w=w, b=None, A=A, B=B, s=self.layer.scale)
        self.grads |= {f"d{matrix} of {short}": found[f"d{matrix}"] for matrix in "AB"}
        dx: Array = found["dx"]
        return dx

    def norm(self, name: str, dn: Array, x: Array) -> Array:
        other = "input_layernorm" if name == _MLP_NORM else _MLP_NORM
        w = self.layer.weight(name)[...]
        w = self.m.pick(w, **{f"{name}_other_weight": self.layer.weight(other)[...]})
        dx: Array = self.op(norm._norm, "norm", x=x, dy=dn, w=w, eps=self.eps)["dx"]
        return dx

    def forward(self, part: str, n: Array) -> Array:
        """A projection, once more: from n, or from what is taken for it."""
        A, B = self.layer.pair(part)
        w, b, s = self.layer.weight(part)[...], self.layer.bias(part), self.layer.scale
        y = n @ w.T + s * (n @ A.T) @ B.T
        y = self.m.pick(
            y, rebuilt_without_lora=n @ w.T, rebuilt_without_scale=n @ w.T + (n @ A.T) @ B.T
        )
        return y if b is None else self.m.pick(y + b[...], rebuilt_without_bias=y)

    def turned(self, x: Array, back: bool = False) -> Array:
        c, s = self.layer.cos, self.layer.sin
        return ops.rope(x, c, -s if back else s)[0]


def _mlp(p: _Pass, dy: Array, res: Any) -> Array:
    """da: through the MLP half."""
    m, x, n = p.m, res.x, res.n
    gate, up = res.inside.gate, res.inside.up
    sig, sig_up = 1 / (1 + np.exp(-gate)), 1 / (1 + np.exp(-up))
    z = m.pick(
        gate * sig * up, z_without_silu=gate * up, z_of_sigma=sig * up, z_without_up=gate * sig,
        z_exchanged=up * sig_up * gate, z_without_gate=up, z_sign=gate * (1 - sig) * up,
    )  # fmt: skip
    dz = p.back("down_proj", dy, z)
    found = p.op(swiglu._swiglu, "swiglu", gate=gate, up=up, dz=dz)
    dgate, dup = m.pick(
        (found["dgate"], found["dup"]), gate_up_exchanged=(found["dup"], found["dgate"])
    )
    n = m.pick(n, mlp_reads_x=x)
    of_gate, of_up = p.back("gate_proj", dgate, n), p.back("up_proj", dup, n)
    dn = m.pick(of_gate + of_up, no_up=of_gate, no_gate=of_up, up_twice_in_dn=of_gate + 2 * of_up,
                mean_of_gate_up=(of_gate + of_up) / 2)  # fmt: skip
    inner = m.pick(
        p.norm(_MLP_NORM, dn, x),
        mlp_norm_skipped=dn,
        mlp_norm_of_n=lambda: p.norm(_MLP_NORM, dn, n),
    )
    da: Array = m.pick(dy + inner, no_mlp_residual=inner, mlp_residual_twice=2 * dy + inner,
                       mlp_alone=dy, mlp_inner_subtracted=dy - inner,
                       mlp_residual_through_norm=lambda: p.norm(_MLP_NORM, dn + dy, x))  # fmt: skip
    return da


def _heads(p: _Pass, n: Array, x: Array) -> tuple[Array, Array, Array]:
    """q, k and v as the backward of attention sees them."""
    m, d = p.m, p.layer.config.head_dim
    inputs = m.pick((n, n, n), rebuilt_from_x=(x, x, x), rebuilt_q_from_x=(x, n, n), rebuilt_k_from_x=(n, x, n),
                    rebuilt_v_from_x=(n, n, x))  # fmt: skip
    q, k, v = (
        p.forward(f"self_attn.{c}_proj", n).reshape(*n.shape[:2], -1, d)
        for c, n in zip("qkv", inputs, strict=True)
    )
    rq, rk = p.turned(q), p.turned(k)
    found: tuple[Array, Array, Array] = m.pick(
        (rq, rk, v), rebuilt_without_rope=(q, k, v), rebuilt_q_unturned=(q, rk, v),
        rebuilt_k_unturned=(rq, k, v), rebuilt_v_turned=(rq, rk, p.turned(v)),
        rebuilt_backwards=(p.turned(q, back=True), p.turned(k, back=True), v),
        rebuilt_twice=(p.turned(rq), p.turned(rk), v),
    )  # fmt: skip
    return found


def _attention(p: _Pass, da: Array, dy: Array, res: Any) -> Array:
    """dx: through the attention half."""
    m, x, n = p.m, res.x, res.n
    q, k, v = _heads(p, n, x)
    if "published" in m:
        return _attention_of(
            p, da, res, {"rebuilt_without_rope", "rebuilt_without_bias", "not_turned_back"}
        )
    do = p.back("o_proj", da, res.inside.o).reshape(q.shape)
    found = p.op(attention._shared, "attention", do=do, q=q, k=k, v=v, p=res.inside.p)
    dq, dk, dv = (found[name] for name in ("dq", "dk", "dv"))
    dq, dk, dv = m.pick((dq, dk, dv), heads_exchanged=lambda: (dk, dq, dv))
    bq, bk = p.turned(dq, back=True), p.turned(dk, back=True)
    dq, dk, dv = m.pick(
        (bq, bk, dv), not_turned_back=(dq, dk, dv), q_not_turned_back=(dq, bk, dv),
        k_not_turned_back=(bq, dk, dv), turned_again=(p.turned(dq), p.turned(dk), dv),
        v_turned_back=(bq, bk, p.turned(dv, back=True)),
    )  # fmt: skip
    n = m.pick(n, attention_reads_x=x)
    of = [p.back(f"{c}_proj", d.reshape(*x.shape[:2], -1), n) for c, d in zip("qkv", (dq, dk, dv), strict=True)]  # fmt: skip
    dn = m.pick(
        of[0] + of[1] + of[2], no_q=of[1] + of[2], no_k=of[0] + of[2], no_v=of[0] + of[1], only_q=of[0],
        only_v=of[2], only_k=of[1], mean_of_qkv=(of[0] + of[1] + of[2]) / 3,
    )  # fmt: skip
    inner = m.pick(
        p.norm("input_layernorm", dn, x),
        attention_norm_skipped=dn,
        attention_norm_of_n=lambda: p.norm("input_layernorm", dn, n),
    )
    dx: Array = m.pick(
        da + inner, no_attention_residual=inner, attention_residual_twice=2 * da + inner,
        dy_for_da=dy + inner, dy_added=da + dy + inner, attention_alone=da, attention_inner_subtracted=da - inner,
        attention_residual_through_norm=lambda: p.norm("input_layernorm", dn + da, x),
    )  # fmt: skip
    return dx


def _attention_of(p: _Pass, da: Array, res: Any, keys: set[str]) -> Array:
    """The attention half with several mistakes that come together."""
    inner = _Pass(Given(layer=p.layer), Wrong(keys))
    dx = _attention(inner, da, da, res)
    p.grads |= inner.grads
    return dx


def _block(g: Given, m: Wrong) -> Outputs:
    p = _Pass(g, m)
    da = _mlp(p, g.dy, g.res.mlp)
    dx = _attention(p, da, g.dy, g.res.attention)
    return {name: p.grads[name] for name in p.grads} | {"dx": dx}


_WIRING = {
    "input_layernorm_other_weight": "the norm before the attention is taken with the weight of the other norm.",
    "post_attention_layernorm_other_weight": "the norm before the MLP is taken with the weight of the other norm (input_layernorm).",
    "gate_up_exchanged": "dgate and dup are exchanged: dgate goes through gate_proj.",
    "mlp_reads_x": "gate_proj and up_proj are given x where the normalised n is their input.",
    "attention_reads_x": "q_proj, k_proj and v_proj are given x where the normalised n is their input.",
    "no_up": "the gradient through up_proj is missing before the second norm: n feeds gate and up, so both are added.",
    "no_gate": "the gradient through gate_proj is missing before the second norm: n feeds gate and up, so both are added.",
    "up_twice_in_dn": "the gradient through up_proj is counted twice.",
    "mean_of_gate_up": "the gradients through gate_proj and up_proj are averaged: they are added.",
    "mlp_norm_skipped": "the backward of the norm before the MLP is skipped.",
    "attention_norm_skipped": "the backward of the norm before the attention is skipped.",
    "mlp_norm_of_n": "the backward of the norm before the MLP is given its output n where its input x belongs.",
    "attention_norm_of_n": "the backward of the norm before the attention is given its output n where its input x belongs.",
    "mlp_residual_through_norm": "the residual path around the MLP goes through the norm: dy is added behind it, not before it.",
    "attention_residual_through_norm": "the residual path around the attention goes through the norm: da is added behind it, not before it.",
    "no_mlp_residual": "the residual path around the MLP is missing: da = dy + what comes through the MLP.",
    "mlp_residual_twice": "the residual path around the MLP is added twice.",
    "mlp_alone": "the MLP's own gradient is missing: only the residual path reaches the attention.",
    "mlp_inner_subtracted": "the MLP's gradient is subtracted from the residual path (wrong sign).",
    "no_attention_residual": "the residual path around the attention is missing: dx = da + what comes through the attention.",
    "attention_residual_twice": "the residual path around the attention is added twice.",
    "dy_for_da": "the residual path around the attention carries dy where da, the sum after the MLP, belongs.",
    "dy_added": "dy is added once more at the end: da holds it already, so the residual is counted twice.",
    "attention_alone": "the attention's own gradient is missing in dx: only the residual path is there.",
    "attention_inner_subtracted": "the attention's gradient is subtracted from the residual path (wrong sign).",
    "heads_exchanged": "dq and dk are exchanged on their way to q_proj and k_proj.",
    "not_turned_back": "dq and dk are not rotated back: the inverse RoPE is missing.",
    "q_not_turned_back": "dq is not rotated back: the inverse RoPE of the queries is missing.",
    "k_not_turned_back": "dk is not rotated back: the inverse RoPE of the keys is missing.",
    "turned_again": "dq and dk are rotated forward again instead of back.",
    "v_turned_back": "dv is rotated back, too: values are not rotated in the forward.",
    "no_q": "the gradient through q_proj is missing before the first norm: n feeds q, k and v (queries, keys, values).",
    "no_k": "the gradient through k_proj (keys) is missing before the first norm: n feeds q, k and v.",
    "no_v": "the gradient through v_proj (values) is missing before the first norm: n feeds q, k and v.",
    "only_q": "the gradients through k_proj and v_proj are missing before the first norm: only that of q_proj is there.",
    "only_k": "the gradients through q_proj and v_proj are missing before the first norm: only that of k_proj is there.",
    "only_v": "the gradients through q_proj and k_proj are missing before the first norm: only that of v_proj is there.",
    "mean_of_qkv": "the gradients through q_proj, k_proj and v_proj are averaged: they are added.",
}
_REBUILDING = {
    "z_without_silu": "z, the input of down_proj, is rebuilt without silu: z = silu(gate) ⊙ up.",
    "z_of_sigma": "z, the input of down_proj, is rebuilt with σ where silu = gate·σ belongs.",
    "z_without_up": "z, the input of down_proj, is rebuilt without up: z = silu(gate) ⊙ up.",
    "z_without_gate": "z, the input of down_proj, is rebuilt without silu(gate): z = silu(gate) ⊙ up.",
    "z_sign": "z, the input of down_proj, is rebuilt with σ(−gate): silu(gate) = gate/(1 + exp(−gate)).",
    "z_exchanged": "z, the input of down_proj, is rebuilt with gate and up exchanged: z = silu(gate) ⊙ up.",
    "rebuilt_without_lora": "q, k and v are rebuilt without their LoRA branch (the adapter).",
    "rebuilt_without_scale": "q, k and v are rebuilt without the scale alpha/R of their LoRA branch.",
    "rebuilt_without_bias": "q, k and v are rebuilt without their biases.",
    "rebuilt_from_x": "q, k and v are rebuilt from x, which is not normalised: from n.",
    "rebuilt_q_from_x": "q is rebuilt from x, which is not normalised: from n.",
    "rebuilt_k_from_x": "k is rebuilt from x, which is not normalised: from n.",
    "rebuilt_v_from_x": "v is rebuilt from x, which is not normalised: from n.",
    "rebuilt_without_rope": "q and k are rebuilt without RoPE.",
    "rebuilt_q_unturned": "q is rebuilt without RoPE.",
    "rebuilt_k_unturned": "k is rebuilt without RoPE.",
    "rebuilt_v_turned": "v is rebuilt with RoPE: values are not rotated.",
    "rebuilt_backwards": "q and k are rebuilt with the inverse RoPE.",
    "rebuilt_twice": "q and k are rebuilt with RoPE applied twice.",
    "published": "q and k are rebuilt without RoPE and without biases, and dq and dk are not rotated back.",
}
_ELSEWHERE = {  # told by the wiring, or by a shape
    "results_exchanged", "not_summed", "dk_not_summed", "dv_not_summed", "n_flat", "dot_flat", "flat_sum",
}  # fmt: skip
_INSIDE = {
    f"{op}.{key}": f"in the backward of {name}, {text}"
    for op, name, mistakes in (
        ("norm", "RMSNorm", norm.NORM.mistakes),
        ("lora", "the projections", linear.LORA.mistakes),
        ("attention", "attention", attention.SHARED.mistakes),
        ("swiglu", "SwiGLU", swiglu.SWIGLU.mistakes),
    )
    for key, text in mistakes.items()
    if key not in _ELSEWHERE
}


def _numbers(g: Given) -> dict[str, float]:
    c, a = g.layer.config, g.layer.adapter
    heads = c.num_attention_heads / c.num_key_value_heads
    n, t = g.dy.shape[:2]
    return {
        "s": a.scale,
        "R": a.rank,
        "alpha": a.alpha,
        "D": c.head_dim,
        "H/G": heads,
        "the batch size N": n,
        "the number of tokens T": t,
    }


_GIVEN = """\
dy     [N, T, C], gradient of the block's output
layer  layer.weight(part)[...], layer.bias(part), layer.pair(part) = A, B, layer.scale, layer.cos, layer.sin,
       layer.config.rms_norm_eps, .head_dim;  parts: input_layernorm, self_attn.q_proj, k_proj, v_proj, o_proj,
       post_attention_layernorm, mlp.gate_proj, up_proj, down_proj;  layer.name(part) is its full name
res    res.attention.x, .n and res.attention.inside.{attention}
       res.mlp.x, .n and res.mlp.inside.{mlp}
Return dx and {{tensor_name(layer.name(part), "A" or "B"): gradient}} of the seven projections,
       with tensor_name from mesp_ref.engine.adapter. Your own backwards, or mesp_ref.ops, may be called."""


def _exercise(function: Any, title: str, drop: frozenset[str], attention: str, mlp: str, **more: Any) -> Exercise:  # fmt: skip
    return Exercise(
        name=function.__name__,
        title=title,
        function=function,
        about=(engine.block, function),
        named=_named,
        cases=tuple(_case(shape, drop, scale) for shape, scale in _SHAPES),
        formula=_block,
        mistakes=_WIRING | _REBUILDING | _INSIDE,
        numbers=_numbers,
        given=_GIVEN.format(attention=attention, mlp=mlp),
        paired=tuple(_WIRING | _REBUILDING),
        **more,
    )


BLOCK = _exercise(
    block_bwd,
    "a whole transformer block",
    frozenset(),
    "q, .k, .v (rotated), .p, .o, .h",
    "gate, .up, .silu, .z, .h",
    aliases=("block",),
    hints=(
        "Two halves, each y = x + f(norm(x)): dx = dy + norm_bwd(f_bwd(dy)). The second half comes first.",
        "Wherever the forward uses a value twice or more (n feeds q, k, v; n feeds gate, up; x goes round and through) the gradients are added.",
    ),
)
MESP = _exercise(
    mesp_block_bwd,
    "a block from the eight tensors that MeSP keeps",
    engine.MESP,
    "p, .o; q, k, v and every h were dropped",
    "gate, .up; silu, z and every h were dropped",
    aliases=("mesp", "mesp_block", "mesp_bwd", "drop_and_rebuild"),
    hints=(
        "What the backward needs and res does not hold must be made again, exactly as the forward made it.",
        "q and k: projection with bias and LoRA, then RoPE; v without RoPE. z = silu(gate) ⊙ up. h = x·Aᵀ.",
    ),
)
