"""The same step in less memory, or on more cores: all of it around the engine, none of it inside.

Two ops exist once more in tiles: same equations, same gradients up to the order of summation. They
fill a few scratch arrays, made once per call, again for every tile.
"""

from mesp_ref.lean._mlp_tiles import Keep
from mesp_ref.lean.attention import AttentionRes, attention, attention_bwd
from mesp_ref.lean.mlp import MlpRes, mlp, mlp_bwd, mlp_bwd_params
from mesp_ref.lean.streamed_attention import StreamedRes, streamed_attention, streamed_attention_bwd
from mesp_ref.lean.widths import mlp_width, query_tile
from mesp_ref.ops._tiles import tiles, vocabulary_tile, widest
