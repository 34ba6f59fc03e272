"""The sizes of a training step, and of the arrays in it that have names in the papers.

Letters: X = N·T·C, Q = N·T·H·D, K = N·T·G·D, M = N·T·F, P = N·H·T² elements.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import adapter_shapes, parse_targets
from mesp_ref.lean.chunks import chunk_rows
from mesp_ref.memory.base import Base, Store


class Shapes(NamedTuple):
    """All that decides the memory of a step. `counted` is the number of labels ≠ −100."""

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
    packed: bool = False  # rows of several documents, kept apart
    chunk: int | None = None  # of mesp_streamed: rows at once, where they are not chunk_rows

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def counted(self) -> int:
        """Rows of the head: every position but the last of each sequence."""
        return self.batch * (self.tokens - 1)

    @property
    def at_once(self) -> int:
        """Rows of a chunk of mesp_streamed."""
        decoded = bool(self.base.matrices.decoded(1, itemsize=self.itemsize))
        return min(self.rows, self.chunk or chunk_rows(decoded, self.workers))

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

    def lora(self, targets: Iterable[str]) -> int:
        """Bytes of the LoRA gradients of one block's targets."""
        chosen = [name for name in self.targets if name in set(targets)]
        one = dataclasses.replace(self.config, num_hidden_layers=1)
        return self.itemsize * sum(map(math.prod, adapter_shapes(one, self.rank, chosen).values()))

    def h(self, targets: Iterable[str]) -> int:
        """Bytes of h = x·Aᵀ of one block's targets."""
        return self.of(*(self.rank for name in self.targets if name in set(targets)))

    def decoded(self, store: Store, *shape: int) -> int:
        """Bytes of a weight, or of a tile of it, beside its file: 0 where it is a view."""
        return store.decoded(*shape, itemsize=self.itemsize)
