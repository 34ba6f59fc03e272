"""Peak memory of a step from its shapes alone: which op peaks, what lives then, what it adds.

The step is one forward and backward of LoRA over a mapped base; gradients are handed over block by
block. A method peaks in one of a few ops; each is a `Peak` here: the arrays alive when the op is
called, by name, and the op's own results and scratch. A base in 16 or 4 bits is decoded: a whole
matrix before a plain op, a tile inside a tiled one.
Python objects, some 100 KB, and the buffers of BLAS are not counted, persistent parameters neither.

Letters: X = N·T·C, Q = N·T·H·D, K = N·T·G·D, M = N·T·F, P = N·H·T² elements; L blocks.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mesp_ref import lean as tiled
from mesp_ref.engine.adapter import adapter_shapes
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.init import parse_targets
from mesp_ref.lean.shards import READERS, Cuts, attention_cuts, mlp_cuts, ranges, share_rows
from mesp_ref.memory.base import Base, Store

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
    base: Base = Base()
    workers: int = 1
    offload: bool = False  # of mesp_tiled: to disk, too, what its backward would compute again

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def counted(self) -> int:
        """Rows of the head: every position but the last of each sequence."""
        return self.batch * (self.tokens - 1)

    def of(self, *widths: int) -> int:
        """Bytes of one array [N, T, width] for each width."""
        return self.rows * sum(widths) * self.itemsize

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

    def largest(self) -> int:
        """Bytes of the largest LoRA tensor."""
        shapes = adapter_shapes(self.config, self.rank, self.targets)
        return max(map(math.prod, shapes.values())) * self.itemsize

    def cuts(self, part: str) -> list[Cuts]:
        """The cuts that make a projection's parts."""
        return (mlp_cuts if part in _MLP else attention_cuts)(self.config, self.workers)

    def parts(self, part: str) -> int:
        """How many workers have a part of a projection."""
        return len(self.cuts(part))

    def shared(self, targets: Iterable[str]) -> int:
        """Bytes of the LoRA gradients that all workers but one have beside the first's, to be added.

        All read A of what they write a part of, and B of what they read a part of.
        """
        return sum(
            (self.parts(name) - 1) * self.lora([name], "B" if name in READERS else "A")
            for name in targets
        )

    def h(self, targets: Iterable[str]) -> int:
        """Bytes of h = x·Aᵀ of one block's targets; each worker has its own."""
        chosen = [name for name in self.targets if name in set(targets)]
        return self.of(*(self.rank * self.parts(name) for name in chosen))

    def matrix(self, part: str) -> tuple[int, int]:
        """[out, in] of a projection."""
        out, width = self.config.weight_shapes()[f"model.layers.0.{PROJECTIONS[part]}.weight"]
        return out, width

    def decoded(self, store: Store, *shape: int) -> int:
        """Bytes of a weight, or of a tile of it, beside its file: 0 where it is a view."""
        return store.decoded(*shape, itemsize=self.itemsize)

    def decoded_parts(self, part: str) -> int:
        """Bytes of a projection that workers decode; columns are decoded by whole groups."""
        (out, columns), store = self.matrix(part), self.base.matrices
        if part in READERS and store.affine and self.workers > 1:
            g, found = (
                store.affine.group_size,
                (cuts[PROJECTIONS[part]] for cuts in self.cuts(part)),
            )
            columns = sum(-(-cut.b // g) * g - cut.a // g * g for cut in found)
        return self.decoded(store, out, columns)

    def always(self) -> Parts:
        """Cosines and sines."""
        return {"RoPE angles": self.tokens * self.config.head_dim * self.itemsize}

    def checkpoints(self) -> Parts:
        """Inputs of the blocks; on disk they are no memory of the process."""
        return {"checkpoints": 0 if self.disk else self.config.num_hidden_layers * self.x}

    def file(self, method: str) -> int:
        """Bytes of the temporary file that a method writes in a step, and reads once."""
        if not self.disk or method in ("store_all", "mezo"):
            return 0
        blocks, lse = self.config.num_hidden_layers, self.of(self.config.num_attention_heads)
        if method != "mesp_tiled":
            return blocks * self.x
        activations = 2 * self.q + 2 * self.k + lse + 2 * self.m
        return blocks * (2 * self.x + self.offload * activations)


ESTIMATE = "estimate"  # of mezo: where no op runs
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


def _head(s: Shapes, kept: Parts, gradient: bool = True) -> Peak:
    """lm_loss, a tile of the vocabulary at a time; workers have some rows each, or some tiles."""
    c, v, workers = s.config.hidden_size, s.config.vocab_size, s.workers
    by_rows, rows = share_rows(s.counted, workers), s.counted * s.itemsize
    sums, cuts = (1, [(0, v)]) if by_rows else (workers, ranges(v, min(workers, v)))
    counted, parts = (-(-s.counted // workers), 1) if by_rows else (s.counted, workers)
    width = tiled.vocabulary_tile(counted, parts)
    tile = max(tiled.widest(b - a, width) for a, b in cuts)
    held = s.always() | kept | {"labels": s.rows * 8, "head input": s.x}
    added = {
        "logits of a tile": sums * rows * tile,
        "rows": rows * c,
        "decoded tile": workers * s.decoded(s.base.head, tile, c),
        "scratch of decoding": workers * s.base.head.scratch(tile, c, itemsize=s.itemsize),
    }
    if gradient:
        held |= {"last block's output": s.x, "decoded norm": s.decoded(s.base.vectors, c)}
        added |= {"their mix and a product": sums * 2 * rows * c, "rows of their labels": rows * c}
    return Peak("lm_loss", held, added)


def _swiglu_bwd(s: Shapes, kept: Parts) -> Peak:
    """The gate's backward in the last block, whose down_proj is done."""
    held = s.always() | kept
    held |= {"dy": s.x, "dz": s.m, "LoRA gradients": s.lora(["down_proj"])}
    held["LoRA gradients"] += s.shared(["down_proj"])
    return Peak("swiglu_bwd", held, {"dgate, dup and scratch": 3 * s.m})


def _plain_attention_bwd(s: Shapes, kept: Parts) -> Peak:
    """Attention's backward in the last block; the gradient of the MLP's norm is still there."""
    held = s.always() | kept | {"dy, da, dn": 3 * s.x, "do": s.q}
    held["LoRA gradients"] = s.lora([*_MLP, "o_proj"]) + s.shared(["o_proj"])
    added = {"dp, ds": 2 * s.p, "dq, stacked q and do": 3 * s.q, "dk, dv": 2 * s.k}
    return Peak("attention_bwd", held, added)


def _decoding(s: Shapes, op: str, part: str, held: Parts) -> list[Peak]:
    """A projection whose whole matrix is decoded first; none when it is a view of its file."""
    peak = _projection(s, op, part, held)
    return [peak] if peak.held["decoded matrix"] else []


def _projection(s: Shapes, op: str, part: str, held: Parts) -> Peak:
    """A projection: with LoRA a product as large as the result is added to it.

    In the backward the gradients of A and B are formed beside it. What workers do not have a part
    of, each of them has whole.
    """
    backward = op.endswith("bwd")
    is_cut = (part in READERS) == backward
    results = s.of(s.matrix(part)[backward] * (1 if is_cut else s.parts(part)))
    h, lora = s.h([part]), (s.lora([part]) + s.shared([part])) * backward
    name, added = f"{op} {PROJECTIONS[part]}", {"result": results}
    if part in s.targets:
        name = f"lora_{name}"
        added |= {"h and dh": 2 * h, "a product, or dA and dB": max(results, lora + h)}
    scratch = s.parts(part) * s.base.matrices.scratch(*s.matrix(part), itemsize=s.itemsize)
    added["scratch of decoding beyond these"] = max(0, scratch - sum(added.values()))
    return Peak(name, s.always() | held | {"decoded matrix": s.decoded_parts(part)}, added)


def _sums_bwd(s: Shapes, mlp: Parts, attention: Parts) -> list[Peak]:
    """Where each worker has a sum of its own, the gradient of a norm, beside another summand."""
    done = ["down_proj", "gate_proj"]
    sums, c = s.parts("up_proj") * s.x, s.lora(done) + s.shared(done)
    up = mlp | {"dy": s.x, "dup": s.m, "sum of dx": sums, "LoRA gradients": c}
    done = ["o_proj", "q_proj", "k_proj"]
    sums, c = s.parts("v_proj") * s.x, s.lora([*_MLP, *done]) + s.shared(done)
    v = attention | {"dy, da, dn": 3 * s.x, "do": s.q, "dq, dk, dv": s.q + 2 * s.k}
    widths = (cuts["self_attn.v_proj"] for cuts in s.cuts("v_proj"))
    several = [cut.b - cut.a for cut in widths if cut.b - cut.a > s.config.head_dim]
    v |= {"sum of dx": sums, "LoRA gradients": c, "dv with its heads in rows": s.of(*several)}
    v["decoded bias"] = s.decoded(s.base.vectors, s.matrix("v_proj")[0])
    peaks = _projection(s, "linear_bwd", "up_proj", up), _projection(s, "linear_bwd", "v_proj", v)
    return list(peaks)


def _down_bwd(s: Shapes, kept: Parts) -> list[Peak]:
    """down_proj's backward in the last block, where the MLP's residuals all live."""
    return _decoding(s, "linear_bwd", "down_proj", kept | {"dy": s.x})


def store_all(s: Shapes) -> list[Peak]:
    """Residuals of all blocks; those of the last block die one by one."""
    blocks = s.config.num_hidden_layers
    kept, below = ({"block inputs": blocks * s.x} | _residuals(s, n) for n in (blocks, blocks - 1))
    at_gate = {"silu, z": s.m, "h": s.h(["down_proj"])}
    at_up = {"gate, up": 2 * s.m, "silu, z": 2 * s.m, "h": s.h(["down_proj", "gate_proj"])}
    at_v = {"norms": s.x, "h": s.h(["v_proj"])}
    at_attention = {
        "norms": s.x,
        "q, k, v": s.q + 2 * s.k,
        "probabilities": s.p,
        "h": s.h(["q_proj", "k_proj", "v_proj"]),
    }
    return [
        _head(s, kept),
        _swiglu_bwd(s, {name: kept[name] - at_gate.get(name, 0) for name in kept}),
        _plain_attention_bwd(s, {name: below[name] + at_attention.get(name, 0) for name in below}),
        *_down_bwd(s, kept),
        *_sums_bwd(
            s,
            {name: kept[name] - at_up.get(name, 0) for name in kept},
            {name: below[name] + at_v.get(name, 0) for name in below},
        ),
    ]


def mebp(s: Shapes) -> list[Peak]:
    """Block inputs, and all residuals of one block until its backward ends."""
    kept = s.checkpoints() | _residuals(s, 1)
    head = _head(s, s.checkpoints())
    held = kept | {"dy": s.x, "dgate, dup": 2 * s.m}
    held["LoRA gradients"] = s.lora(["down_proj"]) + s.shared(["down_proj"])
    gate = _decoding(s, "linear_bwd", "gate_proj", held)
    held = kept | {"dy, da, dn": 3 * s.x, "do, dq twice": 3 * s.q, "dk, dv": 2 * s.k}
    held["LoRA gradients"] = s.lora([*_MLP, "o_proj"]) + s.shared(["o_proj"])
    held["decoded bias"] = s.decoded(s.base.vectors, s.matrix("q_proj")[0])
    query = _decoding(s, "linear_bwd", "q_proj", held)
    return [
        head,
        _swiglu_bwd(s, kept),
        _plain_attention_bwd(s, kept),
        *gate,
        *query,
        *_sums_bwd(s, kept, kept),
    ]


def mesp(s: Shapes) -> list[Peak]:
    """Block inputs, and eight intermediates of one block, each until its last use."""
    all_of_it = _residuals(s, 1)
    eight = {n: v for n, v in all_of_it.items() if n not in ("q, k, v", "silu, z", "h")}
    rebuilt = {"norm": s.x, "q, k, v": s.q + 2 * s.k, "probabilities": s.p}
    return [
        _head(s, s.checkpoints()),
        _swiglu_bwd(s, s.checkpoints() | eight),
        _plain_attention_bwd(s, s.checkpoints() | rebuilt),
        *_down_bwd(s, s.checkpoints() | eight | {"z, rebuilt": s.m}),
        *_sums_bwd(
            s,
            s.checkpoints() | {name: v for name, v in eight.items() if name != "gate, up"},
            s.checkpoints() | {"norm": s.x},
        ),
    ]


def mesp_tiled(s: Shapes) -> list[Peak]:
    """Block inputs, and what one tiled op of half a block needs."""
    return [
        _head(s, s.checkpoints()),
        _mlp_bwd(s),
        _attention_bwd(s),
        *_o_proj_bwd(s),
        *_q_proj_bwd(s),
        _k_proj_bwd(s),
    ]


def _mlp_bwd(s: Shapes) -> Peak:
    """Workers have some of the rows each, or some of the columns and a sum of their own."""
    c, workers, rows = s.config.hidden_size, s.workers, share_rows(s.rows, s.workers)
    cuts = mlp_cuts(s.config, 1 if rows else workers)
    columns = max(cut.b - cut.a for cut in (part["mlp.up_proj"] for part in cuts))
    width = tiled.widest(columns, tiled.mlp_width(s.rows, workers))
    sums, gradients = (1, workers) if rows else (workers, 1)
    held = {"dy": s.x, "norm": s.x}
    held["sum after attention"] = 0 if s.disk else s.x
    lora = s.lora(["gate_proj", "up_proj"], "B") + s.lora(["down_proj"], "A")
    scratch = s.base.matrices.scratch(width, c, itemsize=s.itemsize)
    added = {
        "tiles": sums * s.of(3 * width, max(c, 2 * width)),
        "dx": sums * s.x,
        "LoRA gradients": gradients * lora,
        "h and dh": sums * 2 * s.of(*(s.rank for name in s.targets if name in _MLP)),
        "decoded tiles": workers * 2 * s.decoded(s.base.matrices, width, c),
        "a tile's dB, or scratch of decoding": workers
        * max(2 * width * s.rank * s.itemsize, scratch),
    }
    return Peak("mlp_bwd", s.always() | s.checkpoints() | held, added)


def _attention_res(s: Shapes) -> Parts:
    """What tiled attention leaves for its backward."""
    if s.offload:
        return {}
    lse = s.of(s.config.num_attention_heads)
    return {"q, k, v": s.q + 2 * s.k, "attention output": s.q, "log-sum-exp": lse}


def _attention_bwd(s: Shapes) -> Peak:
    """Workers have some of the heads each."""
    config, parts = s.config, s.parts("q_proj")
    share, d = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    tile = share * tiled.widest(s.tokens, tiled.query_tile(share, s.tokens)) * s.itemsize
    held = _attention_res(s) | {
        "dy": s.x,
        "norm": s.x,
        "gradient of attention's output": s.q,
        "LoRA gradients": s.lora([*_MLP, "o_proj"]) + s.shared(["o_proj"]),
    }
    added = {
        "dq, dk, dv": s.q + 2 * s.k,
        "tiles": parts * tile * (2 * s.tokens + 3 * d),
        "a product": parts * s.tokens * d * s.itemsize,
    }
    return Peak("attention_bwd", s.always() | s.checkpoints() | held, added)


def _o_proj_bwd(s: Shapes) -> list[Peak]:
    """o_proj's backward from the tiled attention's output, everything of attention alive."""
    held = s.checkpoints() | {"dy": s.x, "norm": s.x} | _attention_res(s)
    held |= {"LoRA gradients": s.lora(_MLP)}
    return _decoding(s, "linear_bwd", "o_proj", held)


def _q_proj_bwd(s: Shapes) -> list[Peak]:
    """q_proj's backward, dk and dv waiting for theirs; workers decode their heads' rows."""
    held = s.checkpoints() | {"dy, norm": 2 * s.x, "dq, dk, dv": s.q + 2 * s.k}
    held |= {"LoRA gradients": s.lora([*_MLP, "o_proj"]) + s.shared(["o_proj"])}
    held["decoded bias"] = s.decoded(s.base.vectors, s.matrix("q_proj")[0])
    return _decoding(s, "linear_bwd", "q_proj", held)


def _k_proj_bwd(s: Shapes) -> Peak:
    """k_proj's backward beside the sum that q_proj's began; each worker has a sum of its own."""
    parts, done = s.parts("k_proj"), ["o_proj", "q_proj"]
    held = {"dy, norm": 2 * s.x, "sum of dx": parts * s.x, "dk, dv": 2 * s.k}
    held["LoRA gradients"] = s.lora([*_MLP, *done]) + s.shared(done)
    added = {"dx and a product": parts * 2 * s.x, "h and dh": 2 * s.h(["k_proj"])}
    name = "lora_linear_bwd self_attn.k_proj"
    if not s.h(["k_proj"]):
        name, added = name.removeprefix("lora_"), {"dx": parts * s.x}
    shape, store = s.matrix("k_proj"), s.base.matrices
    held["decoded bias"] = s.decoded(s.base.vectors, shape[0])
    held["decoded matrix"] = s.decoded(store, *shape)
    scratch = store.scratch(*shape, itemsize=s.itemsize)
    added["scratch of decoding beyond these"] = max(0, scratch - sum(added.values()))
    return Peak(name, s.always() | s.checkpoints() | held, added)


def mezo(s: Shapes) -> list[Peak]:
    """Nothing but the forward.

    However many the perturbations: noise is drawn again, tensor by tensor, when a block's estimate
    is formed, so the last peak, which no op has, is the LoRA gradients of one block and two tensors.
    """
    projected = {"block input": s.x, "norm": s.x, "q, k, v": s.q + 2 * s.k}
    middle = {"sum after attention": s.x, "norm": s.x}
    masks = s.parts("q_proj") * s.tokens**2  # of a byte each
    attention = {"scores, probabilities": 2 * s.p, "output, or masks": max(s.q, masks)}
    return [
        _head(s, {}, gradient=False),
        Peak("attention", s.always() | projected, attention),
        Peak("swiglu", s.always() | middle | {"gate, up": 2 * s.m}, {"z and scratch": 2 * s.m}),
        *_decoding(s, "linear", "up_proj", middle | {"gate": s.m}),
        _projection(s, "linear", "down_proj", middle | {"z": s.m}),
        Peak(ESTIMATE, s.always(), {"LoRA gradients": s.lora(_ALL), "noise": 2 * s.largest()}),
    ]


PEAKS: dict[str, Callable[[Shapes], list[Peak]]] = {
    method.__name__: method for method in (store_all, mebp, mesp, mesp_tiled, mezo)
}


def peak(method: str, shapes: Shapes) -> Peak:
    """The op at which a method needs most."""
    return max(PEAKS[method](shapes), key=lambda found: found.total)
