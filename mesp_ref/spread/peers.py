"""Ranks that all run one command: each does its share of the pieces; rank 0 prints and writes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mesp_ref.errors import MespRefError
from mesp_ref.spread.link import Link
from mesp_ref.spread.same import Facts, difference, facts_of
from mesp_ref.spread.world import World, load_mpi
from mesp_ref.train.ranks import Ranks

_NO, _GO = 0, 1


class Peers(Ranks):
    """A rank among others that run the same command.

    Rank 0 goes ahead until `alike`, so that what all would find wrong is told once. Then the others
    run the command, too, and all compare what they have before them.

    called     whether rank 0 has had the others start
    compared   whether what ranks have was compared
    together   whether all are at work: who fails now leaves others waiting
    """

    def __init__(self, main: World, link: Link, arguments: dict[str, Any]):
        self.main, self.link, self.arguments = main, link, arguments
        self.rank, self.size = main.rank, main.size
        self.called = self.compared = self.together = False

    def alike(self, identity: Mapping[str, Any]) -> None:
        """Raise MespRefError that names the first rank and field that differ from rank 0's."""
        if self.rank == 0:
            self.main.numbers(_GO)
            self.called = self.together = True
        self._compare(facts_of(identity, self.arguments))
        self.together = True

    def awaited(self) -> bool:
        """On ranks other than 0: whether rank 0 got as far as `alike`. Waits for it."""
        self.called = self.main.numbers(_NO) == (_GO,)
        return self.called

    def dismiss(self) -> None:
        """On rank 0: have the others end, which still wait to be called."""
        self.main.numbers(_NO)

    def missing(self, problem: str) -> None:
        """This rank has not what it takes. Raises MespRefError, on all ranks."""
        self._compare(problem)

    def _compare(self, own: Facts | str) -> None:
        everyone = self.main.gathered((self.link.host, own))
        self.compared = True
        first = everyone[0][1]
        for rank, (host, other) in enumerate(everyone):
            problem = other
            if isinstance(other, Facts):
                problem = difference(first, other, bool(self.arguments.get("inexact")))
            if problem is not None:
                self.together = False
                raise MespRefError(f"rank {rank} on {host}: {problem}")

    def at(self, place: str) -> None:
        self.link.at = place
        self.link.moves += 1

    def in_order(self, own: Sequence[Any], count: int) -> list[Any]:
        found = self.main.gathered(list(own))
        return [found[part % self.size][part // self.size] for part in range(count)]

    def scores(self, first: int, batches: Sequence[Any], score: Callable[[Any], Any]) -> list[Any]:
        self.at(f"batch {first + self.rank + 1}")
        own = score(batches[self.rank]) if self.rank < len(batches) else None
        return self.main.gathered(own)[: len(batches)]

    def part(self) -> None:
        """Leave well: all ranks are here."""
        self.main.assemble()
        self.link.leave()
        load_mpi().Finalize()
