"""Workers: threads that share the work of a block, each with one BLAS thread of its own.

A BLAS with several threads speeds up matrix products alone; NumPy's elementwise work stays on one
core, and so does every product too small to be cut. Workers cut the block instead (parts.py), and
then all of it runs on all cores.
"""

import contextvars
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")


class Each(Protocol):
    """`map` with a list for a result."""

    def __call__(self, f: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]: ...


def _in_turn(f: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    return [f(item) for item in items]


class Workers(NamedTuple):
    """How many workers there are, and how they share: `each(f, items)`, results in order."""

    size: int = 1
    each: Each = _in_turn


ALONE = Workers()


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of this process; looking for them takes a millisecond or more."""
    return ThreadpoolController()


def blas_threads() -> int:
    """Threads that BLAS may use now: as many as the environment allows, or the cores there are."""
    found = (pool["num_threads"] for pool in _blas().info() if pool["user_api"] == "blas")
    return max(found, default=1)


def _take_control() -> None:
    """Let this thread set OpenBLAS's threads: newer threadpoolctl lets only the last one that did."""
    for library in _blas().lib_controllers:
        clear = getattr(library, "clear_controlling_thread", None)
        if clear is not None:
            clear(force=True)


class _OneThread:
    """BLAS held to one thread while anybody is in the `with`.

    The number of BLAS threads belongs to the process. Were each call to restore what it found, the
    second of two that overlap would find 1 and leave it there. So the first one in sets it, and the
    last one out gives it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                _take_control()
                self._limit = _blas().limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._give_back()

    def _give_back(self) -> None:
        if self._limit is not None:
            _take_control()
            self._limit.restore_original_limits()
            self._limit = None
            _take_control()  # and leave it to whoever comes next

    def forked(self) -> None:
        """In the child of a fork only one thread lives on: nobody else is inside, or ever leaves."""
        self._lock, self._inside = threading.Lock(), 0
        self._give_back()


_ONE_THREAD = _OneThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ONE_THREAD.forked)


@contextmanager
def hire(count: int) -> Iterator[Workers]:
    """Workers for the time of a `with`; meanwhile BLAS has one thread in the whole process.

    Threads may hire at the same time: BLAS has its threads back when the last one is done.
    """
    if count == 1:
        yield ALONE
        return
    with _ONE_THREAD, ThreadPoolExecutor(count - 1) as pool:

        def each(f: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
            """The first item here, the others in the pool, which sees the caller's np.errstate."""
            first, *others = items
            futures = [pool.submit(contextvars.copy_context().run, f, item) for item in others]
            try:
                result = f(first)
            finally:
                wait(futures)  # nobody works on after an error
            return [result, *(future.result() for future in futures)]

        yield Workers(count, each)
