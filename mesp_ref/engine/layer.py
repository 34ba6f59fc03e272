"""What one block computes with, whole or a worker's part of it."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.weights import Weights
from mesp_ref.lean.shards import Cuts, PartWeights, part_adapter
from mesp_ref.lean.workers import ALONE, Workers
from mesp_ref.ops import Array

Result = TypeVar("Result")


class Layer(NamedTuple):
    """One block's number, its weights and adapter, its angles, and who share it."""

    number: int
    config: Qwen2Config
    weights: Weights
    adapter: Adapter | None
    cos: Array  # [T, D/2]
    sin: Array  # [T, D/2]
    workers: Workers = ALONE
    share: int = 0  # whose part this is

    def name(self, part: str) -> str:
        return f"model.layers.{self.number}.{part}"

    def key(self, part: str) -> str:
        """What the residual of a part is called: each worker has its own."""
        return f"{part} of worker {self.share}" if self.share else part

    def weight(self, part: str) -> Array:
        return self.weights(self.name(part) + ".weight")

    def parameters(self, part: str) -> tuple[Array, Array | None]:
        """W and b of a projection; Qwen2 has biases on q, k and v only."""
        bias = self.name(part) + ".bias"
        return self.weight(part), self.weights(bias) if bias in self.weights else None

    def parts(self, cut: Callable[[Qwen2Config, int], list[Cuts]]) -> list["Layer"]:
        """The layer with some of its heads or of its MLP's columns, for each worker."""
        if self.workers.size == 1:
            return [self]
        prefix, found = self.name(""), []
        for share, cuts in enumerate(cut(self.config, self.workers.size)):
            weights = PartWeights(self.weights, prefix, cuts)
            adapter = self.adapter and part_adapter(self.adapter, prefix, cuts)
            found.append(self._replace(weights=weights, adapter=adapter, share=share))
        return found

    def each(
        self, cut: Callable[[Qwen2Config, int], list[Cuts]], f: Callable[["Layer"], Result]
    ) -> list[Result]:
        """f of each worker's part, all at once."""
        return self.workers.each(f, self.parts(cut))
