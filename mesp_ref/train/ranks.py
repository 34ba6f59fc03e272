"""The processes that train together, as the trainer sees them; here the one that trains alone.

The batches of a step are its parts 0, 1, …; rank r of N computes parts r, N + r, 2N + r, …, and the
sums run over the parts in their order, whoever computed them. So N ranks form the floating-point
sums of one process that computes all parts. `mesp_ref.spread` has the ranks that talk over MPI.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from mesp_ref.ops import Array

T = TypeVar("T")
R = TypeVar("R")


class Tally(Protocol):
    """The sum of the gradients of a step's parts."""

    def add(self, grads: dict[str, Array]) -> None:
        """Gradients of one block of the part that is being computed, weighted; they are taken over."""

    def close(self) -> dict[str, Array]:
        """The sum over all parts of all ranks, in the order of the parts."""


class OwnTally:
    """The sum of one process: g₀ + g₁ + … tensor by tensor, in the arrays of the first part."""

    def __init__(self) -> None:
        self.total: dict[str, Array] = {}

    def add(self, grads: dict[str, Array]) -> None:
        for name, grad in grads.items():
            if name in self.total:
                self.total[name] += grad
            else:
                self.total[name] = grad

    def close(self) -> dict[str, Array]:
        return self.total


class Ranks:
    """One process that trains alone. What several do differently is overridden."""

    size, rank = 1, 0

    def meet(self, run: Any) -> None:
        """Make sure that all ranks have the same before them, and go on from the same state."""

    def call(self, command: str, number: int = 0) -> None:
        """Have the other ranks do what this one is about to do."""

    def parts(self, count: int) -> range:
        """Which of `count` parts are this rank's."""
        return range(self.rank, count, self.size)

    def tally(self, count: int) -> Tally:
        """A sum over `count` parts, nothing added yet."""
        return OwnTally()

    def in_order(self, own: Sequence[Any], count: int) -> list[Any]:
        """What every rank has for its parts, of all `count` parts in their order, for every rank."""
        return list(own)

    def scores(self, first: int, batches: Sequence[Any], score: Callable[[Any], Any]) -> list[Any]:
        """score(batch) of at most `size` batches, the first of which is number `first` of all."""
        return [score(batch) for batch in batches]

    def alike(self, identity: Mapping[str, Any]) -> None:
        """Make sure that all ranks have the same before them: hashes and settings by name.

        For a command that all ranks run; to be called when all that may be missing was opened.
        """

    def at(self, place: str) -> None:
        """Say where this rank is."""

    def shared(self, items: Iterable[T], job: Callable[[T], R]) -> list[R]:
        """job(item) of all items in their order, for every rank; the ranks take one each in turn."""
        own, count = [], 0
        for item in items:
            if count % self.size == self.rank:
                self.at(f"piece {count + 1}")
                own.append(job(item))
            count += 1
        return self.in_order(own, count)


ALONE = Ranks()
