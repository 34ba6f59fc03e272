"""Seeded bugs: realistic wrong implementations, by part of the model."""

from mesp_ref.verify.bugs import (
    attention,
    block,
    families,
    lean,
    lora,
    loss,
    methods,
    mlp,
    norm,
    rope,
)
from mesp_ref.verify.bugs.bug import Bug, compiled, source

_PARTS = (norm, rope, attention, mlp, loss, lora, block, methods, lean, families)

BUGS: dict[str, Bug] = {bug.name: bug for part in _PARTS for bug in part.BUGS}

__all__ = ["BUGS", "Bug", "compiled", "source"]
