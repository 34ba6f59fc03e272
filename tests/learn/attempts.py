"""What students hand in: one right answer an exercise, and what becomes of it by a usual mistake.

An attempt is an edit of the right answer, as verify.bugs has them, with a pattern of what a tutor
should say. FIRST was written before the tutor's table of mistakes was; HELD_OUT together with it and
never looked at while the table was made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import ops
from mesp_ref.engine.adapter import tensor_name
from mesp_ref.ops import IGNORED


class Attempt(NamedTuple):
    """A wrong answer: the exercise, what should be said (a pattern), and the edits that make it."""

    exercise: str
    says: str
    edits: tuple[tuple[str, str], ...]

    def function(self) -> Callable[..., Any]:
        text = RIGHT[self.exercise]
        for old, new in self.edits:
            assert text.count(old) == 1, (self.exercise, text.count(old), old)
            text = text.replace(old, new)
        return compiled(text)


def compiled(text: str) -> Callable[..., Any]:
    """The last function that a text defines."""
    space = {"np": np, "ops": ops, "IGNORED": IGNORED, "tensor_name": tensor_name}
    exec(compile(text, "<student>", "exec", dont_inherit=True), space)
    return [f for name, f in space.items() if callable(f) and hasattr(f, "__code__")][-1]


RIGHT = {
    "linear_bwd": """
def linear_bwd(dy, res, w, b=None):
    return np.einsum("...o,oi->...i", dy, w)
""",
    "linear_bwd_params": """
def linear_bwd_params(dy, res, w, b=None):
    dy = dy.reshape(-1, dy.shape[-1])
    x = res.x.reshape(-1, res.x.shape[-1])
    dw = dy.T @ x
    db = None if b is None else dy.sum(axis=0)
    return dw, db
""",
    "lora_linear_bwd": """
def lora_linear_bwd(dy, res, w, b, A, B, *, s):
    x = res.x
    h = x @ A.T
    dh = s * (dy @ B)
    dx = dy @ w + dh @ A
    dA = np.einsum("ntr,nti->ri", dh, x)
    dB = s * np.einsum("nto,ntr->or", dy, h)
    return dx, dA, dB
""",
    "rmsnorm_bwd": """
def rmsnorm_bwd(dy, res, w, *, eps):
    x = res.x
    C = x.shape[-1]
    n = np.sqrt((x ** 2).sum(-1, keepdims=True) / C + eps)
    u = dy * w
    dot = (u * x).sum(-1, keepdims=True) / C
    return u / n - x * dot / n ** 3
""",
    "rmsnorm_bwd_params": """
def rmsnorm_bwd_params(dy, res, w, *, eps):
    x = res.x
    n = np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True) + eps)
    y = x / n
    dw = dy * y
    return dw.reshape(-1, dw.shape[-1]).sum(axis=0)
""",
    "rope_bwd": """
def rope_bwd(dy, res, cos, sin):
    half = dy.shape[-1] // 2
    c = cos[..., None, :]
    s = sin[..., None, :]
    d1 = dy[..., :half]
    d2 = dy[..., half:]
    dx1 = d1 * c + d2 * s
    dx2 = d2 * c - d1 * s
    return np.concatenate([dx1, dx2], axis=-1)
""",
    "causal_softmax_bwd": """
def causal_softmax_bwd(dp, res):
    p = res.p
    dot = (dp * p).sum(axis=-1, keepdims=True)
    ds = p * (dp - dot)
    return ds
""",
    "attention_one_head_bwd": """
def attention_one_head_bwd(do, res):
    q, k, v, p = res
    scale = 1 / np.sqrt(q.shape[-1])
    do, q, k, v, p = do[:, :, 0], q[:, :, 0], k[:, :, 0], v[:, :, 0], p[:, 0]
    dv = np.einsum("nij,nid->njd", p, do)
    dp = np.einsum("nid,njd->nij", do, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    dq = np.einsum("nij,njd->nid", ds, k) * scale
    dk = np.einsum("nij,nid->njd", ds, q) * scale
    return dq[:, :, None], dk[:, :, None], dv[:, :, None]
""",
    "attention_bwd": """
def attention_bwd(do, res):
    q, k, v, p = res
    share = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5
    kr, vr = np.repeat(k, share, axis=2), np.repeat(v, share, axis=2)
    dv = np.einsum("nhij,nihd->njhd", p, do)
    dp = np.einsum("nihd,njhd->nhij", do, vr)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    dq = np.einsum("nhij,njhd->nihd", ds, kr) * scale
    dk = np.einsum("nhij,nihd->njhd", ds, q) * scale
    n, tk, g, d = k.shape
    dk = dk.reshape(n, tk, g, share, d).sum(axis=3)
    dv = dv.reshape(n, tk, g, share, d).sum(axis=3)
    return dq, dk, dv
""",
    "swiglu_bwd": """
def swiglu_bwd(dz, res):
    gate, up = res.gate, res.up
    sig = 1 / (1 + np.exp(-gate))
    silu = gate * sig
    dup = dz * silu
    slope = sig + gate * sig * (1 - sig)
    dgate = dz * up * slope
    return dgate, dup
""",
    "cross_entropy_bwd": """
def cross_entropy_bwd(dloss, res):
    z, labels = res.logits, res.labels
    counted = labels != -100
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    count = max(1, counted.sum())
    rows = np.arange(len(labels))[counted]
    p[rows, labels[counted]] -= 1
    p[~counted] = 0
    return dloss * p / count
""",
    "embedding_bwd_params": """
def embedding_bwd_params(dy, res, w):
    dw = np.zeros_like(w)
    np.add.at(dw, res.ids, dy)
    return dw
""",
    "tied_embedding_bwd": """
def tied_embedding_bwd(dx, dlogits, ids, n, w):
    dw = np.zeros_like(w)
    np.add.at(dw, ids, dx)
    head = dlogits.reshape(-1, dlogits.shape[-1]).T @ n.reshape(-1, n.shape[-1])
    return dw + head
""",
    "block_bwd": """
def block_bwd(dy, res, layer):
    grads = {}
    eps = layer.config.rms_norm_eps
    d = layer.config.head_dim

    def back(part, dy, x):
        A, B = layer.pair(part)
        r = ops.LoraLinearRes(x, None)
        dx, dA, dB = ops.lora_linear_bwd(dy, r, layer.weight(part), None, A, B, s=layer.scale)
        grads[tensor_name(layer.name(part), "A")] = dA
        grads[tensor_name(layer.name(part), "B")] = dB
        return dx

    mlp, att = res.mlp, res.attention
    dz = back("mlp.down_proj", dy, mlp.inside.z)
    dgate, dup = ops.swiglu_bwd(dz, ops.SwigluRes(mlp.inside.gate, mlp.inside.up, None))
    dn2 = back("mlp.gate_proj", dgate, mlp.n) + back("mlp.up_proj", dup, mlp.n)
    w2 = layer.weight("post_attention_layernorm")
    da = dy + ops.rmsnorm_bwd(dn2, ops.RmsNormRes(mlp.x), w2, eps=eps)
    f = att.inside
    do = back("self_attn.o_proj", da, f.o).reshape(f.q.shape)
    dq, dk, dv = ops.attention_bwd(do, ops.AttentionRes(f.q, f.k, f.v, f.p))
    dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)
    dk = ops.rope_bwd(dk, ops.RopeRes(), layer.cos, layer.sin)
    n, t = dy.shape[:2]
    dn = back("self_attn.q_proj", dq.reshape(n, t, -1), att.n)
    dn = dn + back("self_attn.k_proj", dk.reshape(n, t, -1), att.n)
    dn = dn + back("self_attn.v_proj", dv.reshape(n, t, -1), att.n)
    w1 = layer.weight("input_layernorm")
    dx = da + ops.rmsnorm_bwd(dn, ops.RmsNormRes(att.x), w1, eps=eps)
    return dx, grads
""",
    "mesp_block_bwd": """
def mesp_block_bwd(dy, res, layer):
    grads = {}
    eps = layer.config.rms_norm_eps
    d = layer.config.head_dim

    def again(part, x, bias=True):
        A, B = layer.pair(part)
        y = x @ layer.weight(part)[...].T + layer.scale * (x @ A.T) @ B.T
        return y if layer.bias(part) is None or not bias else y + layer.bias(part)[...]

    def back(part, dy, x):
        A, B = layer.pair(part)
        r = ops.LoraLinearRes(x, None)
        dx, dA, dB = ops.lora_linear_bwd(dy, r, layer.weight(part), None, A, B, s=layer.scale)
        grads[tensor_name(layer.name(part), "A")] = dA
        grads[tensor_name(layer.name(part), "B")] = dB
        return dx

    mlp, att = res.mlp, res.attention
    gate, up = mlp.inside.gate, mlp.inside.up
    z = gate / (1 + np.exp(-gate)) * up
    dz = back("mlp.down_proj", dy, z)
    dgate, dup = ops.swiglu_bwd(dz, ops.SwigluRes(gate, up, None))
    dn2 = back("mlp.gate_proj", dgate, mlp.n) + back("mlp.up_proj", dup, mlp.n)
    w2 = layer.weight("post_attention_layernorm")
    da = dy + ops.rmsnorm_bwd(dn2, ops.RmsNormRes(mlp.x), w2, eps=eps)
    n, t = dy.shape[:2]
    q = again("self_attn.q_proj", att.n).reshape(n, t, -1, d)
    k = again("self_attn.k_proj", att.n).reshape(n, t, -1, d)
    v = again("self_attn.v_proj", att.n).reshape(n, t, -1, d)
    q = ops.rope(q, layer.cos, layer.sin)[0]
    k = ops.rope(k, layer.cos, layer.sin)[0]
    do = back("self_attn.o_proj", da, att.inside.o).reshape(q.shape)
    dq, dk, dv = ops.attention_bwd(do, ops.AttentionRes(q, k, v, att.inside.p))
    dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)
    dk = ops.rope_bwd(dk, ops.RopeRes(), layer.cos, layer.sin)
    dn = back("self_attn.q_proj", dq.reshape(n, t, -1), att.n)
    dn = dn + back("self_attn.k_proj", dk.reshape(n, t, -1), att.n)
    dn = dn + back("self_attn.v_proj", dv.reshape(n, t, -1), att.n)
    w1 = layer.weight("input_layernorm")
    dx = da + ops.rmsnorm_bwd(dn, ops.RmsNormRes(att.x), w1, eps=eps)
    return dx, grads
""",
    "mezo": """
def mezo(loss, weights, *, seeds, eps):
    grads = {name: np.zeros_like(w) for name, w in weights.items()}
    for seed in seeds:
        def perturbed(by):
            rng = np.random.default_rng(seed)
            return {name: w + by * rng.standard_normal(w.shape, dtype=w.dtype)
                    for name, w in weights.items()}
        g = (loss(perturbed(eps)) - loss(perturbed(-eps))) / (2 * eps)
        rng = np.random.default_rng(seed)
        for name, w in weights.items():
            z = rng.standard_normal(w.shape, dtype=w.dtype)
            grads[name] += g * z / len(seeds)
    return grads
""",
    "training_step": """
def training_step(w, m, v, t, gradient, *, lr, beta1, beta2, eps, weight_decay, max_norm):
    g = gradient(w)
    norm = np.sqrt((g ** 2).sum())
    if norm > max_norm:
        g = g * (max_norm / norm)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g ** 2
    mhat = m / (1 - beta1 ** t)
    vhat = v / (1 - beta2 ** t)
    w = w - lr * weight_decay * w
    w = w - lr * mhat / (np.sqrt(vhat) + eps)
    return w, m, v
""",
}


def rows(exercise: str, *found: tuple[str, ...]) -> list[Attempt]:
    """(pattern, old, new, old, new …) of one exercise."""
    return [
        Attempt(exercise, says, tuple(zip(texts[::2], texts[1::2], strict=True)))
        for says, *texts in found
    ]


FIRST = [
    *rows(
        "linear_bwd",
        ("sign|negat|× −1", "return np", "return -np"),
        (
            "bias",
            'return np.einsum("...o,oi->...i", dy, w)',
            'return np.einsum("...o,oi->...i", dy if b is None else dy + b, w)',
        ),
        (
            "shape",
            'return np.einsum("...o,oi->...i", dy, w)',
            "return (dy @ w).reshape(-1, w.shape[1])",
        ),
        ("2", "return np", "return 2 * np"),
        ("mean|number of rows|averag|divided", "return np", "return 1 / dy[..., 0].size * np"),
        ("first|other (rows|sequences)|only row|batch", "dy, w)", "dy[:1] + 0 * dy, w)"),
        ("x|input", "dy, w)", "dy, w) + res.x"),
        ("absolute|signs|\\|W\\|", "dy, w)", "dy, abs(w))"),
        ("None|return", "return np", "dx = np"),
        ("0|zero", 'return np.einsum("...o,oi->...i", dy, w)', "return 0 * res.x"),
    ),
    *rows(
        "linear_bwd_params",
        ("transpos", "dw = dy.T @ x", "dw = x.T @ dy"),
        ("averag|mean|divided by the number of rows", "dw = dy.T @ x", "dw = dy.T @ x / len(x)"),
        ("averag|mean", "dy.sum(axis=0)", "dy.mean(axis=0)"),
        ("db.*(sum|shape)", "dy.sum(axis=0)", "dy"),
        ("axis|shape", "dy.sum(axis=0)", "dy.sum(axis=1)"),
        ("sign|negat", "dw = dy.T @ x", "dw = -dy.T @ x"),
        ("exchang|order|swap", "return dw, db", "return db, dw"),
        ("two|missing|found one|db", "return dw, db", "return dw"),
        ("w|weight", "dw = dy.T @ x", "dw = dy.T @ x + w"),
        ("last|first|row", "dw = dy.T @ x", "dw = dy[-1:].T @ x[-1:]"),
    ),
    *rows(
        "lora_linear_bwd",
        ("s .*dA|dA.* s|scale.*(dA|dh)|(dA|dh).*scale", "dh = s * (dy @ B)", "dh = dy @ B"),
        ("dB.*(scale|s)|scale.*dB", "dB = s * np", "dB = np"),
        ("twice", 'np.einsum("ntr,nti->ri", dh, x)', 's * np.einsum("ntr,nti->ri", dh, x)'),
        ("frozen|dy·W|base", "dx = dy @ w + dh @ A", "dx = dh @ A"),
        ("adapter|dh·A|LoRA", "dx = dy @ w + dh @ A", "dx = dy @ w"),
        ("s .*dx|scale.*dx|dx.*(scale| s)", "+ dh @ A", "+ dh @ A / s"),
        ("transpos", "->ri", "->ir"),
        ("averag|mean|number of rows", "dB = s * np", "dB = s / (x.size / x.shape[-1]) * np"),
        ("exchang|order|swap", "return dx, dA, dB", "return dx, dB, dA"),
        (
            "dB.*(x|h)|h",
            'dA = np.einsum("ntr,nti->ri", dh, x)',
            'dA = np.einsum("ntr,nti->ri", h, x)',
        ),
    ),
    *rows(
        "rmsnorm_bwd",
        ("cross term|along x|second term", "u / n - x * dot / n ** 3", "u / n"),
        ("sign|added", "u / n - x", "u / n + x"),
        ("n³|n\\^3|power", "n ** 3", "n ** 2"),
        (
            "sum .*mean|mean|1/C",
            "(u * x).sum(-1, keepdims=True) / C",
            "(u * x).sum(-1, keepdims=True)",
        ),
        ("weight|w", "u = dy * w", "u = dy"),
        ("w|u", "dot = (u * x)", "dot = (dy * x)"),
        (
            "eps.*outside|outside",
            "(x ** 2).sum(-1, keepdims=True) / C + eps)",
            "(x ** 2).sum(-1, keepdims=True) / C) + eps",
        ),
        ("eps", " / C + eps", " / C"),
        ("1/n|divided by n|u/n|n", "return u / n -", "return u -"),
        (
            "axis",
            "dot = (u * x).sum(-1, keepdims=True) / C",
            "dot = (u * x).mean(axis=1, keepdims=True)",
        ),
    ),
    *rows(
        "rmsnorm_bwd_params",
        ("1/n|n", "y = x / n", "y = x"),
        ("averag|mean", ".sum(axis=0)", ".mean(axis=0)"),
        ("shape|sum", "return dw.reshape(-1, dw.shape[-1]).sum(axis=0)", "return dw"),
        ("shape|first axis|batch", "dw.reshape(-1, dw.shape[-1]).sum(axis=0)", "dw.sum(axis=0)"),
        ("w|weight", "dw = dy * y", "dw = dy * y * w"),
        ("sign", "dw = dy * y", "dw = -dy * y"),
        ("eps", " + eps)", ")"),
        ("sum|mean|√C", "np.mean(x ** 2", "np.sum(x ** 2"),
        ("n²|square|twice", "y = x / n", "y = x / n ** 2"),
        ("x/n|normalised|x", "dw = dy * y", "dw = dy"),
    ),
    *rows(
        "rope_bwd",
        (
            "forward|same direction|instead of back",
            "d1 * c + d2 * s",
            "d1 * c - d2 * s",
            "d2 * c - d1 * s",
            "d2 * c + d1 * s",
        ),
        (
            "not rotated|skipped|dy itself",
            "return np.concatenate([dx1, dx2], axis=-1)",
            "return dy.copy()",
        ),
        (
            "interleav|neighbour|pairs",
            "dy[..., :half]",
            "dy[..., ::2]",
            "dy[..., half:]",
            "dy[..., 1::2]",
            "return np.concatenate([dx1, dx2], axis=-1)",
            "return np.stack([dx1, dx2], axis=-1).reshape(dy.shape)",
        ),
        ("second half", "d2 * c - d1 * s", "d2 * c + d1 * s"),
        ("first half", "d1 * c + d2 * s", "d1 * c - d2 * s"),
        ("halves.*(exchang|swap)|exchang|swap", "[dx1, dx2]", "[dx2, dx1]"),
        ("sin.*cos|cos.*sin|exchang", "c = cos[", "c = sin[", "s = sin[", "s = cos["),
        (
            "cos.*neg|neg.*cos|sign",
            "d1 * c + d2 * s",
            "-d1 * c + d2 * s",
            "d2 * c - d1 * s",
            "-d2 * c - d1 * s",
        ),
        ("sin|missing", "d1 * c + d2 * s", "d1 * c", "d2 * c - d1 * s", "d2 * c"),
        (
            "position|axis|shape",
            "cos[..., None, :]",
            "cos[:1, None, :]",
            "sin[..., None, :]",
            "sin[:1, None, :]",
        ),
    ),
    *rows(
        "causal_softmax_bwd",
        ("row sum|sum", "p * (dp - dot)", "p * dp"),
        ("sigmoid|p·\\(1 − p\\)|single|diagonal", "p * (dp - dot)", "p * (1 - p) * dp"),
        ("axis|queries|column", "sum(axis=-1", "sum(axis=-2"),
        ("p.*dot|sum of dp alone|weighted by p", "dot = (dp * p)", "dot = dp"),
        ("factor p|p missing|without.*p|not multiplied", "p * (dp - dot)", "dp - dot"),
        ("sign", "p * (dp - dot)", "p * (dot - dp)"),
        ("mean", "(dp * p).sum(", "(dp * p).mean("),
        ("p²|twice|square", "p * (dp - dot)", "p ** 2 * (dp - dot)"),
        ("added|sign", "(dp - dot)", "(dp + dot)"),
        ("all|axes|whole|axis", ".sum(axis=-1, keepdims=True)", ".sum()"),
    ),
    *rows(
        "attention_one_head_bwd",
        ("scale|√D", "ds, k) * scale", "ds, k)", "ds, q) * scale", "ds, q)"),
        ("(scale|√D).*dq", "ds, k) * scale", "ds, k)"),
        ("1/D|twice|√D", "scale = 1 / np.sqrt(q.shape[-1])", "scale = 1 / q.shape[-1]"),
        ("row sum", "p * (dp - (dp * p).sum(-1, keepdims=True))", "p * dp"),
        ("transpos|dv", '"nij,nid->njd", p, do', '"nij,njd->nid", p, do'),
        ("transpos|dk", '"nij,nid->njd", ds, q', '"nij,njd->nid", ds, q'),
        ("exchang|swap|order", "dk[:, :, None], dv[:, :, None]", "dv[:, :, None], dk[:, :, None]"),
        (
            "dq.*(q|k)|factors|exchang",
            "ds, k) * scale",
            "ds, q) * scale",
            '"nij,nid->njd", ds, q',
            '"nij,nid->njd", ds, k',
        ),
        ("scale|dv", "p, do)", "p, do) * scale"),
        ("softmax|p|scores", "ds = p * (dp - (dp * p).sum(-1, keepdims=True))", "ds = dp"),
    ),
    *rows(
        "attention_bwd",
        (
            "mean|averag",
            "dk.reshape(n, tk, g, share, d).sum(axis=3)",
            "dk.reshape(n, tk, g, share, d).mean(axis=3)",
            "dv.reshape(n, tk, g, share, d).sum(axis=3)",
            "dv.reshape(n, tk, g, share, d).mean(axis=3)",
        ),
        (
            "summed|shape|group",
            "    dk = dk.reshape(n, tk, g, share, d).sum(axis=3)\n",
            "",
            "    dv = dv.reshape(n, tk, g, share, d).sum(axis=3)\n",
            "",
        ),
        (
            "first",
            "dk.reshape(n, tk, g, share, d).sum(axis=3)",
            "dk[:, :, ::share]",
            "dv.reshape(n, tk, g, share, d).sum(axis=3)",
            "dv[:, :, ::share]",
        ),
        (
            "tile",
            "dk.reshape(n, tk, g, share, d).sum(axis=3)",
            "dk.reshape(n, tk, share, g, d).sum(axis=2)",
            "dv.reshape(n, tk, g, share, d).sum(axis=3)",
            "dv.reshape(n, tk, share, g, d).sum(axis=2)",
        ),
        (
            "tile",
            "np.repeat(k, share, axis=2), np.repeat(v, share, axis=2)",
            "np.tile(k, (1, 1, share, 1)), np.tile(v, (1, 1, share, 1))",
        ),
        ("scale|√D", "scale = q.shape[-1] ** -0.5", "scale = 1.0"),
        ("row sum", "p * (dp - (dp * p).sum(-1, keepdims=True))", "p * dp"),
        (
            "dv.*mean|mean.*dv|dv.*averag|averag.*dv",
            "dv.reshape(n, tk, g, share, d).sum(axis=3)",
            "dv.reshape(n, tk, g, share, d).mean(axis=3)",
        ),
        ("(scale|√D).*dk", "ds, q) * scale", "ds, q)"),
        ("constant|detach|p", "ds = p * (dp - (dp * p).sum(-1, keepdims=True))", "ds = 0 * dp"),
    ),
    *rows(
        "swiglu_bwd",
        ("second term|gate·σ|x·σ|1 − σ", "slope = sig + gate * sig * (1 - sig)", "slope = sig"),
        (
            "sigmoid|σ·\\(1 − σ\\)",
            "slope = sig + gate * sig * (1 - sig)",
            "slope = sig * (1 - sig)",
        ),
        ("up", "dgate = dz * up * slope", "dgate = dz * slope"),
        ("σ|sigmoid|silu", "dup = dz * silu", "dup = dz * sig"),
        ("gate", "dup = dz * silu", "dup = dz * gate"),
        ("exchang|swap|order", "return dgate, dup", "return dup, dgate"),
        ("sign", "sig + gate * sig", "sig - gate * sig"),
        ("1 − σ", "gate * sig * (1 - sig)", "gate * sig * sig"),
        ("gate", "gate * sig * (1 - sig)", "sig * (1 - sig)"),
        ("silu", "dgate = dz * up * slope", "dgate = dz * up * silu"),
    ),
    *rows(
        "cross_entropy_bwd",
        ("count", "dloss * p / count", "dloss * p"),
        (
            "all rows|all positions|ignored|counted",
            "count = max(1, counted.sum())",
            "count = len(labels)",
        ),
        ("ignored|−100", "    p[~counted] = 0\n", ""),
        ("one-hot", "    p[rows, labels[counted]] -= 1\n", ""),
        ("dloss|cotangent", "return dloss * p", "return p"),
        ("added|sign", "] -= 1", "] += 1"),
        ("sign|negat", "return dloss", "return -dloss"),
        (
            "axis",
            "axis=1, keepdims=True))",
            "axis=0, keepdims=True))",
            "e.sum(axis=1",
            "e.sum(axis=0",
        ),
        ("softmax|logits|normalis", "p = e / e.sum(axis=1, keepdims=True)", "p = z.copy()"),
        (
            "shift|next|neighbour|roll",
            "p[rows, labels[counted]]",
            "p[rows, np.roll(labels[counted], -1)]",
        ),
    ),
    *rows(
        "embedding_bwd_params",
        ("repeat|overwrit|accumulat", "np.add.at(dw, res.ids, dy)", "dw[res.ids] = dy"),
        ("repeat|accumulat|once", "np.add.at(dw, res.ids, dy)", "dw[res.ids] += dy"),
        ("dy|rows|shape", "return dw", "return dy"),
        ("w|table", "dw = np.zeros_like(w)", "dw = w.copy()"),
        (
            "averag|mean|count",
            "return dw",
            "return dw / np.maximum(1, np.bincount(res.ids.ravel(), minlength=len(w)))[:, None]",
        ),
        ("one|1|shift|off", "res.ids, dy", "(res.ids + 1) % len(w), dy"),
        ("id 0|token 0|padding", "return dw", "dw[0] = 0\n    return dw"),
        ("sign", "res.ids, dy", "res.ids, -dy"),
        ("first|batch|sequence", "res.ids, dy", "res.ids[:1], dy[:1]"),
        ("last|position", "res.ids, dy", "res.ids[:, -1], dy[:, -1]"),
    ),
    *rows(
        "tied_embedding_bwd",
        ("head", "return dw + head", "return dw"),
        ("lookup", "return dw + head", "return head"),
        ("repeat|overwrit", "np.add.at(dw, ids, dx)", "dw[ids] = dx"),
        ("repeat|once", "np.add.at(dw, ids, dx)", "dw[ids] += dx"),
        ("half|mean|averag|1/2", "return dw + head", "return (dw + head) / 2"),
        ("sign|subtract|difference", "return dw + head", "return dw - head"),
        (
            "input|x|w\\[ids\\]|n",
            "@ n.reshape(-1, n.shape[-1])",
            "@ w[ids].reshape(-1, n.shape[-1])",
        ),
        ("transpos|shape", "return dw + head", "return (dw + head).T"),
        ("averag|mean|number", "return dw + head", "return dw + head / ids.size"),
        ("dx|n|exchang", "np.add.at(dw, ids, dx)", "np.add.at(dw, ids, n)"),
    ),
    *rows(
        "block_bwd",
        ("residual.*MLP", "da = dy + ops", "da = ops"),
        ("residual.*attention", "dx = da + ops", "dx = ops"),
        ("twice", "dx = da + ops", "dx = 2 * da + ops"),
        (
            "rotated back|RoPE",
            "    dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)\n",
            "",
            "    dk = ops.rope_bwd(dk, ops.RopeRes(), layer.cos, layer.sin)\n",
            "",
        ),
        ("dk|k.*rotated", "    dk = ops.rope_bwd(dk, ops.RopeRes(), layer.cos, layer.sin)\n", ""),
        (
            "up",
            'back("mlp.gate_proj", dgate, mlp.n) + back("mlp.up_proj", dup, mlp.n)',
            'back("mlp.gate_proj", dgate, mlp.n)\n    back("mlp.up_proj", dup, mlp.n)',
        ),
        ("v_proj|value", 'dn = dn + back("self_attn.v_proj", dv', 'back("self_attn.v_proj", dv'),
        (
            "norm.*skipped|dx = dy|norm",
            "ops.rmsnorm_bwd(dn2, ops.RmsNormRes(mlp.x), w2, eps=eps)",
            "dn2",
        ),
        ("k_proj|key", 'dn = dn + back("self_attn.k_proj", dk', 'back("self_attn.k_proj", dk'),
        (
            "weight.*other norm|norm.*weight|input_layernorm",
            "(mlp.x), w2",
            '(mlp.x), layer.weight("input_layernorm")',
        ),
    ),
    *rows(
        "mesp_block_bwd",
        (
            "RoPE",
            "    q = ops.rope(q, layer.cos, layer.sin)[0]\n",
            "",
            "    k = ops.rope(k, layer.cos, layer.sin)[0]\n",
            "",
        ),
        ("bias", "bias=True", "bias=False"),
        ("LoRA|adapter|branch", " + layer.scale * (x @ A.T) @ B.T", ""),
        (
            "rotated back|inverse RoPE",
            "    dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)\n",
            "",
            "    dk = ops.rope_bwd(dk, ops.RopeRes(), layer.cos, layer.sin)\n",
            "",
        ),
        (
            "RoPE.*bias",
            "bias=True",
            "bias=False",
            "    q = ops.rope(q, layer.cos, layer.sin)[0]\n",
            "",
            "    k = ops.rope(k, layer.cos, layer.sin)[0]\n",
            "",
            "    dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)\n",
            "",
            "    dk = ops.rope_bwd(dk, ops.RopeRes(), layer.cos, layer.sin)\n",
            "",
        ),
        ("z|silu|down_proj", "z = gate / (1 + np.exp(-gate)) * up", "z = gate * up"),
        ("z|σ|down_proj", "z = gate / (1 + np.exp(-gate)) * up", "z = up / (1 + np.exp(-gate))"),
        (
            "normalised|x for n|att.x",
            'again("self_attn.v_proj", att.n)',
            'again("self_attn.v_proj", att.x)',
            'again("self_attn.q_proj", att.n)',
            'again("self_attn.q_proj", att.x)',
            'again("self_attn.k_proj", att.n)',
            'again("self_attn.k_proj", att.x)',
        ),
        ("scale|alpha", " + layer.scale * (x @ A.T) @ B.T", " + (x @ A.T) @ B.T"),
        ("residual.*MLP", "da = dy + ops", "da = ops"),
    ),
    *rows(
        "mezo",
        (
            "replay|seed|same z|other z",
            "        rng = np.random.default_rng(seed)\n        for name, w",
            "        rng = np.random.default_rng(seed + 1)\n        for name, w",
        ),
        ("2·eps|2eps|twice", "(2 * eps)", "eps"),
        (
            "sign",
            "loss(perturbed(eps)) - loss(perturbed(-eps))",
            "loss(perturbed(-eps)) - loss(perturbed(eps))",
        ),
        ("sum|mean|number of seeds", " / len(seeds)", ""),
        ("one-sided|one side", "loss(perturbed(-eps))) / (2 * eps)", "loss(weights)) / eps"),
        ("last seed|only", "grads[name] += g", "grads[name] = g"),
        ("eps", " / (2 * eps)", ""),
        (
            "same z|every tensor|each tensor",
            "            z = rng.standard_normal",
            "            rng = np.random.default_rng(seed)\n            z = rng.standard_normal",
        ),
        (
            "uniform|normal",
            "z = rng.standard_normal(w.shape, dtype=w.dtype)",
            "z = rng.random(w.shape, dtype=w.dtype)",
        ),
        ("z|noise", "g * z / len(seeds)", "g / len(seeds)"),
    ),
    *rows(
        "training_step",
        ("bias correction", "m / (1 - beta1 ** t)", "m", "v / (1 - beta2 ** t)", "v"),
        ("m.*correct|first moment", "m / (1 - beta1 ** t)", "m"),
        ("t − 1|t|step", "beta1 ** t)", "beta1 ** (t + 1))", "beta2 ** t)", "beta2 ** (t + 1))"),
        ("eps.*root|inside", "(np.sqrt(vhat) + eps)", "np.sqrt(vhat + eps)"),
        ("square|g²", "(1 - beta2) * g ** 2", "(1 - beta2) * g"),
        ("sign|uphill|ascen", "w = w - lr * mhat", "w = w + lr * mhat"),
        ("clip", "    if norm > max_norm:\n        g = g * (max_norm / norm)\n", ""),
        ("decay", "    w = w - lr * weight_decay * w\n", ""),
        (
            "decay.*(L2|gradient|coupled)",
            "    norm = np",
            "    g = g + weight_decay * w\n    norm = np",
            "    w = w - lr * weight_decay * w\n",
            "",
        ),
        ("root|sqrt|square root", "np.sqrt(vhat) + eps", "vhat + eps"),
    ),
]

HELD_OUT = [
    *rows(
        "linear_bwd",
        ("averag|mean|number", "return np", "return 1 / len(dy) * np"),
        ("0|zero|nothing", "dy, w)", "0 * dy, w)"),
        ("1/2|half", "return np", "return 0.5 * np"),
        (
            "last",
            'return np.einsum("...o,oi->...i", dy, w)',
            "dx = np.zeros(res.x.shape)\n    dx[..., -1, :] = dy[..., -1, :] @ w\n    return dx",
        ),
    ),
    *rows(
        "linear_bwd_params",
        ("sign|negat", "dy.sum(axis=0)", "-dy.sum(axis=0)"),
        ("0|zero", "dy.sum(axis=0)", "np.zeros_like(b)"),
        ("transpos", "return dw, db", "return dw.T, db"),
        ("None|bias", "None if b is None else dy.sum(axis=0)", "dy.sum(axis=0)"),
        (
            "averag|mean",
            "dw = dy.T @ x",
            "dw = dy.T @ x / len(x)",
            "dy.sum(axis=0)",
            "dy.mean(axis=0)",
        ),
    ),
    *rows(
        "lora_linear_bwd",
        ("scale| s", "dh = s * (dy @ B)", "dh = dy @ B", "dB = s * np", "dB = np"),
        ("sign", "+ dh @ A", "- dh @ A"),
        ("transpos", "->or", "->ro"),
        (
            "averag|mean|number",
            'np.einsum("ntr,nti->ri", dh, x)',
            'np.einsum("ntr,nti->ri", dh, x) / (x.size / x.shape[-1])',
        ),
        ("twice|s²", "dB = s * np", "dB = s * s * np"),
    ),
    *rows(
        "rmsnorm_bwd",
        ("n⁴|n³|power", "n ** 3", "n ** 4"),
        ("cross|second|n", "n ** 3", "n"),
        ("sum|mean", "(x ** 2).sum(-1, keepdims=True) / C", "(x ** 2).sum(-1, keepdims=True)"),
        ("weight|w|twice", "u / n -", "u * w / n -"),
        ("x", "- x * dot", "- dot"),
        (
            "root|sqrt|n²",
            "n = np.sqrt((x ** 2).sum(-1, keepdims=True) / C + eps)",
            "n = (x ** 2).sum(-1, keepdims=True) / C + eps",
        ),
    ),
    *rows(
        "rmsnorm_bwd_params",
        ("last|first|only", "dw.reshape(-1, dw.shape[-1]).sum(axis=0)", "dw[0].sum(axis=0)"),
        ("max|sum|n", "y = x / n", "y = x * n"),
        ("2|twice", "dw = dy * y", "dw = 2 * dy * y"),
        ("eps.*outside|outside", " + eps)", ") + eps"),
    ),
    *rows(
        "rope_bwd",
        ("scaled|divided|cos² |norm|1/2|2", "return np", "return 2 * np"),
        ("reverse|position", "c = cos[", "c = cos[::-1][", "s = sin[", "s = sin[::-1]["),
        ("sin|exchang|swap|sign", "d2 * c - d1 * s", "d1 * c - d2 * s"),
        ("sign", "return np", "return -np"),
    ),
    *rows(
        "causal_softmax_bwd",
        ("one-hot|1 − p|identity", "dp - dot", "dp - p"),
        ("row sum|p", "ds = p * (dp - dot)", "ds = dp - p * dot"),
        ("dp", "ds = p * (dp - dot)", "ds = dp.copy()"),
        ("sum", "ds = p * (dp - dot)", "ds = p * dot"),
        ("batch|mean|number", "return ds", "return ds / len(ds)"),
    ),
    *rows(
        "attention_one_head_bwd",
        ("√D|scale|multipl", "scale = 1 / np.sqrt(q.shape[-1])", "scale = np.sqrt(q.shape[-1])"),
        ("v|k|dp", "do, v)", "do, k)"),
        ("k.*v|dq", "ds, k) * scale", "ds, v) * scale"),
        ("axis|queries", "(dp * p).sum(-1, keepdims=True)", "(dp * p).sum(-2, keepdims=True)"),
        ("sign", "ds, q) * scale", "ds, q) * -scale"),
        (
            "ds.*p|p.*ds|dv",
            '"nij,nid->njd", p, do',
            '"nij,nid->njd", ds, do',
            "    dv = np",
            '    dp = np.einsum("nid,njd->nij", do, v)\n'
            "    ds = p * (dp - (dp * p).sum(-1, keepdims=True))\n    dv = np",
        ),
    ),
    *rows(
        "attention_bwd",
        ("first", "dk.reshape(n, tk, g, share, d).sum(axis=3)", "dk[:, :, ::share]"),
        ("√D|scale", "q.shape[-1] ** -0.5", "1 / q.shape[-1]"),
        (
            "last",
            "dk.reshape(n, tk, g, share, d).sum(axis=3)",
            "dk[:, :, share - 1 :: share]",
            "dv.reshape(n, tk, g, share, d).sum(axis=3)",
            "dv[:, :, share - 1 :: share]",
        ),
        ("exchang|swap", "return dq, dk, dv", "return dk, dq, dv"),
        ("1 − p|sigmoid|single", "p * (dp - (dp * p).sum(-1, keepdims=True))", "p * (1 - p) * dp"),
        (
            "dk.*(averag|mean)",
            "dk.reshape(n, tk, g, share, d).sum(axis=3)",
            "dk.reshape(n, tk, g, share, d).mean(axis=3)",
        ),
    ),
    *rows(
        "swiglu_bwd",
        ("σ|first term", "sig + gate * sig * (1 - sig)", "gate * sig * (1 - sig)"),
        ("relu|step", "slope = sig + gate * sig * (1 - sig)", "slope = (gate > 0) * 1.0"),
        ("up", "dup = dz * silu", "dup = dz * silu * up"),
        ("up.*gate|exchang|swap", "gate, up = res.gate, res.up", "up, gate = res.gate, res.up"),
        ("slope|deriv", "dup = dz * silu", "dup = dz * (sig + silu * (1 - sig))"),
        ("tanh|1 − σ²|square", "(1 - sig)", "(1 - sig ** 2)"),
    ),
    *rows(
        "cross_entropy_bwd",
        ("ignored|mask|0", "    p[~counted] = 0\n", "", "max(1, counted.sum())", "len(labels)"),
        ("softmax|1/V|missing", "p = e / e.sum(axis=1, keepdims=True)", "p = 0 * e"),
        ("exp|normalis|sum", "p = e / e.sum(axis=1, keepdims=True)", "p = e"),
        ("V|vocabulary|number", "dloss * p / count", "dloss * p / p.size"),
        ("max|overflow|finite", "np.exp(z - z.max(axis=1, keepdims=True))", "np.exp(z)"),
        ("label|twice|2", "] -= 1", "] -= 2"),
    ),
    *rows(
        "embedding_bwd_params",
        (
            "once|last|repeat",
            "np.add.at(dw, res.ids, dy)",
            "for i, g in zip(res.ids.ravel(), dy.reshape(-1, dy.shape[-1])): dw[i] = g",
        ),
        (
            "id 0|token 0|padding",
            "np.add.at(dw, res.ids, dy)",
            "np.add.at(dw, res.ids[res.ids > 0], dy[res.ids > 0])",
        ),
        ("number|mean|averag", "return dw", "return dw / res.ids.size"),
        ("last|sequence|first|row", "res.ids, dy", "res.ids[0], dy[0]"),
    ),
    *rows(
        "tied_embedding_bwd",
        ("lookup.*averag|averag|mean|number", "return dw + head", "return dw / ids.size + head"),
        ("sign|subtract|head", "return dw + head", "return head - dw"),
        ("2|twice", "return dw + head", "return dw + 2 * head"),
        ("product|both", "return dw + head", "return dw * head"),
    ),
    *rows(
        "block_bwd",
        (
            "gate",
            'back("mlp.gate_proj", dgate, mlp.n) + back',
            '0 * back("mlp.gate_proj", dgate, mlp.n) + back',
        ),
        ("exchang|swap|dgate", "dgate, dup = ops", "dup, dgate = ops"),
        ("dq|q.*rotated", "    dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)\n", ""),
        (
            "forward|again",
            "dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)",
            "dq = ops.rope(dq, layer.cos, layer.sin)[0]",
            "dk = ops.rope_bwd(dk, ops.RopeRes(), layer.cos, layer.sin)",
            "dk = ops.rope(dk, layer.cos, layer.sin)[0]",
        ),
        ("q_proj|quer", '    dn = back("self_attn.q_proj"', '    dn = 0 * back("self_attn.q_proj"'),
        ("norm", "ops.rmsnorm_bwd(dn, ops.RmsNormRes(att.x), w1, eps=eps)", "dn"),
        ("residual|dy|da", "dx = da + ops", "dx = dy + ops"),
        ("scale", "s=layer.scale", "s=1.0"),
    ),
    *rows(
        "mesp_block_bwd",
        ("q.*RoPE|RoPE", "    k = ops.rope(k, layer.cos, layer.sin)[0]\n", ""),
        ("z|up", "z = gate / (1 + np.exp(-gate)) * up", "z = gate / (1 + np.exp(-gate))"),
        (
            "z|gate.*up|exchang",
            "z = gate / (1 + np.exp(-gate)) * up",
            "z = up / (1 + np.exp(-up)) * gate",
        ),
        ("residual.*attention", "dx = da + ops", "dx = ops"),
        (
            "value|v",
            'v = again("self_attn.v_proj", att.n).reshape(n, t, -1, d)',
            'v = ops.rope(again("self_attn.v_proj", att.n).reshape(n, t, -1, d), layer.cos, layer.sin)[0]',
        ),
    ),
    *rows(
        "mezo",
        (
            "replay|seed|same z|other z|draw",
            "        rng = np.random.default_rng(seed)\n        for name, w",
            "        rng = np.random.default_rng()\n        for name, w",
        ),
        ("mean|twice|number", "g * z / len(seeds)", "g * z / len(seeds) ** 2"),
        ("eps|one-sided|side", "loss(perturbed(-eps))) / (2 * eps)", "loss(weights)) / (2 * eps)"),
        ("first", "for seed in seeds:", "for seed in seeds[:1]:"),
    ),
    *rows(
        "training_step",
        ("v.*correct|second moment", "v / (1 - beta2 ** t)", "v"),
        ("momentum|m|gradient itself|mhat", "lr * mhat /", "lr * g /"),
        ("beta|exchang|swap", "beta1 * m + (1 - beta1) * g", "(1 - beta1) * m + beta1 * g"),
        ("clip", "if norm > max_norm", "if True"),
        ("decay.*lr|lr.*decay", "lr * weight_decay * w", "weight_decay * w"),
        ("eps", "np.sqrt(vhat) + eps", "np.sqrt(vhat)"),
        (
            "clip|entry|element",
            "        g = g * (max_norm / norm)\n",
            "        g = np.clip(g, -max_norm, max_norm)\n",
        ),
    ),
]

# Written after the first two, in two rounds; the score of each was taken before the tutor learnt from it.
LATER = [
    *rows("rmsnorm_bwd", ("keepdims", ".sum(-1, keepdims=True) / C + eps", ".sum(-1) / C + eps")),
    *rows(
        "rmsnorm_bwd", ("keepdims", "dot = (u * x).sum(-1, keepdims=True)", "dot = (u * x).sum(-1)")
    ),
    *rows(
        "rmsnorm_bwd",
        (
            "axis|tokens",
            "dot = (u * x).sum(-1, keepdims=True) / C",
            "dot = (u * x).sum(1, keepdims=True) / x.shape[1]",
        ),
    ),
    *rows("rmsnorm_bwd", ("C|mean|rows", "/ C + eps", "/ len(x) + eps")),
    *rows(
        "rmsnorm_bwd",
        (
            "eps",
            "n = np.sqrt((x ** 2).sum(-1, keepdims=True) / C + eps)",
            "n = np.sqrt((x ** 2).sum(-1, keepdims=True) / C + 1e-6)",
        ),
    ),
    *rows(
        "rmsnorm_bwd",
        (
            "eps",
            "n = np.sqrt((x ** 2).sum(-1, keepdims=True) / C + eps)",
            "n = np.sqrt((x ** 2).sum(-1, keepdims=True) / C + eps ** 2)",
        ),
    ),
    *rows(
        "rmsnorm_bwd",
        ("weight|w", "return u / n - x * dot / n ** 3", "return (u / n - x * dot / n ** 3) * w"),
    ),
    *rows(
        "rmsnorm_bwd",
        (
            "first|cross|C",
            "(u * x).sum(-1, keepdims=True) / C",
            "(u * x).sum(-1, keepdims=True) / C ** 2",
        ),
    ),
    *rows(
        "rmsnorm_bwd",
        ("C|factor|n", "return u / n - x * dot / n ** 3", "return u - x * dot / n ** 2"),
    ),
    *rows(
        "rmsnorm_bwd",
        (
            "mean|LayerNorm|subtract",
            "u = dy * w",
            "u = dy * w\n    u = u - u.mean(-1, keepdims=True)",
        ),
    ),
    *rows(
        "rmsnorm_bwd", ("LayerNorm|mean", "x = res.x", "x = res.x - res.x.mean(-1, keepdims=True)")
    ),
    *rows("rmsnorm_bwd_params", ("eps|axis|keepdims", "axis=-1, keepdims=True", "axis=-1")),
    *rows("rmsnorm_bwd_params", ("absolute|w", "dw = dy * y", "dw = abs(dy * y)")),
    *rows("linear_bwd", ("transpos", 'np.einsum("...o,oi->...i", dy, w)', "dy @ w.T")),
    *rows("linear_bwd", ("transpos|weight|W", 'np.einsum("...o,oi->...i", dy, w)', "(w.T @ dy)")),
    *rows(
        "linear_bwd_params",
        ("outer|row|sum", "dw = dy.T @ x", "dw = np.outer(dy.sum(0), x.mean(0))"),
    ),
    *rows("linear_bwd_params", ("axis|sum", "dy.sum(axis=0)", "dy.sum(axis=-1)")),
    *rows(
        "linear_bwd_params",
        (
            "batch|leading|axes",
            "    dy = dy.reshape(-1, dy.shape[-1])\n    x = res.x.reshape(-1, res.x.shape[-1])\n    dw = dy.T @ x",
            "    x = res.x\n    dw = np.einsum('nto,nti->noi', dy, x)",
        ),
    ),
    *rows("lora_linear_bwd", ("s|scale", "dh = s * (dy @ B)", "dh = s * (dy @ B) / A.shape[0]")),
    *rows("lora_linear_bwd", ("scale|s", "dB = s * np", "dB = np.sqrt(s) * np")),
    *rows("lora_linear_bwd", ("A|h", "h = x @ A.T", "h = x @ A.T * s")),
    *rows("lora_linear_bwd", ("exactly B", "return dx, dA, dB", "return dx + 0 * dx, dA, dB + B")),
    *rows(
        "rope_bwd",
        (
            "transpos|position|axis|stopped",
            "c = cos[..., None, :]",
            "c = cos",
            "s = sin[..., None, :]",
            "s = sin",
        ),
    ),
    *rows(
        "rope_bwd",
        (
            "neighbour|interleav|pairs",
            "dy[..., :half]",
            "dy[..., 0::2]",
            "dy[..., half:]",
            "dy[..., 1::2]",
        ),
    ),
    *rows(
        "rope_bwd",
        ("half", "np.concatenate([dx1, dx2], axis=-1)", "np.concatenate([dx1, dx1], axis=-1)"),
    ),
    *rows("causal_softmax_bwd", ("keepdims", "sum(axis=-1, keepdims=True)", "sum(axis=-1)")),
    *rows("causal_softmax_bwd", ("mask|0", "return ds", "return ds + (p == 0) * 1.0")),
    *rows(
        "causal_softmax_bwd",
        ("p|softmax", "p = res.p", "p = np.exp(res.p) / np.exp(res.p).sum(-1, keepdims=True)"),
    ),
    *rows("causal_softmax_bwd", ("log|p", "p * (dp - dot)", "dp - p * dp.sum(-1, keepdims=True)")),
    *rows(
        "attention_one_head_bwd",
        ("√D|scale", "scale = 1 / np.sqrt(q.shape[-1])", "scale = 1 / np.sqrt(k.shape[1])"),
    ),
    *rows(
        "attention_one_head_bwd",
        (
            "dp|scale",
            'dp = np.einsum("nid,njd->nij", do, v)',
            'dp = np.einsum("nid,njd->nij", do, v) * scale',
        ),
    ),
    *rows(
        "attention_one_head_bwd",
        (
            "mask|triangle",
            "ds = p * (dp - (dp * p).sum(-1, keepdims=True))",
            "ds = np.tril(dp - (dp * p).sum(-1, keepdims=True))",
        ),
    ),
    *rows(
        "attention_bwd",
        (
            "group|head|shape|sum",
            "dk = dk.reshape(n, tk, g, share, d).sum(axis=3)",
            "dk = dk.reshape(n, tk, g, share, d).sum(axis=2)",
        ),
    ),
    *rows(
        "attention_bwd",
        (
            "tile",
            "np.repeat(k, share, axis=2), np.repeat(v, share, axis=2)",
            "np.tile(k, (1, 1, share, 1)), np.repeat(v, share, axis=2)",
        ),
    ),
    *rows(
        "attention_bwd",
        (
            "dq.*(mean|averag|H/G|share|group)|H/G|share",
            "* scale\n    dk = np.einsum",
            "* scale / share\n    dk = np.einsum",
        ),
    ),
    *rows("swiglu_bwd", ("relu|ReLU", "sig = 1 / (1 + np.exp(-gate))", "sig = (gate > 0) * 1.0")),
    *rows("swiglu_bwd", ("sign|σ|exp", "1 / (1 + np.exp(-gate))", "1 / (1 + np.exp(gate))")),
    *rows(
        "swiglu_bwd",
        (
            "overflow|NaN|nan|finite",
            "1 / (1 + np.exp(-gate))",
            "np.exp(gate * 30) / (1 + np.exp(gate * 30))",
        ),
    ),
    *rows("swiglu_bwd", ("dup|dgate|up", "dgate = dz * up * slope", "dgate = dup * slope")),
    *rows("swiglu_bwd", ("gate|up", "dgate = dz * up * slope", "dgate = dz * gate * slope")),
    *rows(
        "cross_entropy_bwd",
        (
            "index|−100|ignored",
            "rows = np.arange(len(labels))[counted]\n    p[rows, labels[counted]] -= 1",
            "p[np.arange(len(labels)), labels] -= 1",
        ),
    ),
    *rows(
        "cross_entropy_bwd",
        (
            "ignored|−100|0",
            "labels[counted]] -= 1",
            "labels[counted]] -= 1\n    p[np.arange(len(labels))[~counted], 0] -= 1",
            "    p[~counted] = 0\n",
            "",
        ),
    ),
    *rows(
        "cross_entropy_bwd",
        (
            "log|softmax",
            "return dloss * p / count",
            "return dloss * np.log(np.abs(p) + 1e-9) / count",
        ),
    ),
    *rows("cross_entropy_bwd", ("max|1", "count = max(1, counted.sum())", "count = counted.sum()")),
    *rows(
        "cross_entropy_bwd",
        ("rows|count", "count = max(1, counted.sum())", "count = len(labels) - 1"),
    ),
    *rows(
        "embedding_bwd_params",
        ("w|table|rows", "np.add.at(dw, res.ids, dy)", "np.add.at(dw, res.ids, dy * w[res.ids])"),
    ),
    *rows(
        "embedding_bwd_params",
        (
            "repeat|unique|once",
            "np.add.at(dw, res.ids, dy)",
            "u, i = np.unique(res.ids, return_index=True); dw[u] = dy.reshape(-1, dy.shape[-1])[i]",
        ),
    ),
    *rows(
        "tied_embedding_bwd",
        (
            "overwrit|replaced",
            "return dw + head",
            "used = np.unique(ids)\n    head[used] = dw[used]\n    return head",
        ),
    ),
    *rows(
        "block_bwd",
        ("residual|da|norm", "da = dy + ops.rmsnorm_bwd(dn2", "da = ops.rmsnorm_bwd(dn2 + dy"),
    ),
    *rows(
        "block_bwd",
        (
            "dv|rotat",
            "dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)",
            "dq = ops.rope_bwd(dq, ops.RopeRes(), layer.cos, layer.sin)\n    dv = ops.rope_bwd(dv, ops.RopeRes(), layer.cos, layer.sin)",
        ),
    ),
    *rows(
        "block_bwd",
        ("up|gate", 'back("mlp.up_proj", dup, mlp.n)', 'back("mlp.up_proj", dgate, mlp.n)'),
    ),
    *rows("block_bwd", ("norm|x|normalis", "ops.RmsNormRes(mlp.x)", "ops.RmsNormRes(mlp.n)")),
    *rows(
        "block_bwd", ("lacks|gradient", "return dx, grads", "grads.popitem()\n    return dx, grads")
    ),
    *rows(
        "block_bwd",
        (
            "x|o_proj|input",
            'back("self_attn.o_proj", da, f.o)',
            'back("self_attn.o_proj", dy, f.o)',
        ),
    ),
    *rows(
        "mesp_block_bwd",
        ("silu|z", "z = gate / (1 + np.exp(-gate)) * up", "z = gate / (1 + np.exp(gate)) * up"),
    ),
    *rows(
        "mesp_block_bwd",
        (
            "RoPE|position|rotat",
            "q = ops.rope(q, layer.cos, layer.sin)[0]",
            "q = ops.rope(q, layer.cos, -layer.sin)[0]",
            "k = ops.rope(k, layer.cos, layer.sin)[0]",
            "k = ops.rope(k, layer.cos, -layer.sin)[0]",
        ),
    ),
    *rows(
        "mezo",
        (
            "seed|same|replay",
            "            rng = np.random.default_rng(seed)\n            return",
            "            rng = np.random.default_rng()\n            return",
        ),
    ),
    *rows(
        "mezo",
        (
            "place|restor|back",
            "        g = (loss(perturbed(eps))",
            "        for n, w in weights.items(): w += 1e-3\n        g = (loss(perturbed(eps))",
        ),
    ),
    *rows("mezo", ("eps", "(2 * eps)", "(2 * eps) * eps")),
    *rows(
        "training_step",
        ("in place|m|v", "m = beta1 * m + (1 - beta1) * g", "m *= beta1\n    m += (1 - beta1) * g"),
    ),
    *rows(
        "training_step",
        (
            "order|moment|clip|square",
            "v = beta2 * v + (1 - beta2) * g ** 2",
            "v = beta2 * v + (1 - beta2) * gradient(w) ** 2",
        ),
    ),
    *rows("training_step", ("lr|bias", "lr * mhat", "lr * mhat / np.sqrt(t)")),
    *rows(
        "training_step",
        (
            "max|AMSGrad|v",
            "v = beta2 * v + (1 - beta2) * g ** 2",
            "v = np.maximum(v, beta2 * v + (1 - beta2) * g ** 2)",
        ),
    ),
    *rows("linear_bwd", ("row|token|first|roll|order", "dy, w)", "np.roll(dy, 1, axis=1), w)")),
    *rows(
        "linear_bwd",
        (
            "dy|W|weight",
            'np.einsum("...o,oi->...i", dy, w)',
            "dy.sum(-1, keepdims=True) * w.sum(0)",
        ),
    ),
    *rows("linear_bwd_params", ("softmax|db|max|largest", "dy.sum(axis=0)", "dy.max(axis=0)")),
    *rows("linear_bwd_params", ("b|bias", "return dw, db", "return dw, (0 if db is None else db)")),
    *rows("lora_linear_bwd", ("rank|R", "dh = s * (dy @ B)", "dh = s * (dy @ B) / B.shape[1]")),
    *rows(
        "lora_linear_bwd",
        (
            "dB.*h|x|A",
            'dB = s * np.einsum("nto,ntr->or", dy, h)',
            'dB = s * np.einsum("nto,nti->oi", dy, x) @ A.T * 0 + s * np.einsum("nto,ntr->or", dy, dh)',
        ),
    ),
    *rows(
        "lora_linear_bwd",
        ("batch|sequence|first|last", '"ntr,nti->ri", dh, x', '"tr,ti->ri", dh[0], x[0]'),
    ),
    *rows("lora_linear_bwd", ("frozen|W|dx", "dx = dy @ w + dh @ A", "dx = s * (dy @ w) + dh @ A")),
    *rows(
        "lora_linear_bwd",
        (
            "s|scale",
            "h = x @ A.T\n    dh = s * (dy @ B)",
            "h = x @ A.T\n    dh = (dy @ B)",
            "dB = s * np",
            "dB = np",
        ),
    ),
    *rows(
        "rmsnorm_bwd",
        (
            "half|2|twice",
            "return u / n - x * dot / n ** 3",
            "return u / n - 0.5 * x * dot / n ** 3",
        ),
    ),
    *rows(
        "rmsnorm_bwd",
        ("twice|2", "return u / n - x * dot / n ** 3", "return u / n - 2 * x * dot / n ** 3"),
    ),
    *rows("rmsnorm_bwd", ("cross|x|n", "- x * dot / n ** 3", "- x / n * dot / n ** 3")),
    *rows(
        "rmsnorm_bwd",
        ("n|sign", "return u / n - x * dot / n ** 3", "return x * dot / n ** 3 - u / n"),
    ),
    *rows("rope_bwd", ("forward|half|sign", "dx2 = d2 * c - d1 * s", "dx2 = d1 * s - d2 * c")),
    *rows("rope_bwd", ("cos|sin", "dx1 = d1 * c + d2 * s", "dx1 = d1 * s + d2 * c")),
    *rows(
        "rope_bwd",
        ("head|axis|transp|position", "c = cos[..., None, :]", "c = np.cos(cos)[..., None, :]"),
    ),
    *rows("causal_softmax_bwd", ("p", "p * (dp - dot)", "p - dp * dot")),
    *rows(
        "causal_softmax_bwd",
        (
            "dot|row sum|sum",
            "dot = (dp * p).sum(axis=-1, keepdims=True)",
            "dot = (dp * p).sum(axis=(-1, -2), keepdims=True)",
        ),
    ),
    *rows(
        "causal_softmax_bwd",
        ("last|row sum", "dot = (dp * p).sum(axis=-1, keepdims=True)", "dot = (dp * p)[..., -1:]"),
    ),
    *rows(
        "attention_one_head_bwd",
        (
            "dv|dq|dp|softmax",
            'dv = np.einsum("nij,nid->njd", p, do)',
            'dv = np.einsum("nij,nid->njd", np.log(p + 1e-9), do)',
        ),
    ),
    *rows(
        "attention_one_head_bwd",
        (
            "k|dk",
            'dk = np.einsum("nij,nid->njd", ds, q) * scale',
            'dk = np.einsum("nij,nid->njd", p, q) * scale',
        ),
    ),
    *rows("attention_one_head_bwd", ("row sum", "dp * p", "dp")),
    *rows("attention_one_head_bwd", ("scale|√D|twice", "ds = p *", "ds = scale * p *")),
    *rows("attention_one_head_bwd", ("dq|dk", "return dq[:, :, None]", "return -dq[:, :, None]")),
    *rows(
        "attention_bwd",
        (
            "head|group|share|first",
            "kr, vr = np.repeat(k, share, axis=2), np.repeat(v, share, axis=2)",
            "kr, vr = np.repeat(k[:, :, :1], q.shape[2], axis=2), np.repeat(v[:, :, :1], q.shape[2], axis=2)",
        ),
    ),
    *rows(
        "attention_bwd",
        (
            "last",
            "dv = dv.reshape(n, tk, g, share, d).sum(axis=3)",
            "dv = dv.reshape(n, tk, g, share, d)[:, :, :, -1]",
        ),
    ),
    *rows(
        "attention_bwd",
        (
            "number of query heads",
            "dk = dk.reshape(n, tk, g, share, d).sum(axis=3)",
            "dk = dk.reshape(n, tk, g, share, d).sum(axis=3) / q.shape[2]",
        ),
    ),
    *rows(
        "attention_bwd",
        (
            "max|sum|mean|group",
            "dk = dk.reshape(n, tk, g, share, d).sum(axis=3)",
            "dk = dk.reshape(n, tk, g, share, d).max(axis=3)",
        ),
    ),
    *rows(
        "swiglu_bwd",
        ("1|σ|silu", "slope = sig + gate * sig * (1 - sig)", "slope = sig * (1 + gate * sig)"),
    ),
    *rows(
        "swiglu_bwd", ("tanh|deriv", "slope = sig + gate * sig * (1 - sig)", "slope = 1 - sig ** 2")
    ),
    *rows("swiglu_bwd", ("dz", "dup = dz * silu", "dup = silu")),
    *rows("swiglu_bwd", ("sign", "dgate = dz * up", "dgate = -dz * up")),
    *rows(
        "cross_entropy_bwd",
        ("onehot|one-hot|label", "p[rows, labels[counted]] -= 1", "p[rows, labels[counted]] = -1"),
    ),
    *rows(
        "cross_entropy_bwd",
        ("dloss|twice", "return dloss * p / count", "return dloss * dloss * p / count"),
    ),
    *rows(
        "cross_entropy_bwd",
        (
            "mean|subtract",
            "return dloss * p / count",
            "p -= p.mean(1, keepdims=True)\n    return dloss * p / (count + 1)",
        ),
    ),
    *rows(
        "cross_entropy_bwd",
        ("sigmoid", "p = e / e.sum(axis=1, keepdims=True)", "p = 1 / (1 + np.exp(-z))"),
    ),
    *rows("cross_entropy_bwd", ("ignored|zero|0", "p[~counted] = 0", "p[~counted] = 1")),
    *rows("cross_entropy_bwd", ("0|padding", "counted = labels != -100", "counted = labels > 0")),
    *rows(
        "cross_entropy_bwd",
        ("label|shift|one", "p[rows, labels[counted]]", "p[rows, labels[counted] - 1]"),
    ),
    *rows(
        "embedding_bwd_params", ("position|order|revers|dy", "res.ids, dy", "res.ids, dy[:, ::-1]")
    ),
    *rows("embedding_bwd_params", ("size|number|mean|averag", "return dw", "return dw / len(w)")),
    *rows(
        "embedding_bwd_params",
        (
            "square|√|norm|count",
            "return dw",
            "c = np.bincount(res.ids.ravel(), minlength=len(w))[:, None]\n    return dw / np.sqrt(np.maximum(c, 1))",
        ),
    ),
    *rows(
        "tied_embedding_bwd",
        (
            "V|lookup|head",
            "dlogits.reshape(-1, dlogits.shape[-1]).T",
            "(dlogits - dlogits.mean(-1, keepdims=True)).reshape(-1, dlogits.shape[-1]).T",
        ),
    ),
    *rows(
        "tied_embedding_bwd",
        ("head.*n|dx|n", "@ n.reshape(-1, n.shape[-1])", "@ dx.reshape(-1, n.shape[-1])"),
    ),
    *rows(
        "block_bwd",
        (
            "exchang|q_proj|k_proj|v_proj",
            'back("self_attn.k_proj", dk',
            'back("self_attn.k_proj", dv',
            'back("self_attn.v_proj", dv',
            'back("self_attn.v_proj", dk',
        ),
    ),
    *rows(
        "block_bwd",
        (
            "z|silu|down",
            'back("mlp.down_proj", dy, mlp.inside.z)',
            'back("mlp.down_proj", dy, mlp.inside.silu)',
        ),
    ),
    *rows(
        "block_bwd",
        ("da|dy|MLP", 'do = back("self_attn.o_proj", da', 'do = back("self_attn.o_proj", da - dy'),
    ),
    *rows("block_bwd", ("twice|2", "dn2 = back", "dn2 = 2 * back")),
    *rows(
        "block_bwd",
        (
            "x|n",
            'back("self_attn.q_proj", dq.reshape(n, t, -1), att.n)',
            'back("self_attn.q_proj", dq.reshape(n, t, -1), att.x)',
        ),
    ),
    *rows(
        "mesp_block_bwd",
        ("q", 'q = again("self_attn.q_proj", att.n)', 'q = again("self_attn.q_proj", att.x)'),
    ),
    *rows(
        "mesp_block_bwd",
        (
            "o|attention",
            'back("self_attn.o_proj", da, att.inside.o)',
            'back("self_attn.o_proj", da, att.n[..., :1] * 0 + att.inside.o * 0.5)',
        ),
    ),
    *rows(
        "mezo",
        (
            "sign|±1",
            "z = rng.standard_normal(w.shape, dtype=w.dtype)",
            "z = np.sign(rng.standard_normal(w.shape, dtype=w.dtype))",
        ),
    ),
    *rows("mezo", ("mean|number", "/ len(seeds)", "/ (len(seeds) + 1)")),
    *rows(
        "mezo",
        (
            "first|one|seed",
            "default_rng(seed)\n            return",
            "default_rng(seeds[0])\n            return",
        ),
    ),
    *rows("mezo", ("w|weight", "grads[name] += g * z", "grads[name] += g * z * w")),
    *rows("training_step", ("bias", "mhat = m / (1 - beta1 ** t)", "mhat = m / (1 - beta1) ** t")),
    *rows("training_step", ("eps|root", "(np.sqrt(vhat) + eps)", "np.sqrt(vhat) + eps")),
    *rows("training_step", ("decay", "w = w - lr * weight_decay * w", "w = w - lr * weight_decay")),
    *rows(
        "training_step", ("momentum|m|β", "m = beta1 * m + (1 - beta1) * g", "m = beta1 * m + g")
    ),
    *rows(
        "training_step", ("clip|norm", "norm = np.sqrt((g ** 2).sum())", "norm = np.abs(g).sum()")
    ),
    *rows(
        "training_step",
        (
            "order|decay|after",
            "    w = w - lr * weight_decay * w\n    w = w - lr * mhat / (np.sqrt(vhat) + eps)",
            "    w = w - lr * mhat / (np.sqrt(vhat) + eps)\n    w = w - lr * weight_decay * w",
        ),
    ),
]
