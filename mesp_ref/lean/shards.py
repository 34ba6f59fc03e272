"""A block shared by workers: each has some of its heads, then some of its MLP's columns or rows.

    o_proj(attention(n)) = Σ_parts o_proj[:, part]·attention(n; heads of the part)
    mlp(n)               = Σ_parts down_proj[:, part]·z(n; columns of the part)

A part is a narrower block: the rows of q, k, v, gate and up that make its heads and columns, and
the columns of o and down that read them. LoRA cuts alike, B with the rows of W and A with its
columns, so neither ops nor halves know. Gradients of what was cut stand side by side; those of what
all parts share add, in the order of the parts.

Source    Shoeybi et al. 2019, arXiv 1909.08053, for the same cut over devices
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import ops
from mesp_ref.engine.adapter import Adapter, tensor_name
from mesp_ref.engine.block import MLP_NORM, Halves
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.half import Backward, Forward, Gradients
from mesp_ref.engine.layer import Layer
from mesp_ref.lean.workers import Workers
from mesp_ref.ops import NOTHING, Array, Table
from mesp_ref.ops._tiles import vocabulary_tile
from mesp_ref.ops._vocabulary_tiles import Pass, one_pass
from mesp_ref.ops.lm_loss import loss_of

_ROWS = 256  # of the MLP for a worker, from which on products are as fast as with all rows
_GROUP = 128  # columns of a packed weight decode together, at most so many
READERS = ("o_proj", "down_proj")  # cut by columns; the other five by rows


class Cut(NamedTuple):
    """Rows or columns a … b−1 of a weight."""

    axis: int  # 0 rows (output features), 1 columns (input features)
    a: int
    b: int

    def of(self, array: Array, axis: int) -> Array:
        """A view of an array cut along `axis`."""
        return array[(slice(None),) * axis + (slice(self.a, self.b),)]


Cuts = dict[str, Cut]  # by projection: "self_attn.q_proj"
CutsOf = Callable[[Qwen2Config, int], list[Cuts]]
Half = tuple[Array, Gradients]  # a gradient, and those of parameters by tensor name


class Window:
    """A cut of a weight as a weight: it answers the indices of a `Table` with a part of the other."""

    def __init__(self, table: Table, cut: Cut):
        self.table, self._cut, self.dtype = table, cut, table.dtype
        length = {cut.axis: cut.b - cut.a}
        self.shape = tuple(length.get(axis, n) for axis, n in enumerate(table.shape))

    def __getitem__(self, index: Any) -> Array:
        given = index if isinstance(index, tuple) else (slice(None) if index is ... else index,)
        at = [*given, *[slice(None)] * (len(self.shape) - len(given))]
        start, stop, _ = at[self._cut.axis].indices(self.shape[self._cut.axis])
        at[self._cut.axis] = slice(self._cut.a + start, self._cut.a + stop)
        return self.table[tuple(at)]


def ranges(length: int, parts: int, unit: int = 1) -> list[tuple[int, int]]:
    """`parts` ranges (a, b) of whole units, as even as they can be."""
    edges = [round(length / unit * i / parts) * unit for i in range(parts)]
    return list(zip(edges, [*edges[1:], length], strict=True))


def attention_cuts(config: Qwen2Config, parts: int) -> list[Cuts]:
    """Whole key/value heads with their queries: at most num_key_value_heads parts."""
    groups, d = config.num_key_value_heads, config.head_dim
    share = config.num_attention_heads // groups * d
    return [
        {
            "self_attn.q_proj": Cut(0, a * share, b * share),
            "self_attn.k_proj": Cut(0, a * d, b * d),
            "self_attn.v_proj": Cut(0, a * d, b * d),
            "self_attn.o_proj": Cut(1, a * share, b * share),
        }
        for a, b in ranges(groups, min(parts, groups))
    ]


def mlp_cuts(config: Qwen2Config, parts: int) -> list[Cuts]:
    """Columns of the MLP, by whole groups of packed weights where there are enough."""
    width = config.intermediate_size
    unit = _GROUP if width >= parts * _GROUP else 1
    return [
        {
            "mlp.gate_proj": Cut(0, a, b),
            "mlp.up_proj": Cut(0, a, b),
            "mlp.down_proj": Cut(1, a, b),
        }
        for a, b in ranges(width, min(parts, width), unit)
    ]


def share_rows(rows: int, workers: int) -> bool:
    """Whether workers share the rows of an MLP's input: they need enough, but no second sum."""
    return workers == 1 or rows >= workers * _ROWS


def part_of(layer: Layer, cuts: Cuts) -> Layer:
    """The layer with the part of its weights and LoRA matrices that the cuts leave."""
    weights: dict[str, Table] = dict(layer.weights)
    for part, cut in cuts.items():
        name = layer.name(part)
        weights[f"{name}.weight"] = Window(layer.weight(part), cut)
        bias = layer.bias(part)
        if bias is not None and not cut.axis:
            weights[f"{name}.bias"] = Window(bias, cut)
        elif bias is not None and cut.a:  # the first part adds what is added once
            del weights[f"{name}.bias"]
    adapter = layer.adapter and part_adapter(layer.adapter, layer.name(""), cuts)
    return layer._replace(weights=weights, adapter=adapter)


def part_adapter(adapter: Adapter, prefix: str, cuts: Cuts) -> Adapter:
    """The LoRA matrices of one block's part, as views: B loses rows with W, A columns."""
    found = {}
    for part, cut in cuts.items():
        pair = adapter.pair(prefix + part)
        for matrix, array in zip("AB", pair or (), strict=False):
            is_cut = (matrix == "A") == bool(cut.axis)
            name = tensor_name(prefix + part, matrix)
            found[name] = cut.of(array, cut.axis) if is_cut else array
    return Adapter(adapter.rank, adapter.alpha, adapter.targets, adapter.use_rslora, found)


def join(grads: Sequence[Gradients]) -> Gradients:
    """Gradients of the parts as those of the block: beside each other where cut, else added."""
    return {name: _joined(name, [g[name] for g in grads if name in g]) for name in grads[0]}


def _joined(name: str, arrays: list[Array]) -> Array:
    axis = int(any(reader in name for reader in READERS))
    common = ".lora_" in name and ("lora_A" in name) != bool(axis)
    if common or name.endswith("_norm.weight"):
        return total(arrays)  # of A of what parts write, B of what they read, norms of q and k
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)


def total(arrays: Sequence[Array]) -> Array:
    """The sum, in the order given, formed in the first."""
    first, *others = arrays
    for other in others:
        first += other
    return first


class Summands(list[Array]):
    """What parts give to one sum, which adds one after the other: (x + p₀) + p₁."""

    __array_ufunc__ = None  # NumPy leaves `x + summands` to us

    def __radd__(self, x: Array) -> Array:
        first, *others = self
        y: Array = x + first
        for other in others:
            y += other
        return y


def shared(halves: Halves, workers: Workers, *, rows: bool = False) -> Halves:
    """The same halves, computed by several workers at once: each takes a part of the heads, then of
    the MLP's columns; or with `rows` of its rows, where there are enough.

    Alone     of several workers none can extend a cache of keys, nor show a tensor to a tap
    """
    if workers.size == 1:
        return halves
    forward, backward = partial(_by_cuts, workers), partial(_by_cuts_bwd, workers)
    mlp = partial(forward, mlp_cuts, halves.mlp, gather=Summands if rows else total)
    mlp_bwd = partial(backward, mlp_cuts, halves.mlp_bwd)
    return Halves(
        partial(forward, attention_cuts, halves.attention),
        partial(backward, attention_cuts, halves.attention_bwd),
        partial(_by_rows, workers, halves.mlp, mlp) if rows else mlp,
        partial(_by_rows_bwd, workers, halves.mlp_bwd, mlp_bwd) if rows else mlp_bwd,
    )


def _parts(workers: Workers, cuts_of: CutsOf, layer: Layer) -> list[Layer]:
    found = [part_of(layer, cuts) for cuts in cuts_of(layer.config, workers.size)]
    past: Any = layer.past  # of a chunk: each part has keys and values of its own
    return found if past is None else [p._replace(past=past.part(i)) for i, p in enumerate(found)]


def _by_cuts(
    workers: Workers, cuts_of: CutsOf, f: Forward, n: Array, layer: Layer,
    *, drop: frozenset[str] = NOTHING, gather: Callable[[list[Array]], Any] = total,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """f of every part of the layer: the sum of what they give, and their residuals."""
    found = workers.each(lambda part: f(n, part, drop=drop), _parts(workers, cuts_of, layer))
    if gather is Summands and layer.config.traits.norms[MLP_NORM][1]:
        gather = total  # which a norm follows
    return gather([y for y, _ in found]), [res for _, res in found]


def _by_cuts_bwd(
    workers: Workers, cuts_of: CutsOf, f_bwd: Backward, dy: Array, n: Array, res: list[Any],
    layer: Layer, *, params: bool = False,
) -> Half:  # fmt: skip
    """The sum of the parts' gradients of n, which all read, and their parameters' joined."""
    parts = _parts(workers, cuts_of, layer)
    shares = list(zip(parts, res, strict=True))
    found = workers.each(lambda share: f_bwd(dy, n, share[1], share[0], params=params), shares)
    return total([dn for dn, _ in found]), join([grads for _, grads in found])


def _by_rows(
    workers: Workers, f: Forward, otherwise: Forward, n: Array, layer: Layer,
    *, drop: frozenset[str] = NOTHING,
) -> tuple[Array, list[Any]]:  # fmt: skip
    """f of every part of the rows of n: what they give one below the other, and their residuals."""
    x = ops.rows(n)
    if not share_rows(len(x), workers.size):
        return otherwise(n, layer, drop=drop)
    found = workers.each(
        lambda at: f(x[at[0] : at[1]], layer, drop=drop), ranges(len(x), workers.size)
    )
    return np.concatenate([y for y, _ in found]).reshape(n.shape), [res for _, res in found]


def _by_rows_bwd(
    workers: Workers, f_bwd: Backward, otherwise: Backward, dy: Array, n: Array,
    res: list[Any], layer: Layer, *, params: bool = False,
) -> Half:  # fmt: skip
    """The parts' gradients of n one below the other, and the sum of their parameters'."""
    x, dy2 = ops.rows(n), ops.rows(dy)
    if not share_rows(len(x), workers.size):
        return otherwise(dy, n, res, layer, params=params)
    cuts = [slice(a, b) for a, b in ranges(len(x), workers.size)]
    found = workers.each(
        lambda share: f_bwd(dy2[share[0]], x[share[0]], share[1], layer, params=params),
        list(zip(cuts, res, strict=True)),
    )
    dn, grads = [dn for dn, _ in found], [grads for _, grads in found]
    return np.concatenate(dn).reshape(n.shape), {k: total([g[k] for g in grads]) for k in grads[0]}


def joined(passes: Sequence[Pass]) -> Pass:
    """One pass from several over other rows of W each, rescaled as tiles are; formed in the first."""
    top, total, z_label, mix = passes[0]
    for other in passes[1:]:
        before, top = top, np.maximum(top, other.top)
        ours, theirs = np.exp(before - top), np.exp(other.top - top)
        total *= ours
        total += theirs * other.total
        z_label += other.z_label
        if mix.size:
            mix *= ours[:, None]
            mix += np.multiply(other.mix, theirs[:, None], out=other.mix)
    return Pass(top, total, z_label, mix)


def shared_lm_loss(
    workers: Workers, x: Array, w: Table, labels: Array, *, drop: frozenset[str] = NOTHING
) -> tuple[Array, ops.LmLossRes]:
    """lm_loss, of which workers take a part of the counted rows each, or of the vocabulary.

    Shapes    those of lm_loss: x [N, T, C], labels [N, T] -> loss []
    """
    flat, dtype = labels.reshape(-1), np.result_type(x, w.dtype)
    counted = np.flatnonzero(flat != ops.IGNORED)
    if share_rows(len(counted), workers.size):
        return _loss_by_rows(workers, x, w, labels, counted, drop)
    x_counted, parts = ops.rows(x)[counted], min(workers.size, w.shape[0])
    chosen = None if "dx" in drop else np.zeros(x_counted.shape, dtype, like=x)  # W[label]
    width = vocabulary_tile(len(counted), workers.size)
    walk = partial(one_pass, x_counted, w, flat[counted], chosen, width)
    found = joined(workers.each(walk, ranges(w.shape[0], parts)))
    del walk, x_counted
    return loss_of(found, chosen, x, labels)


def _loss_by_rows(
    workers: Workers, x: Array, w: Table, labels: Array, counted: Array, drop: frozenset[str]
) -> tuple[Array, ops.LmLossRes]:
    """loss = Σ_parts loss_part·count_part/count, and ∂loss/∂x alike."""
    x2, flat, cuts = ops.rows(x), labels.reshape(-1), ranges(len(counted), workers.size)
    edges = [0, *(int(counted[a]) for a, _ in cuts[1:]), len(flat)]
    shares = [slice(a, b) for a, b in pairwise(edges)]
    found = workers.each(lambda at: ops.lm_loss(x2[at], w, flat[at], drop=drop), shares)
    dtype = found[0][0].dtype
    loss, dx = np.zeros((), dtype), None if "dx" in drop else np.empty(x.shape, dtype, like=x)
    for (part, res), (a, b), at in zip(found, cuts, shares, strict=True):
        weight = dtype.type((b - a) / len(counted))
        loss = loss + part * weight
        if dx is not None and res.dx is not None:
            np.multiply(res.dx, weight, out=ops.rows(dx)[at])
    return loss, ops.LmLossRes(x, labels, np.concatenate([res.lse for _, res in found]), dx)
