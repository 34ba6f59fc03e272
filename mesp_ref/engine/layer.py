"""What one block computes with, beside its input."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.ops import Array, Table

Weights: TypeAlias = Mapping[str, Table]  # tensors by their Hugging Face names
Tap: TypeAlias = Callable[[str, Array], object]


class KeyValueStore(Protocol):
    """Earlier keys and values of a sequence being generated."""

    def extend(self, k: Array, v: Array) -> tuple[Array, Array]: ...


def untapped(name: str, value: Array) -> None:
    """The tap that looks at nothing."""


class Layer(NamedTuple):
    """One block's number, sizes, weights and adapter, and the angles of its positions."""

    number: int
    config: Qwen2Config
    weights: Weights
    adapter: Adapter | None
    cos: Array  # [T, D/2], or [N, T, D/2]
    sin: Array
    first: Array | None = None  # [N, T] or [1, T], the first key each token sees; None: key 0
    past: KeyValueStore | None = None
    tap: Tap = untapped  # is shown every intermediate by name: see `trace`

    def name(self, part: str) -> str:
        """Full name of a module of the block: model.layers.N.self_attn.q_proj."""
        return f"model.layers.{self.number}.{part}"

    def weight(self, part: str) -> Table:
        return self.weights[self.name(part) + ".weight"]

    def bias(self, part: str) -> Table | None:
        """Qwen2 has biases on q, k and v only; most families have none."""
        return self.weights.get(self.name(part) + ".bias")

    def pair(self, part: str) -> tuple[Array, Array] | None:
        """A and B of a projection; None where it has none."""
        return self.adapter.pair(self.name(part)) if self.adapter else None

    @property
    def scale(self) -> float:
        """s of the LoRA branches; 1 where there are none."""
        return self.adapter.scale if self.adapter else 1.0

    def show(self, part: str, value: Array) -> None:
        self.tap(self.name(part), value)
