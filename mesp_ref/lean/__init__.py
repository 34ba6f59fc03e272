"""The ops that hold the large arrays of a step, once more in tiles: same equations, less memory.

The head's lm_loss exists in tiles only and belongs to all methods. A tiled op agrees with its
plain one up to the order of summation. It fills a few scratch arrays, made once per call, again for
every tile, and takes a weight as a `Matrix`, of which it asks one tile at a time, or as a plain
array.
"""

from mesp_ref.lean._mlp_tiles import Keep
from mesp_ref.lean.attention import AttentionRes, attention, attention_bwd
from mesp_ref.lean.mlp import MlpRes, mlp, mlp_bwd, mlp_bwd_params
from mesp_ref.ops._tiles import (
    Matrix,
    mlp_width,
    query_tile,
    ranges,
    tiles,
    vocabulary_tile,
    widest,
)
