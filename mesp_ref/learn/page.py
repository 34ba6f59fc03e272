"""The page of a block: one HTML file, to be clicked through without a server.

Memory comes from the ledger of a step over ghosts, so it is that of the engine to the byte; what a
mistake does to the gradients is computed by the exercise about a block. page.html.j2 draws it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.files.html import html_template
from mesp_ref.learn.exercises.block import BLOCK, ORDER
from mesp_ref.memory.dry_run import dry_run
from mesp_ref.memory.kinds import KINDS, by_kind
from mesp_ref.memory.ledger import Entry, Moment
from mesp_ref.memory.shapes import Shapes
from mesp_ref.memory.timeline import ADDED, COLOURS

METHODS = ("store_all", "mebp", "mesp")
TOKENS, RANK = 256, 8
# Qwen2.5-0.5B, one block of it: enough to see what each method keeps.
CONFIG = Qwen2Config(151936, 896, 4864, 1, 14, 2, 64)


class Edge(NamedTuple):
    """A tensor of the block: its name, its shape in letters, and where its line runs."""

    name: str
    shape: str
    text: str
    points: tuple[tuple[float, float], ...]


class Node(NamedTuple):
    """An operation: its name in the ledger, what stands in its box, and where."""

    op: str
    text: str
    x: float
    y: float


# Mistakes inside an operation that the page shows, beside all those of a block's wiring.
SHOWN = (
    "norm.cross_missing", "norm.cross_added", "norm.no_weight", "norm.power_2", "norm.dot_sum",
    "norm.first_undivided", "lora.no_base", "lora.no_adapter", "lora.dh_unscaled", "lora.dA_scaled_twice",
    "lora.dB_unscaled", "lora.only_last_token", "attention.no_row_sum", "attention.as_sigmoid",
    "attention.unscaled", "attention.detached", "attention.factors_exchanged", "attention.mean_of_group",
    "attention.first_of_group", "attention.summed_as_tiles", "attention.tiled_heads", "swiglu.no_second",
    "swiglu.of_sigmoid", "swiglu.no_up", "swiglu.up_sigma",
)  # fmt: skip
_FORWARD, _BACK = 70.0, 250.0  # the rows of the picture


def _row(y: float, back: bool) -> list[Node]:
    suffix = "_bwd" if back else ""
    ops = (
        (f"rmsnorm{suffix} 1", "norm", 90), (f"lora_linear{suffix} self_attn.q_proj", "q_proj", 190),
        (f"rope{suffix}", "RoPE", 290), (f"attention{suffix}", "attention", 400),
        (f"lora_linear{suffix} self_attn.o_proj", "o_proj", 510), (f"rmsnorm{suffix} 2", "norm", 640),
        (f"lora_linear{suffix} mlp.gate_proj", "gate_proj", 740), (f"swiglu{suffix}", "SwiGLU", 860),
        (f"lora_linear{suffix} mlp.down_proj", "down_proj", 970),
    )  # fmt: skip
    nodes = [Node(op, text, x, y) for op, text, x in ops]
    nodes += [
        Node(f"lora_linear{suffix} self_attn.k_proj", "k_proj", 190, y + 44),
        Node(f"lora_linear{suffix} self_attn.v_proj", "v_proj", 190, y + 88),
        Node(f"lora_linear{suffix} mlp.up_proj", "up_proj", 740, y + 44),
    ]
    return nodes


NODES = [*_row(_FORWARD, False), *_row(_BACK, True)]


def _line(*xs: float, y: float) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x in xs)


def _forward_edges(f: float) -> tuple[Edge, ...]:
    return (
        Edge("x", "[N, T, C]", "the block's input; also the way round the attention",
             ((-5, f), (30, f), (30, f - 42), (575, f - 42), (575, f - 10))),
        Edge("n1", "[N, T, C]", "the normalised input of q, k and v", _line(122, 156, y=f)),
        Edge("q", "[N, T, H·D]", "queries before RoPE", _line(224, 264, y=f)),
        Edge("k", "[N, T, G·D]", "keys before RoPE", ((224, f + 44), (244, f + 44), (268, f + 14))),
        Edge("q_rope", "[N, T, H, D]", "queries as attention reads them", _line(316, 362, y=f)),
        Edge("k_rope", "[N, T, G, D]", "keys as attention reads them", ((310, f + 15), (330, f + 24), (364, f + 12))),
        Edge("v", "[N, T, G, D]", "values", ((224, f + 88), (330, f + 88), (380, f + 16))),
        Edge("p", "[N, H, T, T]", "probabilities: the softmax of the scores", ((388, f + 16), (388, f + 44), (412, f + 44), (412, f + 16))),
        Edge("o", "[N, T, H·D]", "the attention's output", _line(440, 476, y=f)),
        Edge("a", "[N, T, C]", "x and the attention half, added; also the way round the MLP",
             ((545, f), (590, f), (590, f - 42), (1035, f - 42), (1035, f - 10))),
        Edge("n2", "[N, T, C]", "the normalised input of gate and up", _line(672, 704, y=f)),
        Edge("gate", "[N, T, F]", "what silu is applied to", _line(776, 824, y=f)),
        Edge("up", "[N, T, F]", "what silu(gate) is multiplied with", ((776, f + 44), (800, f + 44), (836, f + 14))),
        Edge("silu", "[N, T, F]", "gate ⊙ σ(gate)", ((850, f + 16), (850, f + 44), (872, f + 44), (872, f + 16))),
        Edge("z", "[N, T, F]", "silu(gate) ⊙ up, the input of down_proj", _line(894, 934, y=f)),
        Edge("h", "[N, T, R]", "x·Aᵀ of the seven LoRA layers", _line(160, 220, y=f + 112)),
        Edge("y", "[N, T, C]", "the block's output", _line(1005, 1075, y=f)),
    )  # fmt: skip


def _backward_edges(b: float) -> tuple[Edge, ...]:
    return (
        Edge("dy", "[N, T, C]", "the gradient that comes from above",
             ((1075, b), (1035, b), (1035, b + 128), (600, b + 128), (600, b + 10))),
        Edge("dz", "[N, T, F]", "gradient of z", _line(934, 894, y=b)),
        Edge("dgate", "[N, T, F]", "gradient of gate", _line(824, 776, y=b)),
        Edge("dup", "[N, T, F]", "gradient of up", ((836, b + 14), (800, b + 44), (776, b + 44))),
        Edge("dn2", "[N, T, C]", "gradient of n2: through gate and through up, added", _line(704, 672, y=b)),
        Edge("da", "[N, T, C]", "dy and what comes through the MLP, added",
             ((608, b), (575, b), (575, b + 128), (30, b + 128), (30, b + 10))),
        Edge("do", "[N, T, H, D]", "gradient of the attention's output", _line(476, 440, y=b)),
        Edge("dq_rope", "[N, T, H, D]", "gradient of the rotated queries", _line(362, 316, y=b)),
        Edge("dk_rope", "[N, T, G, D]", "gradient of the rotated keys", ((364, b + 12), (330, b + 24), (310, b + 15))),
        Edge("dv", "[N, T, G, D]", "gradient of the values", ((380, b + 16), (330, b + 88), (224, b + 88))),
        Edge("dq", "[N, T, H·D]", "rotated back", _line(264, 224, y=b)),
        Edge("dk", "[N, T, G·D]", "rotated back", ((268, b + 14), (244, b + 44), (224, b + 44))),
        Edge("dn1", "[N, T, C]", "gradient of n1: through q, k and v, added", _line(156, 122, y=b)),
        Edge("dA, dB", "[R, in], [out, R]", "the gradients of the seven LoRA layers: what the step is for", _line(160, 220, y=b + 112)),
    )  # fmt: skip


EDGES = (*_forward_edges(_FORWARD), *_backward_edges(_BACK))
_BY_TAG = {
    "embedding": "x", "lora_linear self_attn.q_proj": "q", "lora_linear self_attn.k_proj": "k",
    "lora_linear self_attn.v_proj": "v", "attention.p": "p", "attention": "o",
    "lora_linear self_attn.o_proj(x)": "o", "lora_linear mlp.gate_proj": "gate",
    "lora_linear mlp.up_proj": "up", "swiglu": "z", "swiglu.silu": "silu",
    "lora_linear_bwd mlp.down_proj": "dz", "lora_linear_bwd self_attn.o_proj(dy)": "da",
    "lora_linear_bwd self_attn.o_proj": "do", "lora_linear_bwd mlp.gate_proj": "dn2",
    "lora_linear_bwd mlp.up_proj": "dn2", "lora_linear_bwd self_attn.q_proj": "dn1",
    "lora_linear_bwd self_attn.k_proj": "dn1", "lora_linear_bwd self_attn.v_proj": "dn1",
    "lora_linear_bwd self_attn.v_proj(dy)": "dv", "rmsnorm_bwd(dy)": "dn2",
    "rope_bwd(dy)": "dq_rope", "lora_linear_bwd mlp.down_proj(dy)": "dy",
}  # fmt: skip
_BY_NEXT = {  # results of ops that a block calls twice, by the op that comes after
    ("rmsnorm", "lora_linear self_attn.q_proj"): "n1", ("rmsnorm", "lora_linear mlp.gate_proj"): "n2",
    ("rope", "lora_linear self_attn.k_proj"): "q_rope", ("rope", "lora_linear self_attn.v_proj"): "k_rope",
    ("rope_bwd", "lora_linear_bwd self_attn.q_proj"): "dq",
    ("rope_bwd", "lora_linear_bwd self_attn.k_proj"): "dk",
}  # fmt: skip


def edge_of(entry: Entry, first: int, moments: list[Moment], nth: int) -> str:
    """The edge that a buffer is; "" for what is no part of a block's picture.

    first   the moment at which it was first seen alive
    nth     how many buffers of its tag the same op made before it
    """
    op, after = moments[first].op, moments[min(first + 1, len(moments) - 1)].op
    if entry.tag.endswith(".h"):
        return "h"
    if entry.tag.startswith("lora_linear_bwd ") and len(entry.shape) == 2 and RANK in entry.shape:
        return "dA, dB"
    if entry.tag == "rmsnorm(x)":
        return (
            "a"
            if after.startswith("lora_linear mlp.gate_proj")
            else "y"
            if after == "lm_loss"
            else ""
        )
    if entry.tag == "swiglu_bwd":
        return ("dgate", "dup")[nth]
    if entry.tag == "attention_bwd":
        return ("dq_rope", "dk_rope", "dv")[nth]
    if entry.tag == "rmsnorm_bwd":
        return "dy" if moments[first - 1].op == "rmsnorm_bwd" and moments[first - 2].op == "lm_loss_bwd" else ""  # fmt: skip
    return _BY_NEXT.get((entry.tag, op)) or _BY_TAG.get(entry.tag, "")


def node_of(ops: list[str], number: int) -> str:
    """The box of the picture in which an op of the step runs; "" for embedding, final norm and head."""
    op, after = ops[number], ops[min(number + 1, len(ops) - 1)]
    if op == "rmsnorm":
        return {"self_attn.q_proj": "rmsnorm 1", "mlp.gate_proj": "rmsnorm 2"}.get(
            after.partition(" ")[2], ""
        )
    if op == "rmsnorm_bwd":
        last = number == len(ops) - 1
        return "rmsnorm_bwd 1" if last else "rmsnorm_bwd 2" if "o_proj" in after else ""
    return op if any(node.op == op for node in NODES) else ""


def lifetimes(moments: list[Moment]) -> Iterator[tuple[str, int, int, int]]:
    """Edge, first and last moment alive, and bytes of every buffer of the block."""
    spans: dict[int, list[Any]] = {}
    for number, moment in enumerate(moments):
        for entry in moment.live:  # one buffer is one object in every moment
            spans.setdefault(id(entry), [entry, number, number])[2] = number
    made: dict[tuple[str, int], int] = {}
    for entry, first, last in spans.values():
        nth = made[entry.tag, first] = made.get((entry.tag, first), -1) + 1
        if name := edge_of(entry, first, moments, nth):
            yield name, first, last, entry.nbytes


def memory(method: str) -> dict[str, Any]:
    """A step of a method: its ops, what lives in each by kind, and the lifetimes of the edges."""
    moments = dry_run(method, Shapes(CONFIG, tokens=TOKENS, rank=RANK)).ledger.moments
    parts = [by_kind(moment, RANK) for moment in moments]
    kinds = {name: [part[name] for part in parts] for name in KINDS}
    kinds[ADDED] = [moment.added for moment in moments]
    spans: dict[str, list[list[int]]] = {}
    for name, first, last, size in lifetimes(moments):
        spans.setdefault(name, []).append([first, last, size])
    return {
        "ops": (ops := [moment.op for moment in moments]),
        "nodes": [node_of(ops, number) for number in range(len(ops))],
        "kinds": {name: values for name, values in kinds.items() if any(values)},
        "total": [moment.held + moment.added for moment in moments],
        "spans": spans,
    }


def mistakes() -> list[dict[str, Any]]:
    """What each mistake in a block does to its gradients: the cosine of every one with the right one."""
    case = BLOCK.cases[1]
    given, truth = BLOCK.pool(case), BLOCK.truth(case)
    rows = []
    for key in (*SHOWN, *(k for k in BLOCK.mistakes if "." not in k and k != "heads_exchanged")):
        found = BLOCK.predict(given, (key,))
        cosines = {n: cosine(np.asarray(found[n]), truth[n]) for n in truth}
        if any(value != 1 for value in cosines.values()):
            rows.append({"key": key, "text": BLOCK.mistakes[key], "cosines": cosines})
    return rows


def cosine(a: Any, b: Any) -> float | None:
    """cos of two tensors, 1 exactly where they agree; None where one is 0."""
    if np.abs(a - b).max() <= 1e-9 * np.abs(b).max():
        return 1.0
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    found = round(float((a * b).sum()) / size, 4) if size else None
    return 0.9999 if found == 1 and not np.allclose(a, b, rtol=1e-9) else found


def data() -> dict[str, Any]:
    """All that the page shows."""
    return {
        "methods": {method: memory(method) for method in METHODS},
        "order": METHODS,
        "kinds": list(COLOURS),
        "colours": COLOURS,
        "edges": {e.name: {"shape": e.shape, "text": e.text} for e in EDGES},
        "mistakes": mistakes(),
        "outputs": [*(f"d{m} of {short}" for short in ORDER for m in "AB"), "dx"],
    }


def page() -> str:
    """The page as one string of HTML."""
    return html_template("mesp_ref.learn", "page.html.j2").render(
        data=data(), nodes=NODES, edges=EDGES, tokens=TOKENS, rank=RANK,
        path=lambda points: "M" + "L".join(f"{x:g},{y:g}" for x, y in points),
    )  # fmt: skip
