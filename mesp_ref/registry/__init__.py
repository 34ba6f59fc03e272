"""One row per operation: what every check, vector, mutant and table iterates over.

A file holds all that the world needs of an op: what is drawn, its equation, how large its terms are,
its golden cases, the op in other frameworks, and the row that joins them. Adding an op is one file
in `ops`, one file here, and its row in the list below; `register` adds one from outside.

A tiled op is a row beside the plain one: the same mathematics, another order of summation.
"""

from mesp_ref.errors import MespRefError
from mesp_ref.registry import (
    attention,
    causal_softmax,
    cross_entropy,
    embedding,
    geglu,
    linear,
    lm_loss,
    lora_linear,
    mlp,
    rmsnorm,
    rope,
    streamed_attention,
    swiglu,
)
from mesp_ref.registry.cases import OpCase
from mesp_ref.registry.check import check
from mesp_ref.registry.row import Golden, OpSpec, again
from mesp_ref.registry.sizes import Args, Sizes

OPS: dict[str, OpSpec] = {}


def register(row: OpSpec) -> None:
    """Add a row, from where every check, vector and mutant finds it.

    Raises MespRefError for a row that is not whole, naming the field, and for a name that is taken.
    """
    if row.name in OPS:
        raise MespRefError(f"registry row {row.name!r}: name: found twice, expected a new one")
    check(row)
    OPS[row.name] = row


for _row in (
    linear.ROW,
    lora_linear.ROW,
    rmsnorm.ROW,
    rope.ROW,
    causal_softmax.ROW,
    attention.ROW,
    swiglu.ROW,
    geglu.ROW,
    embedding.ROW,
    cross_entropy.ROW,
    lm_loss.ROW,
    lora_linear.TILED,
    attention.TILED,
    attention.PACKED,
    attention.TILED_PACKED,
    attention.WINDOWED,
    attention.TILED_WINDOWED,
    lm_loss.TILED,
    mlp.TILED,
    mlp.TILED_GELU,
    streamed_attention.ROW,
    streamed_attention.PACKED,
    streamed_attention.WINDOWED,
    streamed_attention.CHUNKS,
    streamed_attention.PACKED_CHUNKS,
):
    register(_row)

__all__ = ["OPS", "Args", "Golden", "OpCase", "OpSpec", "Sizes", "again", "register"]
