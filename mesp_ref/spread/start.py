"""`--mpi`: one command on several ranks. In a training rank 0 is the job and the others help; other
commands run on all of them, each with its share of the pieces."""

import contextlib
import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from mesp_ref.errors import MespRefError, escaped
from mesp_ref.job.finetune import FinetuneOptions, Report, finetune
from mesp_ref.job.metrics import Event
from mesp_ref.spread.launcher import check_launcher
from mesp_ref.spread.link import Link, start_watch
from mesp_ref.spread.peers import Peers
from mesp_ref.spread.ranks import Follower, SpreadRanks, reporting
from mesp_ref.spread.world import World, host_name, load_mpi
from mesp_ref.train.ranks import Ranks

Job = Callable[[FinetuneOptions, Report], Event]
# Open MPI's mpirun ends its ranks a quarter of a second after SIGTERM; SIGUSR1 it only hands on.
_SAVE = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)] + _SAVE


def over_mpi(arguments: dict[str, Any], patience: float, command: Callable[[Job], int]) -> int:
    """Run a command's `command(finetune)` on rank 0, with the help of the others; its exit code.

    arguments   the command line by name, which must be alike on all ranks
    patience    seconds that ranks wait for one that does not move

    --accumulate counts the batches of each rank: N ranks train as one process with N times as many.
    Raises on rank 0 what the command raises; MespRefError where mpi4py or MPI is missing.
    """
    ranks, watch = join(arguments, patience)
    if ranks.rank:
        return _follow(ranks)
    code = 2
    for number in _SAVE:
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code = command(lambda options, report: _lead(ranks, options, report))
    except BaseException as error:
        if ranks.torn:  # the others wait inside of a step: no word reaches them over MPI
            _end_all(ranks, error)
        if isinstance(error, KeyboardInterrupt):
            code = _signalled(error)
        raise
    finally:
        ranks.call("end", code)
        ranks.part()
        watch.wait()
    return code


def share_over_mpi(
    arguments: dict[str, Any], patience: float, command: Callable[[Ranks], int]
) -> int:
    """Run a command on all ranks, which share out its pieces; the exit code, on each.

    command   calls `alike` of what it is given before any other method, and then does the same on
              every rank; only rank 0's output is seen, and it alone is to write files
    Raises on rank 0 what the command raises; MespRefError where mpi4py or MPI is missing.
    """
    joined = _join(patience)
    peers = Peers(joined.main, joined.link, arguments)
    if peers.rank:
        return _help(peers, command)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        return command(peers)
    except BaseException as error:
        if peers.together:  # the others are at work or wait for this rank
            _end_all(peers, error)
        raise
    finally:
        if not peers.called:
            peers.dismiss()
        peers.part()
        joined.watch.wait()


def _end_all(peers: Peers, error: BaseException) -> NoReturn:
    """Rank 0 cannot go on: one line, and the end of all ranks."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\nmesp-ref: {escaped(str(error) or 'interrupted')}", file=sys.stderr, flush=True)
        peers.link.end(_signalled(error))
    if not isinstance(error, _MISTAKES):
        traceback.print_exception(error)
    peers.link.fail(in_words(error))


def _signalled(interrupt: KeyboardInterrupt) -> int:
    """The exit code of a process that a signal ended."""
    return 128 + int(getattr(interrupt, "signal", signal.SIGINT))


def _help(peers: Peers, command: Callable[[Ranks], int]) -> int:
    """The same on another rank: it prints nothing, and signals are for rank 0."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    code, failed = 0, None
    if peers.awaited():
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,  # noqa: PTH123
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            try:
                code = command(peers)
            except BaseException as error:
                failed = error
    if failed is not None:
        if not isinstance(failed, _MISTAKES):
            traceback.print_exception(failed)
        if peers.together:
            peers.link.fail(in_words(failed))
        if not peers.compared:
            with contextlib.suppress(MespRefError):  # rank 0 says it
                peers.missing(in_words(failed))
    peers.part()
    return code


class Joined(NamedTuple):
    """This process among the ranks. `main` and `sums` are for a thread each; the watch is rank 0's."""

    main: World
    sums: World
    link: Link
    watch: Any


def _join(patience: float) -> Joined:
    """This process as a rank.  Raises MespRefError where there is no MPI or no mpiexec."""
    world = load_mpi().COMM_WORLD
    check_launcher(world.Get_size(), os.environ)
    rank, watch, address = world.Get_rank(), None, None
    if rank == 0:
        address, watch = start_watch(world.Get_size(), patience)
    link = Link(world.bcast(address), rank, host_name())

    # Only the main thread's waits count: the sums wait beside a backward that goes on.
    main, sums = World(world.Dup(), link.waiting), World(world.Dup(), lambda waits: None)
    return Joined(main, sums, link, watch)


def join(arguments: dict[str, Any], patience: float) -> tuple[SpreadRanks, Any]:
    """This process as a rank of a training, and on rank 0 the watch."""
    main, sums, link, watch = _join(patience)
    return SpreadRanks(main, sums, link, arguments), watch


def _lead(ranks: SpreadRanks, options: FinetuneOptions, report: Report) -> Event:
    """The job on rank 0."""
    train = dataclasses.replace(options.train, accumulate=_batches(ranks, options))
    return finetune(dataclasses.replace(options, train=train), reporting(ranks, report), ranks)


def _batches(ranks: SpreadRanks, options: FinetuneOptions) -> int:
    """Batches of a step of all ranks: those of the run to go on with, unless the command line says."""
    told = options.train.accumulate
    if not options.resume or ranks.arguments.get("accumulate") is not None:
        return told * ranks.size
    if told % ranks.size:
        raise MespRefError(
            f"--mpi: found {ranks.size} ranks, expected a divisor of the {told} batches in each step of "
            "the run to go on with"
        )
    return told


def _follow(ranks: SpreadRanks) -> int:
    """The life of another rank: signals are for rank 0, errors are told by the watch."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    try:
        code = Follower(ranks).serve()
    except BaseException as error:
        if not isinstance(error, _MISTAKES):
            traceback.print_exc()
        ranks.link.fail(in_words(error))
    ranks.part()
    return code


_MISTAKES = MespRefError, MemoryError, OSError  # told in one line, without a traceback


def in_words(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, MespRefError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller --batch-size or --seq-len"
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"
