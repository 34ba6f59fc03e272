"""GGUF's Q4_1 and Q8_0 blocks as MLX affine groups of 32, without changing a single weight.

A block holds 32 neighbours of a row. Scales and biases become float32: there d·q is exact and d·q + m
rounded once, as ggml computes it; in float16 two thirds of the weights would change.
"""

import numpy as np

from mesp_ref.files.affine import Affine
from mesp_ref.files.quantize import pack
from mesp_ref.ops import Array

REPACKED = {"Q4_1": Affine(4, 32), "Q8_0": Affine(8, 32)}
_BYTES = {"Q4_1": 20, "Q8_0": 34}  # of a block


def repack(blocks: Array, kind: str) -> tuple[Array, Array, Array]:
    """Rows of blocks to packed integers, scales and biases.

    Q4_1      fp16 d, fp16 m, 16 bytes whose low nibbles are elements 0 … 15 and whose high ones
              are 16 … 31:  w = d·q + m, so scale = d and bias = m
    Q8_0      fp16 d, 32 signed bytes:  w = d·q = d·(q + 128) − 128·d
    Shapes    uint8 [out, blocks·bytes] -> uint32 [out, in·bits/32], float32 [out, in/32] twice
    Source    ggml, block_q4_1 and block_q8_0
    """
    blocks = blocks.reshape(len(blocks), -1, _BYTES[kind])  # [out, in/32, bytes]
    scales = _halves(blocks[..., 0:2])
    if kind == "Q4_1":
        q = np.concatenate((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), axis=-1)
        biases = _halves(blocks[..., 2:4])
    else:
        q = blocks[..., 2:] ^ 128  # two's complement plus 128
        biases = -128 * scales
    return pack(q.reshape(len(q), -1), REPACKED[kind].bits), scales, biases


def _halves(pairs: Array) -> Array:
    """Two bytes to one number: [out, in/32, 2] -> float32 [out, in/32]."""
    return np.ascontiguousarray(pairs).view("<f2")[..., 0].astype(np.float32)
