"""One transformer block from ops, forward and backward.

The forward runs each op and hands its output to `run`, which may keep the residual in a dict; the
backward pops each residual at its last use, so that it dies there. What the forward dropped is
rebuilt by the very functions that made it: `qkv` and `swiglu`.
Workers share a block: each has a part of the heads, then a part of the MLP's columns (parts.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from mesp_ref import ops
from mesp_ref.engine.adapter import tensor_name
from mesp_ref.engine.layer import Layer
from mesp_ref.lean.shards import Half, attention_cuts, combined, mlp_cuts, total
from mesp_ref.ops import NOTHING, Array

# What MeSP does not keep: h = x·Aᵀ of every LoRA layer, silu(gate), q, k, v, and z, the input of
# down_proj. Left are the paper's eight: block input, first norm, probabilities, attention output,
# the sum after attention, second norm, gate, up (the norms as inputs of the layers they feed).
MESP = frozenset({"h", "silu", "q", "k", "v", "z"})

Tap = Callable[[str, Array], object]
_INNER = ("p", "h", "silu")  # intermediates inside an op that its residual shows


class KeyValueStore(Protocol):
    """Earlier keys and values of a sequence being generated."""

    def extend(self, k: Array, v: Array) -> tuple[Array, Array]: ...


def untapped(name: str, value: Array) -> None:
    """The tap that looks at nothing."""


def project(part: str, x: Array, layer: Layer, drop: frozenset[str]) -> tuple[Array, Any]:
    """One of the seven projections, with its LoRA branch where the adapter has one."""
    pair = layer.adapter and layer.adapter.pair(layer.name(part))
    if not pair:
        return ops.linear(x, *layer.parameters(part))
    assert layer.adapter is not None
    return ops.lora_linear(x, *layer.parameters(part), *pair, s=layer.adapter.scale, drop=drop)


def qkv(n: Array, layer: Layer, run: Callable[..., Array], drop: frozenset[str]) -> list[Array]:
    """Queries and keys after RoPE, and values: [N, T, heads, D]. Forward and rebuild alike."""
    heads = []
    for letter in "qkv":
        part = f"self_attn.{letter}_proj"
        y = run(part, *project(part, n, layer, drop))
        y = y.reshape(*y.shape[:2], -1, layer.config.head_dim)
        if letter != "v":
            y = run(f"self_attn.{letter}_rope", *ops.rope(y, layer.cos, layer.sin))
        heads.append(y)
    return heads


def _recorder(
    layer: Layer, res: dict[str, Any] | None, drop: frozenset[str], tap: Tap
) -> Callable[..., Array]:
    """`run(part, y, r)` shows y to the tap, keeps r without its dropped fields, and returns y."""

    def run(part: str, y: Array, r: Any, drop: frozenset[str] = drop) -> Array:
        for field in _INNER:
            if getattr(r, field, None) is not None:
                tap(f"{layer.name(part)}.{field}", getattr(r, field))
        tap(layer.name(part), y)
        if res is not None:
            res[layer.key(part)] = r._replace(
                **{field: None for field in r._fields if field in drop}
            )
        return y

    return run


def block(
    x: Array,
    layer: Layer,
    *,
    res: dict[str, Any] | None = None,
    drop: frozenset[str] = NOTHING,
    past: KeyValueStore | None = None,
    tap: Tap = untapped,
) -> Array:
    """One pre-norm transformer block.

    Forward   n₁ = norm(x);  q, k, v = their projections of n₁;
              a = x + o_proj(attention(rope(q), rope(k), v))
              n₂ = norm(a);  y = a + down_proj(silu(gate_proj(n₂)) ⊙ up_proj(n₂))
    Shapes    x [N, T, C] -> y [N, T, C]
    Keeps     residuals in `res` when it is given, without the fields named in `drop`
    Alone     `past` and `tap` are for one worker: a cache grows once, a tensor is seen whole
    """
    assert layer.workers.size == 1 or (past is None and tap is untapped)
    eps, run = layer.config.rms_norm_eps, _recorder(layer, res, drop, tap)
    n = run("input_layernorm", *ops.rmsnorm(x, layer.weight("input_layernorm"), eps=eps))
    attention = partial(_attention, n, res, drop, past, tap)
    a = x + total(layer.each(attention_cuts, attention))
    del x, n, attention
    tap(layer.name("after_attention"), a)

    part = "post_attention_layernorm"
    n = run(part, *ops.rmsnorm(a, layer.weight(part), eps=eps))
    y = a + total(layer.each(mlp_cuts, partial(_mlp, n, res, drop, tap)))
    tap(f"model.layers.{layer.number}", y)
    return y


def _attention(
    n: Array, res: dict[str, Any] | None, drop: frozenset[str], past: KeyValueStore | None,
    tap: Tap, layer: Layer,
) -> Array:  # fmt: skip
    """o_proj(attention(n)), or what a worker's heads give to it."""
    run = _recorder(layer, res, drop, tap)
    q, k, v = qkv(n, layer, run, drop)
    if past is not None:
        k, v = past.extend(k, v)
    o = run("self_attn.attention", *ops.attention(q, k, v))
    del q, k, v
    o = o.reshape(*n.shape[:2], -1)  # [N, T, H·D]
    return run("self_attn.o_proj", *project("self_attn.o_proj", o, layer, drop))


def _mlp(
    n: Array, res: dict[str, Any] | None, drop: frozenset[str], tap: Tap, layer: Layer
) -> Array:
    """down_proj(silu(gate_proj(n)) ⊙ up_proj(n)), or what a worker's columns give to it."""
    run = _recorder(layer, res, drop, tap)
    gate = run("mlp.gate_proj", *project("mlp.gate_proj", n, layer, drop))
    up = run("mlp.up_proj", *project("mlp.up_proj", n, layer, drop))
    z = run("mlp.swiglu", *ops.swiglu(gate, up, drop=drop))
    del gate, up
    drop_z = drop | {"x"} if "z" in drop else drop
    return run("mlp.down_proj", *project("mlp.down_proj", z, layer, drop), drop_z)


def project_bwd(
    part: str, dy: Array, r: Any, layer: Layer, params: bool
) -> tuple[Array, dict[str, Array]]:
    """Backward of one projection: dx, and the gradients of A, B (and of W, b when `params`)."""
    grads: dict[str, Array] = {}
    module, (w, b) = layer.name(part), layer.parameters(part)
    pair = layer.adapter and layer.adapter.pair(module)
    if pair:
        assert layer.adapter is not None
        dx, dA, dB = ops.lora_linear_bwd(dy, r, w, b, *pair, s=layer.adapter.scale)
        grads[tensor_name(module, "A")], grads[tensor_name(module, "B")] = dA, dB
    else:
        dx = ops.linear_bwd(dy, r, w, b)
    if params:  # the LoRA branch adds nothing to the base weight's gradient
        grads[f"{module}.weight"], db = ops.linear_bwd_params(dy, r, w, b)
        if db is not None:
            grads[f"{module}.bias"] = db
    return dx, grads


def _rebuild_z(res: dict[str, Any], layer: Layer) -> None:
    """Give down_proj its input back when it was dropped."""
    key = layer.key("mlp.down_proj")
    if res[key].x is None:
        r = res[layer.key("mlp.swiglu")]
        z, _ = ops.swiglu(r.gate, r.up, drop=frozenset({"silu"}))
        res[key] = res[key]._replace(x=z)


def _rebuild_qkv(res: dict[str, Any], layer: Layer) -> None:
    """Give attention its q, k and v back when they were dropped: projections, biases, RoPE."""
    key = layer.key("self_attn.attention")
    if res[key].q is None:
        n = res[layer.key("self_attn.q_proj")].x
        q, k, v = qkv(n, layer, lambda part, y, r: y, frozenset({"h"}))
        res[key] = res[key]._replace(q=q, k=k, v=v)


def block_bwd(
    dy: Array, res: dict[str, Any], layer: Layer, *, params: bool = False, tap: Tap = untapped
) -> Half:
    """VJP of block: dx, and the gradients of its LoRA matrices (with `params` of every weight).

    Backward  the ops of block in reverse; where a value was used twice, its gradients add
    Shapes    dy [N, T, C] -> dx [N, T, C]; gradients by tensor name
    Empties   `res`: each residual is popped at its last use
    """
    grads: dict[str, Array] = {}

    def back_norm(part: str, dy: Array) -> Array:
        tap(f"{layer.name(part)}.grad", dy)
        r, w, eps = res.pop(part), layer.weight(part), layer.config.rms_norm_eps
        if params:
            grads[f"{layer.name(part)}.weight"] = ops.rmsnorm_bwd_params(dy, r, w, eps=eps)
        return ops.rmsnorm_bwd(dy, r, w, eps=eps)

    tap(f"model.layers.{layer.number}.grad", dy)
    dn, found = combined(layer.each(mlp_cuts, partial(_mlp_bwd, dy, res, params, tap)))
    grads |= found
    da = dy + back_norm("post_attention_layernorm", dn)  # the residual path and the MLP
    tap(layer.name("after_attention.grad"), da)

    dn, found = combined(layer.each(attention_cuts, partial(_attention_bwd, da, res, params, tap)))
    grads |= found
    dx = da + back_norm("input_layernorm", dn)  # the residual path and the attention
    return dx, grads


def _way_back(
    res: dict[str, Any], params: bool, tap: Tap, layer: Layer
) -> tuple[Callable[[str, Array], Array], dict[str, Array]]:
    """`back(part, dy)` pops a projection's residual and returns dx; its gradients go to the dict."""
    grads: dict[str, Array] = {}

    def back(part: str, dy: Array) -> Array:
        tap(f"{layer.name(part)}.grad", dy)
        dx, found = project_bwd(part, dy, res.pop(layer.key(part)), layer, params)
        grads.update(found)
        return dx

    return back, grads


def _mlp_bwd(dy: Array, res: dict[str, Any], params: bool, tap: Tap, layer: Layer) -> Half:
    """From the gradient of the MLP's output to that of the norm before gate and up."""
    back, grads = _way_back(res, params, tap, layer)
    _rebuild_z(res, layer)
    dz = back("mlp.down_proj", dy)
    tap(layer.name("mlp.swiglu.grad"), dz)
    dgate, dup = ops.swiglu_bwd(dz, res.pop(layer.key("mlp.swiglu")))
    del dz
    dn = back("mlp.gate_proj", dgate)
    del dgate
    dn += back("mlp.up_proj", dup)  # n₂ feeds gate and up
    return dn, grads


def _attention_bwd(da: Array, res: dict[str, Any], params: bool, tap: Tap, layer: Layer) -> Half:
    """From the gradient of o_proj's output to that of the norm before q, k and v."""
    back, grads = _way_back(res, params, tap, layer)
    n, t, _ = da.shape
    do = back("self_attn.o_proj", da).reshape(n, t, -1, layer.config.head_dim)  # [N, T, H, D]
    tap(layer.name("self_attn.attention.grad"), do)
    _rebuild_qkv(res, layer)
    dn, key = None, layer.key("self_attn.attention")
    for letter, dy in zip("qkv", ops.attention_bwd(do, res.pop(key)), strict=True):
        if letter != "v":
            part = f"self_attn.{letter}_rope"
            tap(layer.name(f"{part}.grad"), dy)
            dy = ops.rope_bwd(dy, res.pop(layer.key(part)), layer.cos, layer.sin)
        dx = back(f"self_attn.{letter}_proj", dy.reshape(n, t, -1))
        if dn is not None:
            dx += dn  # n₁ feeds q, k and v
        dn = dx
        del dx  # one sum beside what comes next
    assert dn is not None
    return dn, grads
