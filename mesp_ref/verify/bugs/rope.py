"""RoPE gone wrong."""

from mesp_ref.verify.bugs.bug import bug, one

BUGS = [
    *one(
        "ops.rope:rope_bwd", "backward", "rope model",
        ("rope: rotated forward in the backward", "cos, -sin", "cos, sin"),
        ("rope: backward skipped", "rope(dy, cos, -sin)[0]", "dy.copy()"),
        ("rope: cos negated too", "cos, -sin", "-cos, -sin"),
    ),
    *one(
        "ops.rope:rope", "forward", "rope model",
        ("rope: second half turned the other way", "x2 * cos + x1 * sin", "x2 * cos - x1 * sin"),
        ("rope: halves exchanged", "x[..., :half], x[..., half:]", "x[..., half:], x[..., :half]"),
    ),
    bug(
        "rope: interleaved for half-split", "forward", "rope model",
        ("ops.rope:rope", "x[..., :half], x[..., half:]", "x[..., ::2], x[..., 1::2]"),
        ("ops.rope:rope", "y[..., :half] =", "y[..., ::2] ="),
        ("ops.rope:rope", "y[..., half:] =", "y[..., 1::2] ="),
    ),
    *one(
        "ops.rope:rope_tables", "forward", "model",
        ("rope: exponent over D/2", "/ head_dim)", "/ (head_dim // 2))"),
    ),
    bug(
        "rope: keys skipped", "forward", "model",
        ("engine.attention_half:qkv", 'letter != "v"', 'letter == "q"'),
        ("engine.attention_half:qkv_bwd", 'letter != "v"', 'letter == "q"'),
    ),
    bug(
        "rope: values turned too", "forward", "model",
        ("engine.attention_half:qkv", 'letter != "v"', "letter"),
        ("engine.attention_half:qkv_bwd", 'letter != "v"', "letter"),
    ),
]  # fmt: skip
