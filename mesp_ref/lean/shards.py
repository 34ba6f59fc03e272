"""A block in parts, each with some of its heads and some of its MLP's width.

    o_proj(attention(n)) = Σ_parts o_proj[:, part]·attention(n; heads of the part)
    mlp(n)               = Σ_parts down_proj[:, part]·z(n; columns of the part)

A part is a narrower block: the rows of q, k, v, gate and up that make its heads and columns, and
the columns of o and down that read them. LoRA cuts alike, B with the rows of W and A with its
columns, so the ops need not know. Gradients of what was cut stand side by side; those of what all
parts share add, in the order of the parts.

Source    Shoeybi et al. 2019, arXiv 1909.08053, for the same cut over devices
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.engine.adapter import Adapter, tensor_name
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.weights import Weights
from mesp_ref.lean import ranges
from mesp_ref.ops import Array

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
Half = tuple[Array, dict[str, Array]]  # a gradient, and those of parameters by tensor name


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


class PartWeights:
    """The weights of one block's part: a source that shows what the cuts leave."""

    def __init__(self, weights: Weights, prefix: str, cuts: Cuts):
        self.weights, self.dtype = weights, weights.dtype
        self._cuts = {prefix + part + ".weight": cut for part, cut in cuts.items()}
        self._cuts |= {prefix + part + ".bias": cut for part, cut in cuts.items() if not cut.axis}

    def __call__(self, name: str) -> Array:
        cut = self._cuts.get(name)
        if cut is None:
            return self.weights(name)
        return (self.weights.cols if cut.axis else self.weights.rows)(name, cut.a, cut.b)

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def lazy(self, name: str) -> Any:
        return self.weights.lazy(name)

    def rows(self, name: str, a: int, b: int) -> Array:
        cut = self._cuts.get(name, Cut(0, 0, 0))
        if cut.axis:
            return cut.of(self.weights.rows(name, a, b), 1)
        return self.weights.rows(name, cut.a + a, cut.a + b)

    def cols(self, name: str, a: int, b: int) -> Array:
        cut = self._cuts.get(name, Cut(1, 0, 0))
        if not cut.axis:
            return cut.of(self.weights.cols(name, a, b), 0)
        return self.weights.cols(name, cut.a + a, cut.a + b)

    def names(self) -> Iterable[str]:
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape, cut = list(self.weights.shape(name)), self._cuts.get(name)
        if cut is not None:
            shape[cut.axis] = cut.b - cut.a
        return tuple(shape)


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


def join(grads: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Gradients of the parts as those of the block: beside each other where cut, else added."""
    if len(grads) == 1:
        return grads[0]
    return {name: _joined(name, [found[name] for found in grads]) for name in grads[0]}


def _joined(name: str, arrays: list[Array]) -> Array:
    axis = int(any(reader in name for reader in READERS))
    if ".lora_" in name and ("lora_A" in name) != bool(axis):
        return total(arrays)  # all parts share A of what they write, and B of what they read
    return np.concatenate(arrays, axis=axis)


def total(arrays: Sequence[Array]) -> Array:
    """The sum, in the order given, formed in the first."""
    first, *others = arrays
    for other in others:
        first += other
    return first


def combined(parts: Sequence[Half]) -> Half:
    """The sum of the parts' gradients of what all read, and their parameters' gradients joined."""
    return total([dx for dx, _ in parts]), join([grads for _, grads in parts])
