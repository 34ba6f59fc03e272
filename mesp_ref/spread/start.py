"""`--mpi`: the same command on several ranks, of which rank 0 is the job and the others help."""

import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from mesp_ref.errors import MespRefError, escaped
from mesp_ref.job.finetune import FinetuneOptions, Report, finetune
from mesp_ref.job.metrics import Event
from mesp_ref.spread.link import Link, start_watch
from mesp_ref.spread.ranks import Follower, SpreadRanks, reporting
from mesp_ref.spread.world import World, host_name, load_mpi

Job = Callable[[FinetuneOptions, Report], Event]
_STOPS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


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
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code = command(lambda options, report: _lead(ranks, options, report))
    except KeyboardInterrupt as interrupt:
        code = 128 + getattr(interrupt, "signal", signal.SIGINT)
        raise
    except BaseException as error:
        if ranks.torn:  # the others wait inside of a step: no word reaches them over MPI
            _say(error)
        raise
    finally:
        if ranks.torn:
            ranks.link.end()
        ranks.call("end", code)
        ranks.part()
        watch.wait()
    return code


def join(arguments: dict[str, Any], patience: float) -> tuple[SpreadRanks, Any]:
    """This process as a rank, and on rank 0 the watch.  Raises MespRefError where there is no MPI."""
    world = load_mpi().COMM_WORLD
    check_launcher(world.Get_size(), os.environ)
    rank, watch, address = world.Get_rank(), None, None
    if rank == 0:
        address, watch = start_watch(world.Get_size(), patience)
    link = Link(world.bcast(address), rank, host_name())

    # Only the main thread's waits count: the sums wait beside a backward that goes on.
    main, sums = World(world.Dup(), link.waiting), World(world.Dup(), lambda waits: None)
    return SpreadRanks(main, sums, link, arguments), watch


def check_launcher(size: int, environment: Mapping[str, str]) -> None:
    """Raise MespRefError where mpiexec started more ranks than MPI knows: each would run alone."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        started = environment.get(name, "1")
        if size == 1 and started != "1":
            raise MespRefError(
                f"--mpi: found 1 process in MPI, expected the {started} of {name}: this mpiexec "
                "belongs to another MPI than the one that mpi4py loaded; use the mpiexec beside it"
            )


def _lead(ranks: SpreadRanks, options: FinetuneOptions, report: Report) -> Event:
    """The job on rank 0."""
    train = options.train
    train = dataclasses.replace(train, accumulate=train.accumulate * ranks.size)
    return finetune(dataclasses.replace(options, train=train), reporting(ranks, report), ranks)


def _follow(ranks: SpreadRanks) -> int:
    """The life of another rank: signals are for rank 0, errors are told by the watch."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    try:
        code = Follower(ranks).serve()
    except MespRefError as error:
        ranks.link.fail(str(error))
    except MemoryError:
        ranks.link.fail("out of memory; try a smaller --batch-size or --seq-len")
    except OSError as error:
        ranks.link.fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except BaseException as error:
        traceback.print_exc()
        ranks.link.fail(f"{type(error).__name__}: {error}")
    ranks.part()
    return code


def _say(error: BaseException) -> None:
    text = str(error) if isinstance(error, MespRefError) else f"{type(error).__name__}: {error}"
    print(f"mesp-ref: error: rank 0: {escaped(text)}", file=sys.stderr, flush=True)
