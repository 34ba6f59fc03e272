"""Ranks over MPI: rank 0 runs the job, the others do their share of what it does."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.job.defaults import data_file
from mesp_ref.job.directory import RunDirectory
from mesp_ref.job.finetune import FinetuneOptions, Report, Run
from mesp_ref.job.metrics import Event
from mesp_ref.job.report import Reporter
from mesp_ref.spread.link import Link
from mesp_ref.spread.peers import Peers
from mesp_ref.spread.same import difference, own_facts
from mesp_ref.spread.tally import SpreadTally
from mesp_ref.spread.world import World
from mesp_ref.train.ranks import OwnTally, Tally
from mesp_ref.train.rows import Row
from mesp_ref.train.trainer import NonFinite, score_batch

_COMMANDS = "end", "meet", "advance", "scores"


class SpreadRanks(Peers):
    """What a rank does in a training: rank 0 leads. `main` and `sums` are for a thread each."""

    def __init__(self, main: World, sums: World, link: Link, arguments: dict[str, Any]):
        super().__init__(main, link, arguments)
        self.sums = sums
        self.torn = False  # whether some ranks are inside of a step that others have left

    def call(self, command: str, number: int = 0) -> None:
        """Rank 0: have the others do `command`. On the others nothing: they were called."""
        if self.rank == 0:
            self.main.numbers(_COMMANDS.index(command), number)
            self.torn = self.size > 1 and command in ("advance", "scores")

    def listen(self) -> tuple[str, int]:
        """The next command of rank 0."""
        command, number = self.main.numbers(0, 0)
        return _COMMANDS[command], number

    def tally(self, count: int) -> Tally:
        rounds = count // self.size
        return SpreadTally(self.sums, rounds, self.link) if self.size > 1 else OwnTally()

    def in_order(self, own: Sequence[Any], count: int) -> list[Any]:
        found = super().in_order(own, count)
        self.torn = False  # what comes now is the same on all ranks
        return found

    def scores(self, first: int, batches: Sequence[Any], score: Callable[[Any], Any]) -> list[Any]:
        self.call("scores", first)
        own = score(batches[self.rank]) if self.rank < len(batches) else None
        found = self.main.gathered(own)
        self.torn = False
        return found[: len(batches)]

    def meet(self, run: Run) -> None:
        """Rank 0: compare with the others, then send them the state to go on from."""
        self.call("meet")
        self.torn = True
        facts = own_facts(run, self.arguments)
        self.main.from_first((facts, run.options))
        problems = [problem for problem in self.main.gathered(None) if problem is not None]
        self.torn = False
        if problems:
            raise MespRefError(problems[0])
        self.hand_out(run)

    def hand_out(self, run: Run) -> None:
        """Rank 0's parameters, optimiser, step and place in the data, for all."""
        trainer = run.trainer
        arrays, facts = trainer.state() if self.rank == 0 else ({}, {})
        forms = {name: (array.shape, array.dtype.str) for name, array in arrays.items()}
        forms, facts = self.main.from_first((forms, facts))
        if facts["step"] == 0:
            return
        if self.rank:
            arrays = {name: np.empty(*form) for name, form in forms.items()}
        for name in forms:
            self.main.copy_from_first(arrays[name])
        if self.rank:
            trainer.restore(arrays, facts)


class Follower:
    """A rank other than 0: it opens what the job needs and then does what it is told."""

    def __init__(self, ranks: SpreadRanks):
        self.ranks = ranks
        self.run: Run | None = None

    def serve(self) -> int:
        """Until rank 0 ends; its exit code."""
        with contextlib.ExitStack() as inputs:
            while True:
                command, number = self.ranks.listen()
                if command == "end":
                    return number
                if command == "meet":
                    self._meet(inputs)
                elif command == "advance":
                    self._advance()
                else:
                    self._score(number)

    def _meet(self, inputs: contextlib.ExitStack) -> None:
        ranks = self.ranks
        theirs, options = ranks.main.from_first(None)
        problem = None
        try:
            self.run = self._open(options, inputs)
            problem = difference(theirs, own_facts(self.run, ranks.arguments), options.inexact)
        except (MespRefError, OSError, MemoryError) as error:
            problem = str(error) or "out of memory"
        if problem is not None:
            problem = f"rank {ranks.rank} on {ranks.link.host}: {problem}"
        if not any(found is not None for found in ranks.main.gathered(problem)):
            assert self.run is not None
            ranks.hand_out(self.run)

    def _open(self, options: FinetuneOptions, inputs: contextlib.ExitStack) -> Run:
        """The run as rank 0 has it, in a directory of its own in which nothing is written."""
        data = inputs.enter_context(data_file(options.data))
        place = inputs.enter_context(tempfile.TemporaryDirectory())
        directory = RunDirectory(place)
        inputs.callback(directory.release)
        mine = dataclasses.replace(
            options, resume=False, overwrite=False, memory_limit=None, out=place
        )
        return Run(mine, data, Reporter(lambda event: None), directory, self.ranks)

    def _advance(self) -> None:
        assert self.run is not None
        trainer = self.run.trainer
        self.ranks.link.at = f"step {trainer.step + 1}"
        with contextlib.suppress(NonFinite):  # rank 0 finds the same, and says so
            trainer.advance()

    def _score(self, first: int) -> None:
        """This rank's batch of the next `size` batches of held-out rows."""
        assert self.run is not None
        self.ranks.link.at = f"evaluation, batch {first}"
        run, train = self.run, self.run.options.train
        given = run.model, run.adapter, run.heldout, train.batch_size, first, self.ranks
        score_share(*given, train.score_chunk(run.model))


def score_share(
    model: Model,
    adapter: Adapter,
    rows: list[Row],
    size: int,
    first: int,
    ranks: SpreadRanks,
    chunk: int | None = None,
) -> None:
    """This rank's batch of those from number `first` on, for rank 0."""
    own = rows[(first + ranks.rank) * size :][:size]
    ranks.main.gathered(score_batch(model, adapter, own, chunk) if own else None)


def reporting(ranks: SpreadRanks, report: Report) -> Report:
    """A receiver of rank 0's events that tells the watch where the run is."""

    def told(event: Event) -> None:
        if event["event"] == "saved":
            ranks.link.saved = (
                f"the save of step {event['step']} stays in {event['out']}: repeat the command with "
                "--resume to go on"
            )
        if event["event"] == "step":
            ranks.link.at = f"step {event['step'] + 1}"
        ranks.link.moves += 1
        report(event)

    return told
