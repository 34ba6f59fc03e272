"""Ops that have golden cases: those of the registry, and what kernels fuse of them.

The engine has no function of its own for a fused op: its forward and backward here are the engine's ops
one after the other, its equation and magnitudes are theirs joined. So it is no row of the registry,
which lists what the engine computes with, but it is described by the same kind of row.
"""

from mesp_ref.golden.rows import add_norm, head, masked, mlp, qkv
from mesp_ref.registry import OPS, OpSpec
from mesp_ref.registry.check import check

FUSED: dict[str, OpSpec] = {
    row.name: row for row in (masked.ROW, qkv.ROW, mlp.ROW, mlp.GELU, add_norm.ROW, head.ROW)
}
for _row in FUSED.values():
    check(_row)

ROWS: dict[str, OpSpec] = OPS | FUSED

__all__ = ["FUSED", "ROWS"]
