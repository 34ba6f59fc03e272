"""The block's backward and its rebuilding gone wrong."""

from mesp_ref.verify.bugs.bug import one

BUGS = [
    *one(
        "engine.block:block_bwd", "backward", "model",
        ("block: MLP residual path dropped", "da = dy + back_norm", "da = back_norm"),
        ("block: attention residual path dropped", "dx = da + back_norm", "dx = back_norm"),
        ("block: norm's backward skipped", "return ops.rmsnorm_bwd(dy, r, w, eps=eps)", "return dy"),
        ("block: weight of the other norm", "res.pop(part), layer.weight(part)",
         'res.pop(part), layer.weight("input_layernorm")'),
    ),
    *one(
        "engine.block:_mlp_bwd", "backward", "model",
        ("block: up dropped at the fan-out", "dn += back(", "back("),
        ("block: gate dropped at the fan-out", "dn += back(", "dn = back("),
        ("block: dup and dgate exchanged", "dgate, dup = ops", "dup, dgate = ops"),
    ),
    *one(
        "engine.block:_attention_bwd", "backward", "model",
        ("block: dk not rotated back", 'letter != "v"', 'letter == "q"'),
        ("block: last of q, k, v only", "dx += dn", "pass"),
        ("block: first of q, k, v only", "dx += dn", "dx = dn"),
    ),
    *one(
        "engine.block:_rebuild_z", "backward", "model",
        ("rebuild: z from exchanged inputs", "(r.gate, r.up,", "(r.up, r.gate,"),
    ),
    *one(
        "engine.block:_rebuild_qkv", "backward", "model",
        ("rebuild: q and k without RoPE", "n, layer, lambda",
         "n, layer._replace(cos=1 + 0 * layer.cos, sin=0 * layer.sin), lambda"),
        ("rebuild: the published error, no RoPE and no bias", "n, layer, lambda",
         "n, layer._replace(cos=1 + 0 * layer.cos, sin=0 * layer.sin, weights=type(layer.weights)("
         "{k: layer.weights(k) for k in layer.weights if not k.endswith('.bias')}, "
         "layer.weights.dtype)), lambda"),
        ("rebuild: from the block's input", 'layer.key("self_attn.q_proj")', '"input_layernorm"'),
    ),
    *one(
        "engine.block:block", "forward", "model",
        ("block: attention reads what is not normalised", "partial(_attention, n",
         "partial(_attention, x"),
        ("block: MLP reads the first norm's input", "*ops.rmsnorm(a, layer", "*ops.rmsnorm(x, layer"),
    ),
]  # fmt: skip
