"""What Llama, Qwen3 and Gemma 3 have otherwise, gone wrong."""

from mesp_ref.verify.bugs.bug import one

BUGS = [
    *one(
        "engine.attention_half:qkv_bwd", "backward", "qwen3/mesp",
        ("families: norm of q and k skipped in the backward", "dy, found = norm_bwd(",
         "_, found = norm_bwd("),
    ),
    *one(
        "engine.attention_half:qkv", "forward", "qwen3 gemma3",
        ("families: q and k not normalised", 'y = norm(f"self_attn.{letter}_norm", y, layer)', "pass"),
        ("families: q and k normalised after RoPE", "raw[letter] = y",
         "raw[letter] = y = ops.rope(y, layer.cos, layer.sin)[0]"),
    ),
    *one(
        "engine.attention_half:attention_half_bwd", "method", "qwen3/mesp",
        ("families: rebuilt q and k normalised twice", "qkv(n, layer, raw=res.raw)",
         "qkv(n, layer, raw=res.raw); res.raw = {'q': res.q, 'k': res.k}"),
    ),
    *one(
        "engine.positions:first_keys", "forward", "gemma3",
        ("families: window one key too wide", "config.sliding_window + 1", "config.sliding_window"),
        ("families: window one key too narrow", "config.sliding_window + 1",
         "config.sliding_window + 2"),
        ("families: no window", "kind == SLIDING and", "False and"),
    ),
    *one(
        "engine.config:Qwen2Config.angles", "forward", "gemma3",
        ("families: local layers turned as the others", "kind == SLIDING", "False"),
    ),
    *one(
        "engine.config:Qwen2Config.angles", "forward", "smollm3",
        ("families: layers without RoPE turned", "kind == NO_ROPE", "False"),
    ),
    *one(
        "engine.half:norm", "forward", "gemma3",
        ("families: 1 + w forgotten", "layer.weight(part)",
         "layer.weight(part)[...] - layer.config.traits.gain"),
    ),
    *one(
        "ops.rope:rope_tables", "forward", "llama",
        ("families: RoPE scaling twice", "frequency / factor", "frequency / factor**2"),
        ("families: no RoPE scaling", "scaling is not None", "False"),
        ("families: low and high frequencies exchanged", "kept * frequency + (1 - kept)",
         "(1 - kept) * frequency + kept"),
    ),
    *one(
        "engine.attention_half:attention_half", "forward", "gemma3",
        ("families: attention scaled twice", "scale=layer.config.attention_scale",
         "scale=layer.config.attention_scale * layer.config.head_dim**-0.5"),
    ),
    *one(
        "engine.attention_half:attention_half_bwd", "backward", "gemma3/mesp",
        ("families: ds by the usual scale", "scale=layer.config.attention_scale", "scale=None"),
    ),
    *one(
        "engine.model:embed", "forward", "gemma3",
        ("families: √C lost", "x *= model.config.hidden_size**0.5", "pass"),
    ),
    *one(
        "engine.methods:embed_bwd", "backward", "gemma3/mesp",
        ("families: √C lost in the backward", "dx = dx * step.model.config.hidden_size**0.5", "pass"),
    ),
    *one(
        "engine.half:sublayer_bwd", "backward", "gemma3/mesp",
        ("families: norm after a half skipped in the backward", "df, last = norm_bwd(after",
         "_, last = norm_bwd(after"),
    ),
    *one(
        "engine.half:sublayer", "forward", "gemma3",
        ("families: norm after a half after the sum", "y = norm(after, y, layer)",
         "return norm(after, x + y, layer), res"),
    ),
    *one(
        "ops.geglu:geglu", "forward", "geglu",
        ("geglu: cube left out", "CUBE * np.minimum(gate * gate, FAR) + 1", "1"),
        ("geglu: sigmoid for tanh", "* gate * TWICE", "* gate * TWICE / 2"),
    ),
    *one(
        "ops.geglu:geglu_bwd", "backward", "geglu gemma3/mesp",
        ("geglu: cube's slope left out", "(3 * cubic + 1)", "(cubic + 1)"),
        ("geglu: slope of σ left out", "dgate *= gelu *", "dgate *= 0 * gelu *"),
        ("geglu: σ left out", "dgate += sig", "pass"),
    ),
    *one(
        "lean._mlp_tiles:_slope", "backward", "tiled_gelu_mlp",
        ("tiles: gelu's 2u′ left out", "slope *= other", "pass"),
        ("tiles: silu's slope for gelu's", "if is_gelu:", "if False:"),
    ),
    *one(
        "lean.attention:_tiles", "forward", "tiled_windowed_attention",
        ("tiles: keys from the last query's window on", "first[i, a:b].min()", "first[i, a:b].max()"),
    ),
    *one(
        "lean.shards:_joined", "backward", "qwen3/two_workers",
        ("parts: norms of q and k of the first only", 'name.endswith("_norm.weight")', "False"),
    ),
    *one(
        "lean.shards:part_of", "forward", "llama/mesp",
        ("parts: bias of o_proj added by every part", "bias is not None and cut.a", "False"),
    ),
    *one(
        "lean.mesp_tiled:_set_aside", "method", "gemma3/disk",
        ("halves: what the norm after a half was given lost", "stack.keep(res.y)",
         "stack.keep(0 * res.y)"),
    ),
]  # fmt: skip
