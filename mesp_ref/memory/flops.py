"""Arithmetic of a step from its shapes alone: what makes one exact method faster than another.

Counted are the products of matrices, two operations for a multiply-add. What is left out
(norms, softmax, the gate, RoPE, decoding, copies) is the same few passes over the same arrays in
every method, and on a CPU about a tenth of the time; and what workers repeat, a few of LoRA's products.

Letters: M = N·T rows; a layer of `in` inputs and `out` outputs takes 2·M·in·out forward and as
much for its dx; LoRA of rank R takes 2·M·R·(in + out) forward and twice that backward.
"""

from collections.abc import Callable

from mesp_ref import lean as tiled
from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.memory.predict import Shapes

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


def _linear(s: Shapes, *names: str) -> int:
    """Base matrices of some projections, forward or dx."""
    sizes = s.config.weight_shapes()
    shapes = [sizes[f"model.layers.0.{PROJECTIONS[name]}.weight"] for name in names]
    return sum(2 * s.rows * out * width for out, width in shapes)


def _lora(s: Shapes, *names: str, down: int = 1, up: int = 1) -> int:
    """LoRA of some projections: `down` products with A, [M, in]·[in, R], and `up` with B."""
    sizes, found = s.config.weight_shapes(), 0
    for name in s.targets:
        if name in names:
            out, width = sizes[f"model.layers.0.{PROJECTIONS[name]}.weight"]
            found += 2 * s.rows * s.rank * (down * width + up * out)
    return found


def _forward(s: Shapes, *names: str) -> int:
    return _linear(s, *names) + _lora(s, *names)


def _backward(s: Shapes, *names: str, rebuild_h: bool = False) -> int:
    """dx, dA and dB; h once more where it was dropped."""
    return _linear(s, *names) + _lora(s, *names, down=2 + rebuild_h, up=2)


def _scores(s: Shapes) -> int:
    """One product of all queries with all keys."""
    return 2 * s.batch * s.config.num_attention_heads * s.config.head_dim * s.tokens**2


def _tiled_scores(s: Shapes) -> int:
    """The same up to the last key that a tile of queries sees."""
    share = s.config.num_attention_heads // s.config.num_key_value_heads
    bounds = tiled.tiles(s.tokens, tiled.query_tile(share, s.tokens))
    seen = sum((b - a) * b for a, b in bounds)
    return 2 * s.batch * s.config.num_attention_heads * s.config.head_dim * seen


def _head(s: Shapes) -> int:
    """Logits and dx of the counted rows."""
    return 4 * s.counted * s.config.hidden_size * s.config.vocab_size


def _block(s: Shapes) -> int:
    return _forward(s, *PROJECTIONS) + 2 * _scores(s)


def _block_bwd(s: Shapes, rebuild_h: bool = False) -> int:
    return _backward(s, *PROJECTIONS, rebuild_h=rebuild_h) + 4 * _scores(s)


def store_all(s: Shapes) -> int:
    """Forward and backward."""
    return s.config.num_hidden_layers * (_block(s) + _block_bwd(s)) + _head(s)


def mebp(s: Shapes) -> int:
    """Every block's forward twice."""
    return s.config.num_hidden_layers * (2 * _block(s) + _block_bwd(s)) + _head(s)


def mesp(s: Shapes) -> int:
    """Every block's forward twice; q, k, v a third time, and h."""
    blocks = 2 * _block(s) + _block_bwd(s, rebuild_h=True) + _forward(s, *_QKV)
    return s.config.num_hidden_layers * blocks + _head(s)


def mesp_tiled(s: Shapes) -> int:
    """What the backward needs twice: neither o_proj nor down_proj, and scores of visible keys.

    In RAM the input of the block's second half is computed a second time; with offload no
    projection is, but the scores.
    """
    scores = _tiled_scores(s)
    half = _forward(s, *_QKV, "o_proj") + 2 * scores
    mlp = _forward(s, *_GATE_UP, "down_proj")
    mlp_bwd = _backward(s, *_GATE_UP) + (0 if s.offload else _forward(s, *_GATE_UP))
    mlp_bwd += _backward(s, "down_proj", rebuild_h=True)
    # x·Aᵀ of gate and up, and dy·B of down, are formed by the walk over the tiles and by its user
    mlp_bwd += _lora(s, *_GATE_UP, up=0) + _lora(s, "down_proj", down=0)
    half_bwd = _backward(s, *_QKV, "o_proj", rebuild_h=True) + 5 * scores
    half_bwd += 0 if s.offload else _forward(s, *_QKV) + 2 * scores
    return s.config.num_hidden_layers * (
        half * (1 if s.disk else 2) + mlp + mlp_bwd + half_bwd
    ) + _head(s)


FLOPS: dict[str, Callable[[Shapes], int]] = {
    method.__name__: method for method in (store_all, mebp, mesp, mesp_tiled)
}
