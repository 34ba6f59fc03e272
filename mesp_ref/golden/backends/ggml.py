"""ggml, the library of llama.cpp: its operations on a CPU, gradients by its own backward graph.

In float32. Covers linear, lora_linear, rmsnorm, causal_softmax, attention, swiglu, mlp_lora,
embedding, RoPE from positions, and cross_entropy, lm_loss and head_loss where no label is ignored:
its loss is the mean over all rows. pip install ggml-python.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ggml as g
import numpy as np
from ggml.utils import from_numpy, to_numpy

from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

Values = dict[str, Any]
BYTES = 1 << 30  # of address space: what is not written costs nothing
NEOX = 2  # first half with second half
THREADS = 1


def _linear(c: Any, v: Values, at: Values) -> Any:
    y = g.ggml_mul_mat(c, v["w"], v["x"])
    return g.ggml_add(c, y, v["b"]) if "b" in v else y


def _part(c: Any, x: Any, v: Values, s: float, letter: str = "") -> Any:
    """A layer with LoRA, with the weights of a part."""
    low = g.ggml_mul_mat(c, v[f"B{letter}"], g.ggml_mul_mat(c, v[f"A{letter}"], x))
    names = {"w": f"w{letter}", "b": f"b{letter}"}
    own = {"x": x} | {n: v[name] for n, name in names.items() if name in v}
    return g.ggml_add(c, _linear(c, own, {}), g.ggml_scale(c, low, s))


def _lora_linear(c: Any, v: Values, at: Values) -> Any:
    return _part(c, v["x"], v, at["s"])


def _mlp_lora(c: Any, v: Values, at: Values) -> Any:
    gate, up = (_part(c, v["x"], v, at["s"], letter) for letter in "gu")
    return _part(c, g.ggml_swiglu_split(c, gate, up), v, at["s"], "d")


def _rmsnorm(c: Any, v: Values, at: Values) -> Any:
    return g.ggml_mul(c, g.ggml_rms_norm(c, v["x"], at["eps"]), v["w"])


def _softmax(c: Any, scores: Any, scale: float) -> Any:
    """Over keys, where a query sees those up to its own place from the end."""
    keys, queries = scores.contents.ne[:2]
    seen = np.tril(np.ones((queries, keys), bool), keys - queries)
    mask = from_numpy(np.where(seen, 0, -np.inf).astype(np.float32), c)
    return g.ggml_soft_max_ext(c, scores, mask, scale, 0.0)


def _causal_softmax(c: Any, v: Values, at: Values) -> Any:
    return _softmax(c, v["s"], 1.0)


def _attention(c: Any, v: Values, at: Values) -> Any:
    """As llama.cpp builds it: [.., T, H, D] with heads outside, query heads sharing those of k and v."""
    q, k = (g.ggml_cont(c, g.ggml_permute(c, v[n], 0, 2, 1, 3)) for n in "qk")
    values = g.ggml_cont(c, g.ggml_permute(c, v["v"], 1, 2, 0, 3))
    p = _softmax(c, g.ggml_mul_mat(c, k, q), float(q.contents.ne[0]) ** -0.5)
    return g.ggml_cont(c, g.ggml_permute(c, g.ggml_mul_mat(c, values, p), 0, 2, 1, 3))


def _swiglu(c: Any, v: Values, at: Values) -> Any:
    return g.ggml_swiglu_split(c, v["gate"], v["up"])


def _embedding(c: Any, v: Values, at: Values) -> Any:
    return g.ggml_get_rows(c, v["w"], g.ggml_reshape_1d(c, v["ids"], g.ggml_nelements(v["ids"])))


def _cross_entropy(c: Any, v: Values, at: Values) -> Any:
    vocabulary, rows = v["logits"].contents.ne[:2]
    labels = to_numpy(v["labels"]).reshape(-1)
    wanted = np.zeros((rows, vocabulary), np.float32)
    wanted[np.arange(rows), labels] = 1
    return g.ggml_cross_entropy_loss(c, v["logits"], from_numpy(wanted, c))


def _lm_loss(c: Any, v: Values, at: Values) -> Any:
    width = v["x"].contents.ne[0]
    x = g.ggml_reshape_2d(c, v["x"], width, g.ggml_nelements(v["x"]) // width)
    return _cross_entropy(c, v | {"logits": g.ggml_mul_mat(c, v["w"], x)}, at)


def _head_loss(c: Any, v: Values, at: Values) -> Any:
    return _lm_loss(c, v | {"x": _rmsnorm(c, v, at), "w": v["head"]}, at)


def _rope(c: Any, v: Values, at: Values) -> Any:
    """Angles by ggml from positions, theta and scaling; llama3's as factors of the frequencies."""
    scaling, d = at["scaling"], v["x"].contents.ne[0]
    scale, factors, kind = 1.0, None, scaling.get("rope_type")
    if kind == "linear":
        scale = 1 / scaling["factor"]
    elif kind is not None:
        raise NotCovered
    return g.ggml_rope_ext(
        c, v["x"], v["positions"], factors, d, NEOX, 0, at["theta"], scale, 0.0, 1.0, 0.0, 0.0
    )


OPS: dict[str, Callable[[Any, Values, Values], Any]] = {
    "linear": _linear,
    "lora_linear": _lora_linear,
    "rmsnorm": _rmsnorm,
    "causal_softmax": _causal_softmax,
    "attention": _attention,
    "swiglu": _swiglu,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "lm_loss": _lm_loss,
    "mlp_lora": _mlp_lora,
    "head_loss": _head_loss,
}


def _function(case: Case, inputs: dict[str, Array]) -> Callable[[Any, Values, Values], Any]:
    if case.kind == "positions" and inputs["positions"].ndim == 1:
        return _rope
    op = case.attributes.get("op") if case.kind in ("op", "tile") else None
    if op not in OPS or (inputs.get("labels", np.zeros(1)) < 0).any():
        raise NotCovered
    return OPS[op]


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One case: y, and the gradients of Σ dy ⊙ y by ggml's backward graph."""
    build = _function(case, inputs)
    if dtype != "float32":
        raise NotCovered
    if build is not _attention:
        return _run(build, case, inputs)
    batch = range(len(inputs["q"]))  # its backward takes one sequence where heads share keys
    parts = [_run(build, case, {n: a[i : i + 1] for n, a in inputs.items()}) for i in batch]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _run(
    build: Callable[[Any, Values, Values], Any], case: Case, inputs: dict[str, Array]
) -> dict[str, Array]:
    context = g.ggml_init(g.ggml_init_params(mem_size=BYTES, mem_buffer=None, no_alloc=False))
    try:
        return _graph(context, build, case, inputs)
    finally:
        g.ggml_free(context)


def _graph(
    c: Any, build: Callable[[Any, Values, Values], Any], case: Case, inputs: dict[str, Array]
) -> dict[str, Array]:
    given = {name: from_numpy(np.ascontiguousarray(a), c) for name, a in inputs.items()}
    names = [t.name[1:] for t in case.tensors if t.name[1:] in inputs]
    for name in names:
        g.ggml_set_param(given[name])
    y = build(c, given, dict(case.attributes))
    dy = g.ggml_reshape(c, given["dy"], y)
    loss = g.ggml_sum(c, g.ggml_mul(c, y, dy))
    g.ggml_set_loss(loss)
    graph = g.ggml_new_graph_custom(c, g.GGML_DEFAULT_GRAPH_SIZE, True)
    g.ggml_build_forward_expand(graph, loss)
    g.ggml_build_backward_expand(c, graph, None)
    g.ggml_graph_reset(graph)
    g.ggml_graph_compute_with_ctx(c, graph, THREADS)
    found = {"y": y} | {f"d{n}": g.ggml_graph_get_grad(graph, given[n]) for n in names}
    shapes = {"y": inputs["dy"].shape} | {f"d{n}": inputs[n].shape for n in names}
    return {n: to_numpy(a).reshape(shapes[n]).copy() for n, a in found.items()}
