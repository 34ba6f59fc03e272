"""Peak memory of a step from its shapes alone: which op peaks, what lives then, what it adds.

The step is one forward and backward of LoRA over a base whose weights are mapped in the compute
dtype; gradients are handed over block by block. A method peaks in one of a few ops; each is a
`Peak` here: the arrays alive when the op is called, by name, and the op's own results and scratch.
Python objects, some 100 KB, and the buffers of BLAS are not counted, persistent parameters neither.

Letters: X = N·T·C, Q = N·T·H·D, K = N·T·G·D, M = N·T·F, P = N·H·T² elements; L blocks.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mesp_ref.config import Qwen2Config
from mesp_ref.lora import adapter_shapes, parse_targets
from mesp_ref.ops import tiled
from mesp_ref.ops.lm_loss import ROWS

Parts = dict[str, int]  # name -> bytes


class Peak(NamedTuple):
    """One op at which a step may need most."""

    op: str
    held: Parts  # alive between ops
    added: Parts  # results and scratch of the op

    @property
    def total(self) -> int:
        return sum(self.held.values()) + sum(self.added.values())

    @property
    def parts(self) -> Parts:
        return self.held | {f"{self.op}: {name}": size for name, size in self.added.items()}


class Shapes(NamedTuple):
    """All that the closed form knows of a step. `counted` is the number of labels ≠ −100."""

    config: Qwen2Config
    batch: int = 1
    tokens: int = 256
    rank: int = 8
    targets: tuple[str, ...] = parse_targets("all")
    disk: bool = False
    itemsize: int = 4

    @property
    def counted(self) -> int:
        """Rows of the head: every position but the last of each sequence."""
        return self.batch * (self.tokens - 1)

    def of(self, *widths: int) -> int:
        """Bytes of one array [N, T, width] for each width."""
        return self.batch * self.tokens * sum(widths) * self.itemsize

    @property
    def x(self) -> int:
        return self.of(self.config.hidden_size)

    @property
    def q(self) -> int:
        return self.of(self.config.num_attention_heads * self.config.head_dim)

    @property
    def k(self) -> int:
        return self.of(self.config.num_key_value_heads * self.config.head_dim)

    @property
    def m(self) -> int:
        return self.of(self.config.intermediate_size)

    @property
    def p(self) -> int:
        return self.of(self.config.num_attention_heads * self.tokens)

    def lora(self, targets: Iterable[str], matrices: str = "AB") -> int:
        """Bytes of the LoRA gradients of one block's targets."""
        chosen = [name for name in self.targets if name in set(targets)]
        shapes = adapter_shapes(self.config, self.rank, chosen)
        found = [
            math.prod(shape)
            for name, shape in shapes.items()
            if ".layers.0." in name and name.split(".lora_")[1][0] in matrices
        ]
        return sum(found) * self.itemsize

    def h(self, targets: Iterable[str]) -> int:
        """Bytes of h = x·Aᵀ of one block's targets."""
        return self.of(*(self.rank for name in self.targets if name in set(targets)))

    def always(self) -> Parts:
        """Cosines and sines."""
        return {"RoPE angles": self.tokens * self.config.head_dim * self.itemsize}

    def checkpoints(self) -> Parts:
        """Inputs of the blocks; on disk they are no memory of the process."""
        return {"checkpoints": 0 if self.disk else self.config.num_hidden_layers * self.x}


_MLP = ("gate_proj", "up_proj", "down_proj")
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", *_MLP)


def _residuals(s: Shapes, blocks: int) -> Parts:
    """All that `blocks` blocks leave for their backward, beside their inputs."""
    sizes = {
        "norms": 2 * s.x,
        "q, k, v": s.q + 2 * s.k,
        "probabilities": s.p,
        "attention output": s.q,
        "sum after attention": s.x,
        "gate, up": 2 * s.m,
        "silu, z": 2 * s.m,
        "h": s.h(_ALL),
    }
    return {name: blocks * size for name, size in sizes.items()}


def _plain_head(s: Shapes, kept: Parts, gradient: bool = True) -> Peak:
    """lm_loss in chunks of 64 rows."""
    rows = min(ROWS, s.counted) * s.itemsize
    held = s.always() | kept | {"labels": s.batch * s.tokens * 8, "head input": s.x}
    added = {"logits of 64 rows": rows * s.config.vocab_size, "rows": rows * s.config.hidden_size}
    if gradient:
        held["last block's output"] = s.x
        added["dx"] = s.x
    return Peak("lm_loss", held, added)


def _swiglu_bwd(s: Shapes, kept: Parts, scratch: int) -> Peak:
    """The gate's backward in the last block, whose down_proj is done."""
    held = s.always() | kept
    held |= {"dy": s.x, "dz": s.m, "LoRA gradients": s.lora(["down_proj"]), "loss": s.itemsize}
    return Peak("swiglu_bwd", held, {"dgate, dup and scratch": scratch * s.m})


def _plain_attention_bwd(s: Shapes, kept: Parts) -> Peak:
    """Attention's backward in the last block; the gradient of the MLP's norm is still there."""
    held = s.always() | kept | {"dy, da, dn": 3 * s.x, "do": s.q, "loss": s.itemsize}
    held["LoRA gradients"] = s.lora([*_MLP, "o_proj"])
    added = {"dp, ds": 2 * s.p, "dq, stacked q and do": 3 * s.q, "dk, dv": 2 * s.k}
    return Peak("attention_bwd", held, added)


def store_all(s: Shapes) -> list[Peak]:
    """Residuals of all blocks; those of the last block die one by one."""
    blocks = s.config.num_hidden_layers
    kept, below = ({"block inputs": blocks * s.x} | _residuals(s, n) for n in (blocks, blocks - 1))
    at_gate = {"silu, z": s.m, "h": s.h(["down_proj"])}
    at_attention = {
        "norms": s.x,
        "q, k, v": s.q + 2 * s.k,
        "probabilities": s.p,
        "h": s.h(["q_proj", "k_proj", "v_proj"]),
    }
    return [
        _plain_head(s, kept),
        _swiglu_bwd(s, {name: kept[name] - at_gate.get(name, 0) for name in kept}, 4),
        _plain_attention_bwd(s, {name: below[name] + at_attention.get(name, 0) for name in below}),
    ]


def mebp(s: Shapes) -> list[Peak]:
    """Block inputs, and all residuals of one block until its backward ends."""
    kept = s.checkpoints() | _residuals(s, 1)
    head = _plain_head(s, s.checkpoints())
    return [head, _swiglu_bwd(s, kept, 4), _plain_attention_bwd(s, kept)]


def mesp(s: Shapes) -> list[Peak]:
    """Block inputs, and eight intermediates of one block, each until its last use."""
    all_of_it = _residuals(s, 1)
    eight = {n: v for n, v in all_of_it.items() if n not in ("q, k, v", "silu, z", "h")}
    rebuilt = {"norm": s.x, "q, k, v": s.q + 2 * s.k, "probabilities": s.p}
    return [
        _plain_head(s, s.checkpoints()),
        _swiglu_bwd(s, s.checkpoints() | eight, 5),
        _plain_attention_bwd(s, s.checkpoints() | rebuilt),
    ]


def mesp_tiled(s: Shapes) -> list[Peak]:
    """Block inputs, and what one tiled op of half a block needs."""
    return [_tiled_head(s), _mlp_bwd(s), _attention_bwd(s)]


def _tiled_head(s: Shapes) -> Peak:
    held = {"labels": s.batch * s.tokens * 8, "head input": s.x, "last block's output": s.x}
    tile = tiled.widest(s.config.vocab_size, tiled.vocabulary_tile(s.counted))
    rows = s.counted * s.itemsize
    added = {
        "logits of a tile": rows * tile,
        "rows, their mix and a product": 3 * rows * s.config.hidden_size,
        "dx": s.x,
    }
    return Peak("lm_loss", s.always() | s.checkpoints() | held, added)


def _mlp_bwd(s: Shapes) -> Peak:
    c, rows = s.config.hidden_size, s.batch * s.tokens
    width = tiled.widest(s.config.intermediate_size, tiled.mlp_width(rows))
    held = {"dy": s.x, "norm": s.x}
    held["sum after attention"] = 0 if s.disk else s.x
    added = {
        "tiles": s.of(5 * width, max(c, width)),
        "dx": s.x,
        "LoRA gradients": s.lora(["gate_proj", "up_proj"], "B") + s.lora(["down_proj"], "A"),
        "h and dh": 2 * s.h(_MLP),
        "a tile's dB": 2 * width * s.rank * s.itemsize,
    }
    return Peak("mlp_bwd", s.always() | s.checkpoints() | held, added)


def _attention_bwd(s: Shapes) -> Peak:
    config = s.config
    share, d = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    tile = share * tiled.widest(s.tokens, tiled.query_tile(share, s.tokens)) * s.itemsize
    held = {
        "dy": s.x,
        "norm": s.x,
        "q, k, v": s.q + 2 * s.k,
        "attention output and its gradient": 2 * s.q,
        "log-sum-exp": s.of(config.num_attention_heads),
        "LoRA gradients": s.lora([*_MLP, "o_proj"]),
    }
    added = {
        "dq, dk, dv": s.q + 2 * s.k,
        "tiles": tile * (2 * s.tokens + 3 * d),
        "a product": s.tokens * d * s.itemsize,
    }
    return Peak("attention_bwd", s.always() | s.checkpoints() | held, added)


def mezo(s: Shapes) -> list[Peak]:
    """Nothing but the forward, with angles of its own beside those of the step."""
    angles = {"RoPE angles of the forward": sum(s.always().values())}
    held = s.always() | angles | {"block input": s.x}
    projected = {"norm": s.x, "q, k, v": s.q + 2 * s.k}
    return [
        _plain_head(s, {}, gradient=False),
        Peak("attention", held | projected, {"scores, probabilities": 2 * s.p, "output": s.q}),
        Peak(
            "swiglu",
            held | {"sum after attention": s.x, "gate, up": 2 * s.m},
            {"z and scratch": 2 * s.m},
        ),
    ]


PEAKS: dict[str, Callable[[Shapes], list[Peak]]] = {
    method.__name__: method for method in (store_all, mebp, mesp, mesp_tiled, mezo)
}


def peak(method: str, shapes: Shapes) -> Peak:
    """The op at which a method needs most."""
    return max(PEAKS[method](shapes), key=lambda found: found.total)
