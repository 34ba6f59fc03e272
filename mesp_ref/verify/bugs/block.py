"""The halves of a block, their backward and their rebuilding gone wrong."""

from mesp_ref.verify.bugs.bug import one

_REBUILT = "res.q, res.k, res.v = qkv(n, layer, raw=res.raw)"
_BARE = "layer._replace(cos=1 + 0 * layer.cos, sin=0 * layer.sin"

BUGS = [
    *one(
        "engine.half:sublayer_bwd", "backward", "model",
        ("block: MLP residual path dropped", "return dy + dx",
         "return (0 * dy if half else dy) + dx"),
        ("block: attention residual path dropped", "return dy + dx",
         "return (dy if half else 0 * dy) + dx"),
        ("block: norm's backward skipped", "return dy + dx, grads", "return dy + dn, grads"),
        ("block: weight of the other norm", "traits.norms[half]", "traits.norms[0]"),
    ),
    *one(
        "engine.mlp_half:mlp_half_bwd", "backward", "model",
        ("block: up dropped at the fan-out", "dn += dn_up", "pass"),
        ("block: gate dropped at the fan-out", "dn += dn_up", "dn = dn_up"),
        ("block: dup and dgate exchanged", "dgate, dup = gated_bwd", "dup, dgate = gated_bwd"),
        ("rebuild: z from exchanged inputs", "(res.gate, res.up,", "(res.up, res.gate,"),
    ),
    *one(
        "engine.attention_half:qkv_bwd", "backward", "model",
        ("block: dk not rotated back", 'letter != "v"', 'letter == "q"'),
        ("block: last of q, k, v only", "dx += dn", "pass"),
        ("block: first of q, k, v only", "dx += dn", "dx = dn"),
    ),
    *one(
        "engine.attention_half:attention_half_bwd", "backward", "model",
        ("rebuild: q and k without RoPE", _REBUILT,
         f"res.q, res.k, res.v = qkv(n, {_BARE}), raw=res.raw)"),
        ("rebuild: the published error, no RoPE and no bias", _REBUILT,
         f"res.q, res.k, res.v = qkv(n, {_BARE}, weights={{k: w for k, w in layer.weights.items() "
         "if not k.endswith('.bias')}), raw=res.raw)"),
        ("rebuild: from what is not normalised", _REBUILT,
         "res.q, res.k, res.v = qkv(n / layer.weight('input_layernorm')[...], layer, raw=res.raw)"),
    ),
    *one(
        "engine.half:sublayer", "forward", "model",
        ("block: attention reads what is not normalised", "y, inside = f(n,",
         "y, inside = f(n if half else x,"),
        ("block: MLP reads what is not normalised", "y, inside = f(n,",
         "y, inside = f(x if half else n,"),
    ),
]  # fmt: skip
